"""Multi-query associative recall (arXiv 2312.04927): pairs first, then each key once more.

Notation: B rows, T tokens per row, P pairs per row, V size of the vocabulary. A row is

    k_1 v_1 k_2 v_2 … k_P v_P | filler and, at positions 2P + 2 g_i, the keys k_i again

Keys are distinct and from [1, V/2), values are distinct and from [V/2, V). The slots g_i are
distinct, drawn in turn with probability proportional to (g + 1) ** (power - 1), for g from 0 to
T/2 - P - 1. After a key's second occurrence the model has to name its value; that value is not
shown, the next token is filler like any other.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class MQARConfig:
    """Shape and difficulty of the task.

    sequence_length: T, even and at least 4 · pairs. power: exponent `a` of the law of the slots;
    1 is uniform, near 0 most queries come soon after the pairs. random_filler: filler is drawn
    from the whole vocabulary, so keys and values turn up in it by chance; else it is token 0.

    Raises:
        ValueError: values out of range or that do not fit together.
    """

    vocab_size: int = 8192
    sequence_length: int = 64
    pairs: int = 4
    power: float = 0.01
    random_filler: bool = True

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise ValueError(f"pairs={self.pairs}; it must be at least 1")
        if self.sequence_length % 2 or self.sequence_length < 4 * self.pairs:
            raise ValueError(
                f"sequence_length={self.sequence_length}; it must be even and at least 4 * pairs "
                f"= {4 * self.pairs}: two tokens for each pair, and for each query"
            )
        if self.vocab_size // 2 - 1 < self.pairs:
            raise ValueError(
                f"vocab_size={self.vocab_size} has {max(self.vocab_size // 2 - 1, 0)} keys, fewer "
                f"than pairs={self.pairs}; it must be at least {2 * self.pairs + 2}"
            )
        if self.power <= 0:
            raise ValueError(f"power={self.power}; it must be above 0, and 1 for uniform slots")

    @property
    def chance(self) -> float:
        """Accuracy of naming one of the row's own values blindly: 1 / pairs."""
        return 1 / self.pairs


def mqar_batch(
    config: MQARConfig, *, batch_size: int, seed: int | Sequence[int]
) -> dict[str, np.ndarray]:
    """Draw rows of the task; the same for the same arguments, on every machine.

    Args:
        config: the task.
        batch_size: rows B.
        seed: of NumPy's generator; a sequence such as (seed, step) names a batch of a run.

    Returns:
        tokens [B, T] int32. For query p of each row, in the order of the row: query_positions
        [B, P] int32, where the key stands for the second time; answers [B, P] int32, its value;
        distances [B, P] int32, tokens from that value back among the pairs to the query, at least
        1. A window of more than `distance` tokens, the query's own included, holds the value.
    """
    rng = np.random.default_rng(seed)
    count, half, context = config.pairs, config.vocab_size // 2, 2 * config.pairs
    slots = (config.sequence_length - context) // 2

    def distinct(choices: int, log_weights: np.ndarray | float = 0.0) -> np.ndarray:
        # The largest of logarithms of weights plus Gumbel noise are drawn like balls from an urn,
        # without replacement.
        noisy = rng.gumbel(size=(batch_size, choices)) + log_weights
        return np.argsort(-noisy, axis=1)[:, :count].astype(np.int32)

    keys = 1 + distinct(half - 1)
    values = half + distinct(config.vocab_size - half)
    gaps = distinct(slots, (config.power - 1) * np.log(np.arange(1, slots + 1)))
    query_positions = context + 2 * gaps
    distances = query_positions - (2 * np.arange(count, dtype=np.int32) + 1)

    tokens = np.zeros((batch_size, config.sequence_length), np.int32)
    if config.random_filler:
        tokens[:] = rng.integers(config.vocab_size, size=tokens.shape)
    tokens[:, 0:context:2] = keys
    tokens[:, 1:context:2] = values
    np.put_along_axis(tokens, query_positions, keys, axis=1)

    order = np.argsort(query_positions, axis=1)
    per_query = {"query_positions": query_positions, "answers": values, "distances": distances}
    return {"tokens": tokens} | {
        name: np.take_along_axis(x, order, axis=1) for name, x in per_query.items()
    }


def mqar_training_batch(
    tasks: Sequence[MQARConfig], *, row_length: int, seed: Sequence[int]
) -> dict[str, np.ndarray]:
    """Fill each row with as many independent draws of one task as it has room for.

    Args:
        tasks: the task of each row; each `sequence_length` divides `row_length`.
        row_length: tokens per row.
        seed: names the batch, as for `mqar_batch`; each row adds its number.

    Returns:
        What a training step takes, all [rows, row_length]: tokens, targets (the value, at queried
        positions), segment_ids (the draws of a row, from 1), positions (within a draw) and
        target_bytes (0: no text), int32; loss_weights float32, 1 at queried positions and else 0.

    Raises:
        ValueError: a length that does not divide `row_length`.
    """
    rows = []
    for number, task in enumerate(tasks):
        length = task.sequence_length
        if row_length % length:
            raise ValueError(
                f"sequence_length={length} of row {number} does not divide row_length={row_length};"
                " choose lengths that fill the rows"
            )
        count = row_length // length
        drawn = mqar_batch(task, batch_size=count, seed=(*seed, number))
        shape = (count, length)
        targets, weights = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        np.put_along_axis(targets, drawn["query_positions"], drawn["answers"], axis=1)
        np.put_along_axis(weights, drawn["query_positions"], np.float32(1), axis=1)
        columns, draws = np.arange(length, dtype=np.int32), np.arange(count, dtype=np.int32)
        rows.append(
            {
                "tokens": drawn["tokens"],
                "targets": targets,
                "segment_ids": np.broadcast_to(1 + draws[:, None], shape),
                "positions": np.broadcast_to(columns, shape),
                "target_bytes": np.zeros(shape, np.int32),
                "loss_weights": weights,
            }
        )
    return {name: np.stack([row[name].reshape(-1) for row in rows]) for name in rows[0]}


def accuracy_by_distance(
    correct: np.ndarray, distances: np.ndarray, *, edges: Sequence[int]
) -> list[dict[str, float]]:
    """Share of correct answers among the queries of each range of distances.

    Args:
        correct: any shape, true where the answer was right.
        distances: of the same shape, as `mqar_batch` gives them.
        edges: increasing; range i holds distances in [edges[i], edges[i + 1]).

    Returns:
        For each range: `from` and `to` (the last distance in it), `queries`, their number, and
        `accuracy`, NaN if there are none.
    """
    ranges = []
    for low, high in itertools.pairwise(edges):
        inside = (distances >= low) & (distances < high)
        count = int(inside.sum())
        accuracy = float(correct[inside].mean()) if count else float("nan")
        ranges.append({"from": low, "to": high - 1, "queries": count, "accuracy": accuracy})
    return ranges
