"""Updates that would spoil a run are left out or undone, a bounded number of times, and counted."""

import dataclasses
import json
import math
import signal

import jax
import numpy as np
import pytest
from flax import nnx
from training_cases import random_batch

from swr_jax.train.checkpoint import load_model
from swr_jax.train.config import GuardConfig, MeshConfig
from swr_jax.train.loop import NonFiniteError, train
from swr_jax.train.sharding import batch_sharding, make_mesh, put_batch
from swr_jax.train.state import init_state, make_blueprint
from swr_jax.train.step import make_train_step

pytestmark = pytest.mark.usefixtures("one_device")


def with_guard(config, **options):
    return dataclasses.replace(config, guard=GuardConfig(**options))


def lines(workdir, split="train"):
    found = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["split"] == split]


def arrays(workdir):
    return [np.asarray(x) for x in jax.tree.leaves(nnx.state(load_model(workdir)[0]))]


def spoilt(batch):
    """The loss of these weights is NaN."""
    return batch | {"loss_weights": np.full_like(batch["loss_weights"], np.nan)}


def nonsense(batch, seed):
    """Targets that nothing predicts: a model that has learnt something has a high loss there."""
    rng = np.random.default_rng(seed)
    return batch | {"targets": rng.integers(200, 256, batch["targets"].shape).astype(np.int32)}


class Updates:
    """Updates one by one, on random batches, with losses that a test may choose."""

    def __init__(self, config):
        self.mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        blueprint = make_blueprint(config, self.mesh)
        self.state = init_state(config, blueprint)
        self.step = make_train_step(blueprint, self.mesh, guard=config.guard)

    def __call__(self, seed, change=lambda batch: batch):
        batch = put_batch(change(random_batch(8, 32, seed=seed)), batch_sharding(self.mesh))
        self.state, metrics = self.step(self.state, batch)
        return jax.device_get(metrics)

    @property
    def arrays(self):
        kept = (self.state.params, self.state.opt_state)
        return [np.asarray(x) for x in jax.tree.leaves(kept)]


def test_a_refused_update_changes_nothing_but_the_counts(config):
    updates = Updates(with_guard(config, action="skip"))
    updates(0)
    before = updates.arrays
    metrics = updates(1, spoilt)
    assert math.isnan(metrics["loss"])
    for a, b in zip(updates.arrays, before, strict=True):
        np.testing.assert_array_equal(a, b)
    assert {n: int(metrics[n]) for n in ("is_refused", "refused", "in_a_row", "weight")} == {
        "is_refused": 1,
        "refused": 1,
        "in_a_row": 1,
        "weight": 0,
    }
    assert int(updates.state.step) == 2
    metrics = updates(2)
    assert [int(metrics[n]) for n in ("is_refused", "refused", "in_a_row")] == [0, 1, 0]
    assert any(not np.array_equal(a, b) for a, b in zip(updates.arrays, before, strict=True))


def test_without_faults_a_guard_changes_no_bit(config):
    plain, guarded = Updates(config), Updates(with_guard(config, action="skip", spike_factor=9.0))
    for seed in range(5):
        a, b = plain(seed), guarded(seed)
        assert a["loss"] == b["loss"]
    for a, b in zip(plain.arrays, guarded.arrays, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_spike_is_a_loss_above_its_average_times_the_factor(config):
    """By the average as NumPy has it, over batches of which a random share is easy to learn."""
    memory, factor = 4, 1.1
    shares = np.random.default_rng(0).random(40)
    updates = Updates(with_guard(config, action="skip", spike_factor=factor, memory=memory))
    accepted, refused = [], 0
    for seed in range(40):

        def easy(batch, seed=seed):
            hard = np.random.default_rng(seed).random(batch["targets"].shape) > shares[seed]
            return batch | {"targets": np.where(hard, batch["targets"], 7)}

        metrics = updates(seed, easy)
        loss = float(metrics["loss"])
        weights = (1 - 1 / memory) ** np.arange(len(accepted))[::-1]
        spike = len(accepted) >= memory and loss > factor * np.average(accepted, weights=weights)
        assert bool(metrics["is_refused"]) == spike, seed
        refused += spike
        accepted += [] if spike else [loss]
    assert 0 < refused < 30


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_a_run_goes_on_past_nan(config, tmp_path, tamper_with_training_batches, action):
    """NaN in the 17th batch; the last checkpoint before it is of step 10."""
    tamper_with_training_batches(lambda n, batch: spoilt(batch) if n == 17 else batch)
    summary = train(with_guard(config, action=action), tmp_path)
    assert summary.step == 40
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 41))
    last = lines(tmp_path)[-1]
    assert (last["refused"], last["rollbacks"]) == (1, int(action == "rollback"))
    counts = [line["refused"] for line in lines(tmp_path)]
    assert counts.index(1) == (16 if action == "skip" else 10)
    assert all(np.isfinite(x).all() for x in arrays(tmp_path))
    assert summary.validation["bits_per_byte"] < summary.validation["unigram_bits_per_byte"]


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_a_run_goes_on_past_a_spike(config, tmp_path, tamper_with_training_batches, action):
    tamper_with_training_batches(lambda n, batch: nonsense(batch, n) if n in (35, 36) else batch)
    train(with_guard(config, action=action, spike_factor=1.8, memory=10), tmp_path)
    last = lines(tmp_path)[-1]
    assert (last["refused"], last["rollbacks"]) == ((2, 0) if action == "skip" else (2, 2))


