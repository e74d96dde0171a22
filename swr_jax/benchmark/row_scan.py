"""A row-by-row linear scan for TPUs in Pallas: what the block two-pass kernels are compared with.

The plain way to scan on a TPU, as kernels of gated linear recurrent units do it: time in sublanes,
features in lanes, one row after the other, the state in VMEM from tile to tile, float32 inside. One
kernel serves both directions; the gradient of the decays is left to XLA. It reads and writes what
the exact recurrence's kernels do: decays [B, T, H], inputs [B, T, H D] in lane order.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.swr.lane_order import LANES

Array = jax.Array

TILE = 256  # tokens of one grid step
ROWS = 16  # tokens in a loop's body: a packed register of bfloat16


def _kernel(a, u, x, decay, state, *, reverse: bool):
    """One tile: a [1, tile, lanes]; u, x [1, tile, features lanes]; state [1, features lanes]."""
    decay[...] = a[0].astype(jnp.float32)
    features = u.shape[2] // LANES

    @pl.when(pl.program_id(2) == 0)
    def _():
        state[...] = jnp.zeros_like(state)

    def rows(index: Array, h: Array) -> Array:
        if reverse:
            index = TILE // ROWS - 1 - index
        base = pl.multiple_of(index * ROWS, ROWS)
        values = u[0, pl.ds(base, ROWS), :].astype(jnp.float32)
        found = [None] * ROWS
        for row in reversed(range(ROWS)) if reverse else range(ROWS):
            row_decay = jnp.concatenate([decay[pl.ds(base + row, 1), :]] * features, axis=1)
            if reverse:  # The state that reaches a token is decayed by the token behind it.
                found[row] = values[row : row + 1] + h
                h = row_decay * found[row]
            else:
                h = found[row] = row_decay * h + values[row : row + 1]
        x[0, pl.ds(base, ROWS), :] = jnp.concatenate(found).astype(x.dtype)
        return h

    state[...] = lax.fori_loop(0, TILE // ROWS, rows, state[...])


def _scan(a: Array, u: Array, *, reverse: bool) -> Array:
    batch, time, heads = a.shape
    features = u.shape[2] // heads
    tiles = time // TILE

    def at(t):
        return tiles - 1 - t if reverse else t

    wide = pl.BlockSpec((1, TILE, features * LANES), lambda b, h, t: (b, at(t), h))
    return pl.pallas_call(
        functools.partial(_kernel, reverse=reverse),
        grid=(batch, heads // LANES, tiles),
        in_specs=[pl.BlockSpec((1, TILE, LANES), lambda b, h, t: (b, at(t), h)), wide],
        out_specs=wide,
        out_shape=jax.ShapeDtypeStruct(u.shape, u.dtype),
        scratch_shapes=[
            pltpu.VMEM((TILE, LANES), jnp.float32),
            pltpu.VMEM((1, features * LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        name="row_scan_reverse" if reverse else "row_scan",
    )(a, u)


@jax.custom_vjp
def row_scan(a: Array, u: Array) -> Array:
    """Exact linear recurrence x_i = a_i x_{i-1} + u_i, one row after the other.

    Args:
        a: decays [B, T, H], H a multiple of 128, T of 256.
        u: inputs [B, T, H D] in lane order.

    Returns:
        x [B, T, H D] in u's dtype.
    """
    return _scan(a, u, reverse=False)


def _forward(a, u):
    x = _scan(a, u, reverse=False)
    return x, (a, x)


def _backward(residuals, dx):
    a, x = residuals
    batch, time, heads = a.shape
    du = _scan(a, dx, reverse=True)
    before = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    products = du.astype(jnp.float32) * before.astype(jnp.float32)
    # Lane order: groups of heads, features, heads of a group.
    products = products.reshape(batch, time, heads // LANES, -1, LANES)
    return jnp.sum(products, axis=3).reshape(batch, time, heads).astype(a.dtype), du


row_scan.defvjp(_forward, _backward)
