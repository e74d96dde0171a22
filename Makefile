# make train     train the small Phalanx hybrid on text that is already here, and show what it says
# make test      the quick test suite;  make test-all  with the slow tests too
# make test-targets  kernels compiled for Hopper and TPU chips that are not here
# make test-oldest   of what calls JAX most, with the oldest JAX supported; compilations for two chips
# make test-parity   imported weights against transformers, which needs torch
# make test-harness  our models in lm-evaluation-harness, on tasks of our own, offline
# make test-serve    the HTTP server, by the client whose format it speaks, on this machine
# make plan      what a training run would take on a pod, from its compiler: ARGS='--config=...'
# make plan-study    the same for models of one and seven billion parameters on many slices: hours
# make report    what every kernel would take on Hopper and TPU chips, from their compilers
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
# What pip installs for tests: extras of this package, and more, such as other versions.
EXTRAS ?= test
PACKAGES ?=
# Which of the tests run.
SELECTION ?= not slow and not targets
WITH_TARGETS = VENV=.venv-targets EXTRAS=test,targets SELECTION="targets and not slow"
OLDEST := 0.11.2
# Of the tests that call JAX most, what the oldest JAX runs; all of them: OLDEST_CALLS=test.
OLDEST_CALLS ?= every_gradient or results_and_gradients or every_parameter or default_and_agrees \
	or trains_through or learns_a_text or in_walks or over_pieces or on_the_mesh or test_checkpoint
OLDEST_COMPILES ?= v5e or within_budget or without_spills
WITH_OLDEST = VENV=.venv-oldest EXTRAS=test,targets \
	PACKAGES="$(addsuffix ==$(OLDEST),jax jaxlib jax-cuda13-plugin jax-cuda13-pjrt)"

VENV_PYTHON := $(VENV)/bin/python
IS_NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 12))
CANDIDATES := $(if $(PYTHON),$(PYTHON),python3.12 python3.13 python3.14 python3 python \
	$(wildcard $(HOME)/.pyenv/versions/*/bin/python3) \
	$(wildcard $(HOME)/.local/share/uv/python/*/bin/python3) \
	$(wildcard /opt/python*/bin/python3 /usr/local/bin/python3.1? /opt/homebrew/bin/python3.1?))

.PHONY: train test test-all test-targets test-oldest test-parity test-harness test-serve plan plan-study report \
	lint format clean

train: $(VENV)/.train
	$(VENV_PYTHON) experiments/pretrain.py --config=experiments/configs/phalanx_tiny.py \
		--workdir=$(WORKDIR) $(ARGS)

test: $(VENV)/.test
	$(VENV_PYTHON) -m pytest -n 2 --dist loadfile -m "$(SELECTION)" $(PYTEST_ARGS) $(TESTS)

test-all:
	$(MAKE) test SELECTION="not targets"

# The compilers of other chips stay out of .venv: with them, plain `import jax` looks for a TPU.
test-targets:
	$(MAKE) test $(WITH_TARGETS) TESTS="tests/pallas_kernels tests/experiments/test_docs.py"
	$(MAKE) test $(WITH_TARGETS) TESTS=tests/programs

test-oldest:
	$(MAKE) test $(WITH_OLDEST) PYTEST_ARGS="-k '$(OLDEST_CALLS)'" \
		TESTS="tests/pallas_kernels tests/ops tests/nn tests/train/test_step.py \
		tests/train/test_checkpoint.py"
	$(MAKE) test $(WITH_OLDEST) SELECTION="targets and not slow" \
		PYTEST_ARGS="-k '$(OLDEST_COMPILES)'" TESTS=tests/pallas_kernels

test-parity:
	$(MAKE) test VENV=.venv-parity EXTRAS=test,parity SELECTION="not targets" \
		TESTS="tests/nn/test_convert_parity.py tests/nn/test_convert_decoder_parity.py"

test-harness:
	$(MAKE) test VENV=.venv-harness EXTRAS=test,harness SELECTION="not targets" \
		TESTS=tests/eval/test_harness.py

test-serve:
	$(MAKE) test VENV=.venv-serve EXTRAS=test,serve,clients SELECTION="not targets" \
		TESTS=tests/serve

plan:
	@$(MAKE) .venv-targets/.test VENV=.venv-targets EXTRAS=test,targets
	@.venv-targets/bin/python experiments/plan.py $(ARGS)

plan-study:
	$(MAKE) .venv-targets/.test VENV=.venv-targets EXTRAS=test,targets
	.venv-targets/bin/python experiments/plan_study.py $(ARGS)

report:
	$(MAKE) .venv-targets/.test VENV=.venv-targets EXTRAS=test,targets
	.venv-targets/bin/python experiments/kernel_report.py --platform=gpu $(ARGS)
	.venv-targets/bin/python experiments/kernel_report.py --platform=tpu $(ARGS)
	.venv-targets/bin/python experiments/tpu_baselines.py $(ARGS)
	.venv-targets/bin/python experiments/tpu_baselines.py --operator=mlstm $(ARGS)
	.venv-targets/bin/python experiments/tpu_baselines.py --operator=gated_delta $(ARGS)

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
	$(VENV_PYTHON) -m pip install --quiet -e ".[$(EXTRAS)]" $(PACKAGES)
	@touch $@ $(VENV)/.train

clean:
	rm -rf .venv .venv-targets .venv-oldest .venv-parity .venv-harness .venv-serve build *.egg-info
