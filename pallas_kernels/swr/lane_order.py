"""Lane order: the order of columns in which TPU kernels read [B, T, H D] as it lies in memory.

Columns are (H / 128 groups of heads, D features, 128 heads): the heads of a group stand side by
side in the lanes of a register. A projection to H D columns writes that order at no cost when the
columns of its matrix are in it, and no transposition is left around the recurrence.
"""

import jax

LANES = 128


def fits(heads: int) -> bool:
    """Whether so many heads fill whole groups."""
    return heads % LANES == 0


def to_lane_order(x: jax.Array) -> jax.Array:
    """[..., H, D] -> [..., H D]; H must be a multiple of 128."""
    *leading, heads, features = x.shape
    x = x.reshape(*leading, heads // LANES, LANES, features)
    return x.swapaxes(-1, -2).reshape(*leading, heads * features)


def from_lane_order(x: jax.Array, heads: int) -> jax.Array:
    """[..., H D] -> [..., H, D]: undo `to_lane_order`."""
    *leading, columns = x.shape
    x = x.reshape(*leading, heads // LANES, columns // heads, LANES)
    return x.swapaxes(-1, -2).reshape(*leading, heads, columns // heads)
