"""Batches for tests of the training step."""

import numpy as np

VOCAB = 264


def random_batch(batch_size: int, length: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Noise with uneven weights from row to row, and two documents in every second row."""
    rng = np.random.default_rng(seed)
    shape = (batch_size, length)
    columns = np.tile(np.arange(length, dtype=np.int32), (batch_size, 1))
    second = (columns >= length // 3) & (np.arange(batch_size) % 2 == 0)[:, None]
    weighted = rng.random(shape) < np.linspace(0.1, 0.9, batch_size)[:, None]
    return {
        "tokens": rng.integers(0, VOCAB, shape).astype(np.int32),
        "targets": rng.integers(0, VOCAB, shape).astype(np.int32),
        "segment_ids": 1 + second.astype(np.int32),
        "positions": columns - np.where(second, length // 3, 0).astype(np.int32),
        "loss_weights": weighted.astype(np.float32),
        "target_bytes": rng.integers(0, 4, shape).astype(np.int32),
    }
