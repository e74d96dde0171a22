"""The commands as a user runs them, and the configurations they come with."""

import dataclasses
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from swr_jax.nn.language_model import LanguageModel, num_parameters
from swr_jax.train.checkpoint import load_model
from swr_jax.train.config import TrainConfig, make_train_config

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
PHALANX = f"--config={EXPERIMENTS}/configs/phalanx_tiny.py"
CONFIGS = sorted(p.stem for p in (EXPERIMENTS / "configs").glob("*.py") if p.stem != "default")


@pytest.fixture
def load_config(monkeypatch: pytest.MonkeyPatch):
    """Gives a configuration by name, as `experiments/pretrain.py` finds it."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return lambda name: importlib.import_module(f"configs.{name}").get_config()


def options(config, prefix: str = "") -> set[str]:
    """Dotted names of all options of a ConfigDict or of a dataclass."""
    if isinstance(config, ConfigDict):
        items = dict(config.items())
    else:
        items = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    names = set()
    for name, value in items.items():
        nested = isinstance(value, ConfigDict) or dataclasses.is_dataclass(value)
        names |= options(value, f"{prefix}{name}.") if nested else {prefix + name}
    return names


def parameters(config: TrainConfig) -> int:
    return num_parameters(nnx.eval_shape(lambda: LanguageModel(config.model, rngs=nnx.Rngs(0))))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_is_one_and_hides_no_option(name, load_config):
    values = load_config(name)
    if name.endswith("_1b"):
        values.model.vocab_size = 50_304  # its tokenizer is the user's
    config = make_train_config(values.to_dict())
    assert options(values) == options(config)


def test_models_that_are_compared_have_equal_size(load_config):
    tiny = ("phalanx_tiny", "swa_hybrid_tiny", "transformer_tiny")
    sizes = [parameters(make_train_config(load_config(name).to_dict())) for name in tiny]
    assert max(sizes) < 1.02 * min(sizes)

    sizes = []
    for name in ("phalanx_1b", "transformer_1b"):
        values = load_config(name)
        values.model.vocab_size = 50_304
        sizes.append(parameters(make_train_config(values.to_dict())))
    assert max(sizes) < 1.02 * min(sizes)
    assert all(1.2e9 < size < 1.45e9 for size in sizes)


def command(script: str, *arguments: str) -> list[str]:
    return [sys.executable, str(EXPERIMENTS / script), *arguments]


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        arguments, env=environment(), capture_output=True, text=True, check=False, **options
    )


def environment() -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return env | {"JAX_PLATFORMS": "cpu"}  # one device


def test_unknown_override_is_an_error_that_names_the_nearest():
    done = run(*command("pretrain.py", PHALANX, "--workdir=unused", "--config.model.feature=3"))
    assert done.returncode != 0
    assert 'Did you mean "features" instead of "feature"?' in done.stderr
    assert "Traceback" not in done.stderr


def test_generating_from_no_checkpoint_is_an_error_that_says_what_to_name(tmp_path):
    done = run(*command("generate.py", f"--checkpoint={tmp_path}", "--prompt=x"))
    assert done.returncode != 0
    assert done.stderr.startswith(f"error: {tmp_path} holds no finished checkpoint")


TINY = (
    PHALANX,
    "--config.model.features=32",
    "--config.model.depth=2",
    "--config.data.batch_size=32",  # slow enough to be killed between two checkpoints
    "--config.steps=20",
    "--config.log_every=1",
    "--config.checkpoint_every=10",
    "--config.eval_batches=2",
    "--config.sample_tokens=16",
    # Draws that were not the same in every process and after every stop would change the losses.
    "--config.window_schedule.option=phalanx.block_size",
    "--config.window_schedule.sizes=(2, 16)",
    "--config.window_schedule.probabilities=(0.5, 0.5)",
)


@pytest.fixture(scope="module")
def straight_run(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    workdir = tmp_path_factory.mktemp("straight")
    return workdir, run(*command("pretrain.py", f"--workdir={workdir}", *TINY))


def wait_for_step_13(workdir: Path, process: subprocess.Popen) -> None:
    """Until three steps after the checkpoint of step 10, and until that is written."""
    log, checkpoint = workdir / "metrics.jsonl", workdir / "checkpoints" / "10"
    while not checkpoint.exists() or log.read_text().count('"split": "train"') < 13:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def losses(workdir: Path) -> list[tuple]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    names = ("step", "split", "block_size", "loss")
    return [tuple(line.get(name) for name in names) for line in lines]


@pytest.mark.slow
def test_a_run_reports_and_its_next_command_works(straight_run):
    workdir, done = straight_run
    assert done.returncode == 0, done.stderr
    for said in ("bits per byte (unigram model: ", "tokens per second", str(workdir / "loss.png")):
        assert said in done.stdout
    next_command = done.stdout.splitlines()[-1].strip()
    assert "generate.py" in next_command

    for suffix in ("", " --prompt= --temperature=0"):
        generated = subprocess.run(
            next_command + suffix + " --max_tokens=12",
            shell=True,
            env=environment(),
            capture_output=True,
            check=True,
        )
        assert generated.stderr == b""
        text = generated.stdout.decode("utf-8")
        assert text.startswith("" if suffix else "import ")

    piped = run(*command("generate.py", f"--checkpoint={workdir}"), input="窗口 = ")
    assert piped.returncode == 0
    assert piped.stdout.startswith("窗口 = ")


@pytest.mark.slow
def test_killed_and_started_again_it_is_the_same_run_to_the_bit(straight_run, tmp_path):
    straight, _ = straight_run
    arguments = command("pretrain.py", f"--workdir={tmp_path}", *TINY)
    process = subprocess.Popen(arguments, env=environment(), stdout=subprocess.DEVNULL)
    wait_for_step_13(tmp_path, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "checkpoints" / "20").exists()

    resumed = run(*arguments)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from the checkpoint of step 10" in resumed.stdout
    models = [nnx.state(load_model(workdir)[0]) for workdir in (straight, tmp_path)]
    for a, b in zip(*map(jax.tree.leaves, models), strict=True):
        np.testing.assert_array_equal(a, b)
    assert losses(tmp_path) == losses(straight)


@pytest.mark.slow
def test_a_run_that_is_done_says_what_it_knows_without_its_log(straight_run, tmp_path):
    straight, done = straight_run
    workdir = shutil.copytree(straight, tmp_path / "copied")
    (workdir / "metrics.jsonl").unlink()
    again = run(*command("pretrain.py", f"--workdir={workdir}", *TINY))
    assert again.returncode == 0, again.stderr
    assert "train loss" in done.stdout
    assert "train loss" not in again.stdout
    first, second = (
        next(line for line in x.stdout.splitlines() if "validation loss" in line)
        for x in (done, again)
    )
    assert first == second


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    arguments = command("pretrain.py", f"--workdir={tmp_path}", *TINY, "--config.steps=100000")
    process = subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step: 3 "):
            break
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signal.SIGINT
    assert "stopped by SIGINT; step" in rest
    assert f"--workdir={tmp_path}" in rest.splitlines()[-1]
    assert load_model(tmp_path)[2] >= 3


@pytest.mark.slow
def test_breaking_down_ends_the_command_with_an_error(tmp_path):
    done = run(
        *command("pretrain.py", f"--workdir={tmp_path}", *TINY),
        "--config.optimizer.learning_rate=1e30",
    )
    assert done.returncode == 1
    assert "error: training broke down at step" in done.stderr


@pytest.mark.slow
def test_two_processes_train_as_one_does(straight_run, tmp_path):
    straight, _ = straight_run
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def start() -> list[subprocess.Popen]:
        arguments = command("pretrain.py", f"--workdir={tmp_path}", *TINY)
        arguments += ["--distributed", f"--coordinator=localhost:{port}", "--num_processes=2"]
        return [
            subprocess.Popen(
                [*arguments, f"--process_id={i}"],
                env=environment(),
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for i in (0, 1)
        ]

    processes = start()
    wait_for_step_13(tmp_path, processes[0])
    for process in processes:
        process.kill()
        process.communicate()

    processes = start()
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "resumed from the checkpoint of step 10" in outputs[0][0]
    assert "step: " not in outputs[1][0]  # one of them reports
    *exact, values = zip(*losses(tmp_path), strict=True)
    *expected, expected_values = zip(*losses(straight), strict=True)
    assert exact == expected
    assert {2, 16} <= set(exact[2])
    np.testing.assert_allclose(values, expected_values, rtol=1e-5)