def test_a_spike_stops_the_run_if_that_is_asked_for(config, tmp_path, tamper_with_training_batches):
    tamper_with_training_batches(lambda n, batch: nonsense(batch, n) if n == 35 else batch)
    message = r"step 35: loss is .* more than 1.8 times its average.* of step 30, is from before it"
    with pytest.raises(NonFiniteError, match=message):
        train(with_guard(config, spike_factor=1.8, memory=10), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"action": "skip", "max_in_a_row": 3}, r"step 18: loss is nan.* 4 updates in a row"),
        ({"action": "rollback", "max_rollbacks": 2}, r"gone back to a checkpoint 2 times"),
    ],
)
def test_the_number_of_retries_is_bounded(
    config, tmp_path, tamper_with_training_batches, options, message
):
    tamper_with_training_batches(lambda n, batch: spoilt(batch) if n >= 15 else batch)
    with pytest.raises(NonFiniteError, match=message):
        train(with_guard(config, **options), tmp_path)
    assert all(np.isfinite(x).all() for x in arrays(tmp_path))


def test_there_is_no_going_back_before_the_first_checkpoint(
    config, tmp_path, tamper_with_training_batches
):
    tamper_with_training_batches(lambda n, batch: spoilt(batch) if n == 5 else batch)
    with pytest.raises(NonFiniteError, match=r"step 5: .* There was no checkpoint yet"):
        train(with_guard(config, action="rollback"), tmp_path)


def test_the_guards_memory_is_part_of_a_checkpoint(config, tmp_path, tamper_with_training_batches):
    """Stopped after a refused update and resumed, a run is the same to the bit."""

    def spoil_some(number, batch):
        return nonsense(batch, number) if number in (18, 30) else batch

    def stop_at_20_too(number, batch):
        if number == 20:
            signal.raise_signal(signal.SIGTERM)
        return spoil_some(number, batch)

    config = with_guard(config, action="skip", spike_factor=1.5, memory=15)
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    tamper_with_training_batches(spoil_some)
    train(config, straight)
    counts = [line["refused"] for line in lines(straight)]
    assert (counts[19], counts[-1]) == (1, 2)  # one on each side of the stop
    tamper_with_training_batches(stop_at_20_too)
    assert train(config, halves).step == 20
    tamper_with_training_batches(lambda number, batch: spoil_some(20 + number, batch))
    train(config, halves)
    for name in ("loss", "refused", "step"):
        assert [line[name] for line in lines(halves)] == [line[name] for line in lines(straight)]
    for a, b in zip(arrays(halves), arrays(straight), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_guard_may_be_turned_on_when_a_run_is_resumed(
    config, tmp_path, tamper_with_training_batches
):
    tamper_with_training_batches(lambda n, batch: spoilt(batch) if n == 25 else batch)
    with pytest.raises(NonFiniteError, match="step 25"):
        train(config, tmp_path)
    tamper_with_training_batches(lambda n, batch: spoilt(batch) if n == 5 else batch)
    train(with_guard(config, action="skip"), tmp_path)
    assert [line.get("refused") for line in lines(tmp_path)] == [None] * 20 + [0] * 4 + [1] * 16
    train(dataclasses.replace(config, steps=50), tmp_path)  # and off again
    assert "refused" not in lines(tmp_path)[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"action": "ignore"}, r"guard.action must be one of stop, skip, rollback, got 'ignore'"),
        ({"spike_factor": 1.0}, r"guard.spike_factor must be > 1"),
        ({"memory": 0}, r"guard.memory must be >= 1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GuardConfig(**options)
