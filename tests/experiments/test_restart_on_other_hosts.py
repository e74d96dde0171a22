"""A run killed on two hosts goes on on one, and then on four, as if nothing had happened."""

import time
from pathlib import Path

import numpy as np
import pytest
from training_processes import log_of, losses, newest_checkpoint, start

from swr_jax.data.prepare import Preparation

EVERY = 6  # steps between checkpoints


def train_past(step: int, workdir: Path, *options: str, hosts: int = 1) -> None:
    """Trains until there is a checkpoint of `step` or a later one, then kills all processes."""
    processes = start(workdir, *options, hosts=hosts)
    deadline = time.monotonic() + 240
    try:
        while newest_checkpoint(workdir) < step:
            assert time.monotonic() < deadline, f"no checkpoint of step {step} in time"
            assert all(p.poll() is None for p in processes), "a process ended by itself"
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


@pytest.mark.slow
def test_two_hosts_then_one_then_four(tmp_path):
    tokens = tmp_path / "tokens"
    with Preparation("python", tokens) as preparation:
        preparation.run(workers=1)
    options = (
        f"--config.data.source={tokens}",
        "--config.steps=100000",
        f"--config.checkpoint_every={EVERY}",
        "--config.log_every=1",
        "--config.eval_every=100000",
        "--config.eval_batches=1",
        "--config.data.batch_size=8",
        "--config.data.sequence_length=64",
        "--config.data.shuffle_tokens=4096",
        "--config.model.features=32",
        "--config.model.depth=2",
        # So slow that rounding, which the number of hosts changes, has nothing to grow in.
        "--config.optimizer.learning_rate=1e-5",
    )
    run, whole = tmp_path / "run", tmp_path / "whole"
    for hosts in (2, 1, 4):
        before = newest_checkpoint(run)
        train_past(before + EVERY, run, *options, hosts=hosts)
        if before:
            said = log_of(run, hosts=hosts).read_text()
            assert f"resumed from the checkpoint of step {before}" in said
    last = max(losses(run))
    train_past(last + EVERY, whole, *options)
    expected, found = losses(whole), losses(run)
    assert list(found) == list(range(1, last + 1))
    # Batches of other documents differ in the second digit.
    np.testing.assert_allclose(list(found.values()), [expected[s] for s in found], rtol=1e-5)
    assert np.std(list(found.values())) > 1e-3
