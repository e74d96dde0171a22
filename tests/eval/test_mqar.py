"""Multi-query associative recall: rows hold what the task says, against a plain reading of them."""

import itertools

import numpy as np
import pytest

from swr_jax.eval.mqar import (
    MQARConfig,
    accuracy_by_distance,
    mqar_batch,
    mqar_training_batch,
)

TASK = MQARConfig(vocab_size=96, sequence_length=128, pairs=16)


@pytest.mark.parametrize("random_filler", [False, True])
@pytest.mark.parametrize(("length", "pairs"), [(4, 1), (64, 16), (128, 5)])
def test_rows_read_as_pairs_then_each_key_once_more(length, pairs, random_filler):
    task = MQARConfig(
        vocab_size=41, sequence_length=length, pairs=pairs, random_filler=random_filler
    )
    batch = mqar_batch(task, batch_size=50, seed=0)
    for tokens, positions, answers, distances in zip(
        *(batch[name] for name in ("tokens", "query_positions", "answers", "distances")),
        strict=True,
    ):
        value_at = {int(tokens[2 * i]): 2 * i + 1 for i in range(pairs)}
        assert len(value_at) == pairs  # no key twice
        assert all(1 <= key < 20 for key in value_at)
        values = [int(tokens[at]) for at in value_at.values()]
        assert len(set(values)) == pairs
        assert all(20 <= value < 41 for value in values)
        asked = [int(tokens[p]) for p in positions]
        assert sorted(asked) == sorted(value_at)  # each key is asked for once
        assert list(positions) == sorted(set(positions))
        assert all(p >= 2 * pairs and p % 2 == 0 for p in positions)
        assert [int(a) for a in answers] == [int(tokens[value_at[key]]) for key in asked]
        assert list(distances) == [p - value_at[k] for p, k in zip(positions, asked, strict=True)]
        filler = np.delete(tokens, [*range(2 * pairs), *positions])
        if not random_filler:
            assert not filler.any()
    assert batch["tokens"].min() >= 0
    assert batch["tokens"].max() < 41


def test_random_filler_is_of_the_whole_vocabulary():
    batch = mqar_batch(TASK, batch_size=400, seed=1)
    filler = batch["tokens"][:, 33::2]  # queries stand at even places
    counts = np.bincount(filler.reshape(-1), minlength=96)
    expected = filler.size / 96
    assert ((counts - expected) ** 2 / expected).sum() < 160  # chi-square, 95 degrees of freedom


def test_every_key_and_value_turns_up_equally_often():
    batch = mqar_batch(TASK, batch_size=3000, seed=2)
    for column, choices in ((0, np.arange(1, 48)), (1, np.arange(48, 96))):
        counts = np.bincount(batch["tokens"][:, column:32:2].reshape(-1), minlength=96)
        assert counts.sum() == counts[choices].sum()
        np.testing.assert_allclose(counts[choices], 48_000 / len(choices), rtol=0.15)


def law_without_replacement(weights: np.ndarray, count: int) -> np.ndarray:
    """Probability that each slot is drawn first, second, …: [count, slots], all orders summed."""
    result = np.zeros((count, len(weights)))
    for order in itertools.permutations(range(len(weights)), count):
        probability, left = 1.0, weights.sum()
        for slot in order:
            probability *= weights[slot] / left
            left -= weights[slot]
        for turn, slot in enumerate(order):
            result[turn, slot] += probability
    return result


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_slots_follow_the_power_law_without_replacement(power):
    task = MQARConfig(vocab_size=64, sequence_length=18, pairs=3, power=power, random_filler=False)
    batch = mqar_batch(task, batch_size=40_000, seed=3)
    expected = law_without_replacement(np.arange(1.0, 7.0) ** (power - 1), 3)
    keys = batch["tokens"][:, 0:6:2]
    for turn in range(3):  # the keys take their slots in turn
        asked = batch["tokens"][:, 6:] == keys[:, turn : turn + 1]
        share = asked[:, 0::2].mean(axis=0)
        assert not asked[:, 1::2].any()
        np.testing.assert_allclose(share, expected[turn], atol=0.01)


def test_a_seed_names_a_batch():
    first, again, other = (
        mqar_batch(TASK, batch_size=4, seed=seed) for seed in [(5, 1), (5, 1), (5, 2)]
    )
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["tokens"], other["tokens"])


def test_training_rows_hold_whole_tasks_and_ask_only_at_queries():
    tasks = [
        MQARConfig(vocab_size=32, sequence_length=length, pairs=2, random_filler=False)
        for length in (8, 32, 16)
    ]
    batch = mqar_training_batch(tasks, row_length=32, seed=(7, 3))
    assert {name: value.shape for name, value in batch.items()} == dict.fromkeys(batch, (3, 32))
    for row, task in enumerate(tasks):
        length = task.sequence_length
        segments = batch["segment_ids"][row]
        assert list(segments) == [1 + t // length for t in range(32)]
        assert list(batch["positions"][row]) == [t % length for t in range(32)]
        for segment in range(1, 1 + 32 // length):
            tokens, targets, weights = (
                batch[name][row][segments == segment]
                for name in ("tokens", "targets", "loss_weights")
            )
            value_of = {tokens[0]: tokens[1], tokens[2]: tokens[3]}
            queries = [t for t in range(4, length) if tokens[t]]
            assert list(np.flatnonzero(weights)) == queries
            assert set(weights) <= {0.0, 1.0}
            assert [targets[t] for t in queries] == [value_of[tokens[t]] for t in queries]
            assert len(queries) == 2


def test_training_rows_do_not_repeat_each_other():
    batch = mqar_training_batch([TASK, TASK], row_length=256, seed=(1, 1))
    draws = batch["tokens"].reshape(4, 128)
    assert len({draw.tobytes() for draw in draws}) == 4


def test_accuracy_is_counted_by_distance():
    correct = np.array([[True, False, True], [True, True, False]])
    distances = np.array([[1, 4, 4], [7, 8, 40]])
    ranges = accuracy_by_distance(correct, distances, edges=[1, 4, 8, 16, 32])
    assert [(r["from"], r["to"], r["queries"]) for r in ranges] == [
        (1, 3, 1),
        (4, 7, 3),
        (8, 15, 1),
        (16, 31, 0),
    ]
    assert [r["accuracy"] for r in ranges[:3]] == [1.0, pytest.approx(2 / 3), 1.0]
    assert np.isnan(ranges[3]["accuracy"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": 0}, "pairs=0"),
        ({"sequence_length": 62}, "sequence_length=62; it must be even and at least 4 .* = 64"),
        ({"sequence_length": 127}, "sequence_length=127; it must be even"),
        ({"vocab_size": 33}, "vocab_size=33 has 15 keys.* at least 34"),
        ({"power": 0.0}, "power=0.0; it must be above 0"),
    ],
)
def test_impossible_tasks_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MQARConfig(**{"vocab_size": 96, "sequence_length": 128, "pairs": 16} | changes)


def test_tasks_that_do_not_fill_a_row_are_refused():
    tasks = [MQARConfig(sequence_length=64), MQARConfig(sequence_length=128)]
    with pytest.raises(ValueError, match="sequence_length=128 of row 1 does not divide"):
        mqar_training_batch(tasks, row_length=192, seed=(0,))
