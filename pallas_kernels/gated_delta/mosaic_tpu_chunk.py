"""What the TPU kernels of the gated delta rule are made of: decays, products, and an inverse.

Notation and layout: pallas_kernels/gated_delta/mosaic_tpu_kernels.py.
"""

from collections.abc import Generator
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
# Rows of a register, and of the blocks on the diagonal that are inverted row by row.
_BLOCK = 8


def places(shape: tuple[int, int]) -> tuple[Array, Array]:
    """Row and column of each entry."""
    return tuple(lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))


def shift_down(x: Array, first: float) -> Array:
    """Move rows to the next place: row i is what row i - 1 was."""
    row, _ = places(x.shape)
    return jnp.where(row == 0, first, pltpu.roll(x, 1, 0))


def _products_down(x: Array) -> Array:
    """Products of each row with those before it, in log2 steps."""
    row, _ = places(x.shape)
    step = 1
    while step < x.shape[0]:
        if step < _BLOCK:
            x = x * jnp.where(row >= step, pltpu.roll(x, step, 0), 1.0)
        else:
            x = stack(x[:step], x[step:] * x[:-step])
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


def prepare(gates: Array, q: Array, k: Array) -> Generator[None, None, Chunk]:
    """Return what a chunk's gates [2, C], queries and keys [C, Dk] determine; for `in_turns`."""
    alpha, beta = (turn_row(gates[name : name + 1]) for name in (ALPHA, BETA))
    row, column = places((CHUNK, CHUNK))
    below = row > column
    decay = _products_down(jnp.where(below, alpha, 1.0))
    decay = jnp.where(row >= column, decay, 0.0)
    yield
    products = multiply_rows(stack(k, q), k)
    similarity, scores = products[:CHUNK], products[CHUNK:]
    lower = jnp.where(below, beta * similarity * decay, 0.0)
    inverse = yield from unit_lower_inverse(lower, k.dtype)
    return Chunk(
        decay,
        jnp.broadcast_to(decay[:, :1] * alpha[:1, :1], decay.shape),
        turn_row(decay[CHUNK - 1 :]),
        beta,
        similarity,
        scores,
        inverse,
    )


def unit_lower_inverse(lower: Array, dtype: jnp.dtype) -> Generator[None, None, Array]:
    """Return (I + lower)^-1 for a strictly lower triangular matrix [C, C]; for `in_turns`.

    Blocks on the diagonal are inverted by substitution, 8 rows each, side by side in one register.
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
        factor = jnp.take_along_axis(blocks, lane // _BLOCK * _BLOCK + i, axis=1)
        solved = solved - factor * solved[i : i + 1]
    yield
    inverse = jnp.concatenate([jnp.where(own(start), solved, 0.0) for start in starts], axis=0)

    half = _BLOCK
    while half < CHUNK:
        corners = (row // half % 2 == 1) & (column // half == row // half - 1)
        corners = jnp.where(corners, lower, 0.0)
        pieces = [inverse[start : start + half] for start in range(0, CHUNK, half)]
        second = stack(*pieces[1::2])
        change = product(parts(second, dtype), parts(corners, dtype), (1, 0))
        yield
        second = second - product(parts(change, dtype), parts(inverse, dtype), (1, 0))
        yield
        pieces[1::2] = [second[start : start + half] for start in range(0, CHUNK // 2, half)]
        inverse = stack(*pieces)
        half *= 2
    return inverse
