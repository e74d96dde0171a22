"""Whole runs: learning, stopping, resuming to the bit, and breaking down without harm."""

import dataclasses
import json
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from swr_jax.train.checkpoint import load_model
from swr_jax.train.config import TrainConfig
from swr_jax.train.loop import NonFiniteError, Summary, train


def saved_arrays(workdir: Path) -> list[np.ndarray]:
    model, _, _ = load_model(workdir)
    return [np.asarray(x) for x in jax.tree.leaves(nnx.state(model))]


def lines(workdir: Path, split: str) -> list[dict]:
    read = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in read if line["split"] == split]


@pytest.fixture(scope="module")
def smaller(config: TrainConfig) -> TrainConfig:
    """For what does not depend on the model."""
    model = dataclasses.replace(config.model, features=8, depth=1, pattern=("swa",))
    return dataclasses.replace(config, model=model)


@pytest.fixture(scope="module")
def finished_run(config: TrainConfig, tmp_path_factory) -> tuple[Path, Summary]:
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train(dataclasses.replace(config, sample_tokens=20), workdir)


def test_it_learns_more_than_a_unigram_model_knows(finished_run):
    workdir, summary = finished_run
    losses = [line["loss"] for line in lines(workdir, "train")]
    assert len(losses) == 40
    assert losses[-1] < 0.6 * losses[0]
    assert summary.train_loss == losses[-1]
    assert summary.validation["bits_per_byte"] < summary.validation["unigram_bits_per_byte"]


def test_it_leaves_what_it_says(finished_run, config):
    workdir, summary = finished_run
    assert summary.step == 40
    assert summary.stopped_by is None
    assert sorted(int(p.name) for p in summary.checkpoints.iterdir() if p.name.isdigit()) == [
        30,
        40,
    ]
    assert summary.plot.read_bytes().startswith(b"\x89PNG")
    assert [line["step"] for line in lines(workdir, "validation")] == [20, 40]
    assert any(summary.tensorboard.iterdir())
    assert len(summary.sample) > 0
    assert summary.tokens_per_second > 0
    assert load_model(workdir)[1:] == (dataclasses.replace(config, sample_tokens=20), 40)


def test_stopped_by_a_signal_and_resumed_it_is_the_same_run_to_the_bit(
    config, finished_run, tmp_path, tamper_with_training_batches, capsys
):
    def stop_at_15(number, batch):
        if number == 15:
            signal.raise_signal(signal.SIGTERM)
        return batch

    before = signal.getsignal(signal.SIGTERM)
    tamper_with_training_batches(stop_at_15)
    stopped = train(config, tmp_path)
    assert stopped.step == 15
    assert stopped.stopped_by == signal.SIGTERM
    assert stopped.validation is None
    assert signal.getsignal(signal.SIGTERM) is before

    tamper_with_training_batches(lambda _, batch: batch)
    resumed = train(config, tmp_path)
    assert "resumed from the checkpoint of step 15" in capsys.readouterr().out
    assert resumed.step == 40

    straight, _ = finished_run
    for a, b in zip(saved_arrays(tmp_path), saved_arrays(straight), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [line["loss"] for line in lines(tmp_path, "train")] == [
        line["loss"] for line in lines(straight, "train")
    ]


def test_training_that_is_done_already_is_only_evaluated(config, finished_run, tmp_path):
    workdir, summary = finished_run
    again = train(config, workdir)
    assert again.step == 40
    assert again.tokens_per_second is None
    assert again.validation == summary.validation
    assert again.train_loss == summary.train_loss


def test_nan_stops_the_run_and_leaves_the_last_good_checkpoint(
    smaller, tmp_path, tamper_with_training_batches
):
    def spoil_the_17th(number, batch):
        spoiled = np.nan * batch["loss_weights"]
        return batch | {"loss_weights": spoiled} if number == 17 else batch

    tamper_with_training_batches(spoil_the_17th)
    config = dataclasses.replace(smaller, checkpoint_every=8, log_every=50)
    with pytest.raises(NonFiniteError, match=r"at step 17: loss is nan.* of step 16, is from"):
        train(config, tmp_path)
    assert all(np.isfinite(x).all() for x in saved_arrays(tmp_path))
    assert load_model(tmp_path)[2] == 16


def test_a_state_with_infinite_parameters_is_not_saved(smaller, tmp_path):
    optimizer = dataclasses.replace(smaller.optimizer, learning_rate=1e30, warmup_steps=0)
    config = dataclasses.replace(smaller, optimizer=optimizer, checkpoint_every=1)
    with pytest.raises(NonFiniteError, match=r"at step 1: param_norm is inf.*no checkpoint yet"):
        train(config, tmp_path)
    with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
        load_model(tmp_path)


def test_vocabulary_smaller_than_the_tokenizers_is_refused(config, tmp_path):
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=256))
    with pytest.raises(ValueError, match=r"model.vocab_size=256 must be at least the 259 ids"):
        train(small, tmp_path)
