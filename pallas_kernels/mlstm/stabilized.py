"""Small pieces of every stabilized mLSTM, in kernels or not: sums of gates, maxima, states."""

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

# exp(-m) goes no lower: a denominator that small is rounding error, and dividing by it an overflow.
_LOWEST_LOG_FLOOR = -60.0


def lower_bound(m: Array) -> Array:
    """Return what |d| is divided by at least, exp(-m)."""
    return jnp.exp(jnp.maximum(-m, _LOWEST_LOG_FLOOR))


def finite(m: Array) -> Array:
    """Stabilizer to subtract: 0 instead of the -inf of a sequence that has not begun."""
    return jnp.where(jnp.isneginf(m), 0, m)


def shift(x: Array, step: int, fill: float = 0, axis: int = -1) -> Array:
    """Move numbers along an axis, onwards or (`step` negative) backwards; `fill` takes their place.

    One operation that XLA fuses with what follows, as it does not a roll, on TPUs.
    """
    moved = [(0, 0, 0)] * x.ndim
    moved[axis] = (step, -step, 0)
    return lax.pad(x, jnp.asarray(fill, x.dtype), moved)


def sum_after(x: Array, axis: int = -1) -> Array:
    """Sum over the tokens after each, its own not included.

    Shifted, not sum minus own term: a difference would round what is left, and its transpose.
    """
    return lax.cumsum(shift(x, -1, axis=axis), axis=axis % x.ndim, reverse=True)


def last_maximum(x: Array) -> Array:
    """One-hot of the last maximum along the last axis."""
    length = x.shape[-1]
    index = length - 1 - jnp.argmax(x[..., ::-1], axis=-1)
    return jax.nn.one_hot(index, length, dtype=x.dtype)


def inner(x: tuple[Array, Array, Array], y: tuple[Array, Array, Array]) -> Array:
    """<C_x, C_y> + <n_x, n_y> of states (C, n, m), [B, H]."""
    return jnp.sum(x[0] * y[0], axis=(-2, -1)) + jnp.sum(x[1] * y[1], axis=-1)
