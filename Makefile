# make train     train the small Phalanx hybrid on text that is already here, and show what it says
# make test      the quick test suite;  make test-all  with the slow tests too
# make test-oldest   the tests of what calls JAX most, with the oldest JAX that is supported
# make lint      style
#
# Each target makes its own virtual environment first. It needs a Python of at least 3.12: on PATH,
# in one of the usual places, or named by PYTHON=.

SHELL := /bin/bash
VENV ?= .venv
WORKDIR ?= runs/phalanx_tiny
ARGS ?=
TESTS ?=
PYTEST_ARGS ?=
# More for pip to install, such as another version of a dependency: "jax==0.11.2".
PACKAGES ?=

VENV_PYTHON := $(VENV)/bin/python
IS_NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 12))
CANDIDATES := $(if $(PYTHON),$(PYTHON),python3.12 python3.13 python3.14 python3 python \
	$(wildcard $(HOME)/.pyenv/versions/*/bin/python3) \
	$(wildcard $(HOME)/.local/share/uv/python/*/bin/python3) \
	$(wildcard /opt/python*/bin/python3 /usr/local/bin/python3.1? /opt/homebrew/bin/python3.1?))

.PHONY: train test test-all test-oldest lint format clean

train: $(VENV)/.train
	$(VENV_PYTHON) experiments/pretrain.py --config=experiments/configs/phalanx_tiny.py \
		--workdir=$(WORKDIR) $(ARGS)

test: $(VENV)/.test
	$(VENV_PYTHON) -m pytest -n 2 --dist loadfile -m "not slow" $(PYTEST_ARGS) $(TESTS)

test-all: $(VENV)/.test
	$(VENV_PYTHON) -m pytest -n 2 --dist loadfile $(PYTEST_ARGS) $(TESTS)

test-oldest:
	$(MAKE) test VENV=.venv-oldest PACKAGES="jax==0.11.2 jaxlib==0.11.2" \
		TESTS="tests/ops tests/nn tests/train/test_step.py tests/train/test_checkpoint.py"

lint: $(VENV)/.test
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .

format: $(VENV)/.test
	$(VENV_PYTHON) -m ruff check --fix .
	$(VENV_PYTHON) -m ruff format .

$(VENV_PYTHON):
	@for python in $(CANDIDATES); do \
		if "$$python" -c "$(IS_NEW_ENOUGH)" 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
		echo "No Python >= 3.12 found: install one (python.org, pyenv, uv or your packages), or name it: make PYTHON=/path/to/python3.12" >&2; \
		exit 1; \
	fi; \
	echo "Setting up $(VENV) with $$($$found --version)"; \
	"$$found" -m venv $(VENV)

$(VENV)/.train: pyproject.toml | $(VENV_PYTHON)
	$(VENV_PYTHON) -m pip install --quiet -e . $(PACKAGES)
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV_PYTHON)
	$(VENV_PYTHON) -m pip install --quiet -e ".[test]" $(PACKAGES)
	@touch $@ $(VENV)/.train

clean:
	rm -rf .venv .venv-oldest build *.egg-info
