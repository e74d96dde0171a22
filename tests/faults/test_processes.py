"""Runs that are killed, told to stop, or left without a worker or a disk; each is a command."""

import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from training_processes import log_of, losses, newest_checkpoint, start

from swr_jax.train.checkpoint import load_model

pytestmark = pytest.mark.slow

KILLS = 25
TINY = (
    "--config.steps=100000",
    "--config.checkpoint_every=4",
    "--config.log_every=1",
    "--config.eval_every=100000",
    "--config.eval_batches=1",
    "--config.data.batch_size=8",
    "--config.data.sequence_length=64",
    "--config.data.shuffle_tokens=4096",
    "--config.model.features=32",
    "--config.model.depth=2",
    "--config.sample_tokens=0",
)


def wait(condition, process, *, seconds=300, poll=0.002):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "in vain"
        assert process.poll() is None, "the process ended by itself"
        time.sleep(poll)


def finished(process, *, seconds=300) -> int:
    try:
        return process.wait(timeout=seconds)
    finally:
        process.kill()


def arrays(workdir: Path) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(nnx.state(load_model(workdir)[0]))]


def being_written(workdir: Path) -> bool:
    return any((workdir / "checkpoints").glob("*tmp*"))


def test_killed_at_any_moment_a_run_ends_with_the_same_bits(tmp_path):
    """Every second time a checkpoint is being written."""
    options = (*TINY, "--config.steps=500")
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    rng = np.random.default_rng(0)
    in_writes = 0
    for kill in range(KILLS):
        (process,) = start(killed, *options)
        goal = newest_checkpoint(killed) + int(rng.integers(1, 16))

        def reached(goal=goal) -> bool:
            return max(losses(killed), default=0) >= goal

        wait(reached, process)
        if kill % 2:
            wait(lambda: being_written(killed), process, poll=0.0005)
            time.sleep(rng.uniform(0, 0.05))
        else:
            time.sleep(rng.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        assert finished(process) == -signal.SIGKILL
        in_writes += being_written(killed)
    assert in_writes >= KILLS // 4
    for workdir in (killed, straight):
        (process,) = start(workdir, *options)
        assert finished(process) == 0, log_of(workdir).read_text()
    for a, b in zip(arrays(killed), arrays(straight), strict=True):
        np.testing.assert_array_equal(a, b)
    assert losses(killed) == losses(straight)


def test_sigterm_saves_and_ends_well_within_seconds(tmp_path):
    workdir = tmp_path / "run"
    (process,) = start(workdir, *TINY)
    wait(lambda: max(losses(workdir), default=0) >= 6, process)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert finished(process) == 0
    assert time.monotonic() - began < 30
    assert newest_checkpoint(workdir) == max(losses(workdir))
    assert "stopped by SIGTERM" in log_of(workdir).read_text()


def test_same_seed_same_bits(tmp_path):
    runs = [tmp_path / name for name in ("first", "second")]
    for workdir in runs:
        (process,) = start(workdir, *TINY, "--config.steps=20")
        assert finished(process) == 0
    assert losses(runs[0]) == losses(runs[1])
    for a, b in zip(*map(arrays, runs), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_full_disk_ends_the_run_and_costs_no_checkpoint(tmp_path):
    workdir = tmp_path / "run"
    (process,) = start(workdir, *TINY, "--config.steps=8", "--config.keep_checkpoints=1")
    assert finished(process) == 0
    before = arrays(workdir)
    (process,) = start(workdir, *TINY, "--config.keep_checkpoints=1", file_kib=20)
    assert finished(process) == 1
    said = log_of(workdir).read_text().splitlines()[-1]
    assert said.startswith("error: the checkpoint of step 12 could not be written")
    assert "The newest checkpoint is of step 8" in said
    for a, b in zip(arrays(workdir), before, strict=True):
        np.testing.assert_array_equal(a, b)
    (process,) = start(workdir, *TINY, "--config.steps=16")
    assert finished(process) == 0


def test_when_a_worker_dies_the_others_stop(tmp_path):
    workdir = tmp_path / "run"
    processes = start(workdir, *TINY, hosts=2)
    try:
        wait(lambda: newest_checkpoint(workdir) >= 4, processes[0])
        processes[1].kill()
        began = time.monotonic()
        assert finished(processes[0], seconds=200) != 0
        assert time.monotonic() - began < 150
    finally:
        for process in processes:
            process.kill()
    (process,) = start(workdir, *TINY, f"--config.steps={newest_checkpoint(workdir) + 4}")
    assert finished(process) == 0  # on what is left
    assert "resumed from the checkpoint" in log_of(workdir).read_text()


def test_processes_with_different_options_say_which_and_stop(tmp_path):
    workdir = tmp_path / "run"
    other = ["--config.optimizer.learning_rate=0.007"]
    processes = start(workdir, *TINY, hosts=3, of_one=[[], other])
    assert [finished(process) for process in processes] == [1, 1, 1]
    for index in range(3):
        said = log_of(workdir, index, 3).read_text()
        assert "error: the processes of this run differ: process 1 (" in said
        assert ") in config.optimizer.learning_rate" in said
        assert ("0.007" in said) == (index == 1)
    assert not workdir.exists()
