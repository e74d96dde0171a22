"""What the TPU kernels of the gated delta rule are made of: decays, products, and an inverse.

Notation and layout: pallas_kernels/gated_delta/mosaic_tpu_kernels.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.arithmetic import as_float, dot, multiply_rows, stack, turn_row
from pallas_kernels.tpu.chip import LANES

Array = jax.Array

# Tokens of a chunk, and rows of `gates`.
CHUNK = LANES
ALPHA, BETA = range(2)
# Blocks on the diagonal that are inverted row by row, all of them side by side.
_BLOCK = 16


def places(shape: tuple[int, int]) -> tuple[Array, Array]:
    """Row and column of each entry."""
    return tuple(lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))


def shift_down(x: Array, first: float) -> Array:
    """Move rows to the next place: row i is what row i - 1 was."""
    row, _ = places(x.shape)
    return jnp.where(row == 0, first, pltpu.roll(x, 1, 0))


def _shift_up(x: Array, last: float) -> Array:
    row, _ = places(x.shape)
    size = x.shape[0]
    return jnp.where(row == size - 1, last, pltpu.roll(x, size - 1, 0))


def _products(x: Array, *, upwards: bool) -> Array:
    """Products of each row with those before it, or after it, in log2 steps."""
    row, _ = places(x.shape)
    size, step = x.shape[0], 1
    while step < size:
        moved = pltpu.roll(x, size - step if upwards else step, 0)
        x = x * jnp.where(row < size - step if upwards else row >= step, moved, 1.0)
        step *= 2
    return x


class Parts(NamedTuple):
    """A float32 matrix as the sum of two of 16 bits."""

    high: Array
    low: Array


def product(x: Array | Parts, y: Array | Parts, contract: tuple[int, int]) -> Array:
    """Product of matrices over an axis of each, in float32.

    Inputs of 16 bits are used as they are. What is computed from them, in float32, is given as
    `Parts`, and its products are exact to about 16 bits: rounded to bfloat16, it would be too
    coarse where what a state predicts is taken off what is to be written. Where inputs are float32
    all is given as arrays, and products are exact to 24 bits.
    """
    if isinstance(x, Parts) and isinstance(y, Parts):
        x, y = (x.high, x.high, x.low), (y.high, y.low, y.high)
    elif isinstance(x, Parts):
        y = (y, y)
    elif isinstance(y, Parts):
        x = (x, x)
    else:
        return dot(x, y, contract)
    x, y = (jnp.concatenate(z, axis=axis) for z, axis in zip((x, y), contract, strict=True))
    return dot(x, y, contract)


def parts(x: Array, dtype: jnp.dtype) -> Array | Parts:
    """Part a float32 matrix as `product` takes it beside inputs of a dtype."""
    if dtype == jnp.float32:
        return x
    high = x.astype(dtype)
    return Parts(high, (x - as_float(high)).astype(dtype))


class Chunk(NamedTuple):
    """What does not depend on the state before a chunk of C tokens.

    Attributes:
        decay: L [C, C].
        prefix, suffix, beta: g, r and beta, in rows, alike in all lanes, [C, 128].
        similarity, scores: K K^T and Q K^T, [C, C].
        inverse: (I + M)^-1, [C, C].
    """

    decay: Array
    prefix: Array
    suffix: Array
    beta: Array
    similarity: Array
    scores: Array
    inverse: Array


def prepare(gates: Array, q: Array, k: Array) -> Chunk:
    """Return what a chunk's gates [2, C], queries and keys [C, Dk] determine."""
    alpha, beta = (turn_row(gates[name : name + 1]) for name in (ALPHA, BETA))
    row, column = places((CHUNK, CHUNK))
    below = row > column
    decay = _products(jnp.where(below, alpha, 1.0), upwards=False)
    decay = jnp.where(row >= column, decay, 0.0)
    products = multiply_rows(stack(k, q), k)
    similarity, scores = products[:CHUNK], products[CHUNK:]
    lower = jnp.where(below, beta * similarity * decay, 0.0)
    return Chunk(
        decay,
        _products(alpha, upwards=False),
        _products(_shift_up(alpha, 1.0), upwards=True),
        beta,
        similarity,
        scores,
        unit_lower_inverse(lower, k.dtype),
    )


def unit_lower_inverse(lower: Array, dtype: jnp.dtype) -> Array:
    """Return (I + lower)^-1 for a strictly lower triangular matrix [C, C].

    Blocks on the diagonal are inverted by substitution, 16 rows each, side by side in 128 lanes.
    Then two halves E, G of a block with the corner F below E have the inverse
    [[E^-1, 0], [-G^-1 F E^-1, G^-1]]. Nothing is larger than the inverse itself, whereas powers of
    `lower` may be.

    Args:
        lower: float32.
        dtype: of the inputs, which says how finely products are needed.
    """
    row, column = places(lower.shape)
    inner_row, lane = places((_BLOCK, CHUNK))
    starts = range(0, CHUNK, _BLOCK)

    def own(start: int) -> Array:
        return lane // _BLOCK == start // _BLOCK

    blocks = sum(jnp.where(own(start), lower[start : start + _BLOCK], 0.0) for start in starts)
    solved = jnp.where(inner_row == lane % _BLOCK, 1.0, 0.0)
    for i in range(_BLOCK - 1):
        factor = _spread_lane(jnp.where(lane % _BLOCK == i, blocks, 0.0), i)
        solved = solved - factor * solved[i : i + 1]
    inverse = jnp.concatenate([jnp.where(own(start), solved, 0.0) for start in starts], axis=0)

    half = _BLOCK
    while half < CHUNK:
        corners = (row // half % 2 == 1) & (column // half == row // half - 1)
        corners = jnp.where(corners, lower, 0.0)
        pieces = [inverse[start : start + half] for start in range(0, CHUNK, half)]
        second = stack(*pieces[1::2])
        change = product(parts(second, dtype), parts(corners, dtype), (1, 0))
        second = second - product(parts(change, dtype), parts(inverse, dtype), (1, 0))
        pieces[1::2] = [second[start : start + half] for start in range(0, CHUNK // 2, half)]
        inverse = stack(*pieces)
        half *= 2
    return inverse


def _spread_lane(x: Array, lane: int) -> Array:
    """Copy the only lane of each block of lanes that is not 0 to the whole block."""
    if lane:
        x = pltpu.roll(x, CHUNK - lane, 1)
    step = 1
    while step < _BLOCK:
        x = x + pltpu.roll(x, step, 1)
        step *= 2
    return x
