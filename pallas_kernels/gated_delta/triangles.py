"""Triangular matrices of the tokens of a chunk, in plain JAX: products of decays, an inverse."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

# Matrices up to this size are inverted level by level at full size; larger ones by halves.
_SMALL = 8


@jax.custom_jvp
def decay_matrix(alpha: Array) -> Array:
    """Return L [..., C, C] of decays [..., C]: products of neighbours, never a quotient of two."""
    size = alpha.shape[-1]
    factors = jnp.where(jnp.tri(size, k=-1, dtype=bool), alpha[..., None], 1)
    return jnp.tril(lax.cumprod(factors, axis=factors.ndim - 2))


@decay_matrix.defjvp
def _(primals, tangents):
    # L = (I - AZ)^-1, Z the down-shift, hence dL = L (dA Z L).
    (alpha,), (alpha_dot,) = primals, tangents
    decay = decay_matrix(alpha)
    before = jnp.pad(decay[..., :-1, :], [(0, 0)] * (decay.ndim - 2) + [(1, 0), (0, 0)])
    change = alpha_dot[..., None] * before
    return decay, jnp.matmul(decay, change, precision=lax.Precision.HIGHEST)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def unit_lower_inverse(lower: Array, precision: lax.Precision) -> Array:
    """Return (I + lower)^-1 for strictly lower triangular matrices [..., C, C], C a power of two.

    Two halves A, D on the diagonal and the corner B below A have the inverse
    [[A^-1, 0], [-D^-1 B A^-1, D^-1]]: nothing is larger than the inverse itself, whereas powers of
    `lower` may be.
    """
    size = lower.shape[-1]
    if size <= _SMALL:
        return _small_inverse(lower, precision)
    half = size // 2
    halves = jnp.stack([lower[..., :half, :half], lower[..., half:, half:]])
    first, second = unit_lower_inverse(halves, precision)
    product = functools.partial(jnp.matmul, precision=precision)
    corner = -product(product(second, lower[..., half:, :half]), first)
    return jnp.block([[first, jnp.zeros_like(corner)], [corner, second]])


def _small_inverse(lower: Array, precision: lax.Precision) -> Array:
    """The same from 1 x 1 blocks up, all the blocks of a level in one product."""
    size = lower.shape[-1]
    row = jnp.arange(size)

    def corners(rows: int) -> Array:
        """What lies below the first of each pair of blocks, and left of the second."""
        second = row // rows % 2 == 1
        pair = row // (2 * rows)
        return jnp.where(second[:, None] & ~second & (pair[:, None] == pair), lower, 0)

    inverse = jnp.eye(size, dtype=lower.dtype) - corners(1)
    rows = 2
    while rows < size:
        product = jnp.matmul(inverse, corners(rows), precision=precision)
        inverse = inverse - jnp.matmul(product, inverse, precision=precision)
        rows *= 2
    return inverse


@unit_lower_inverse.defjvp
def _(precision, primals, tangents):
    (lower,), (lower_dot,) = primals, tangents
    inverse = unit_lower_inverse(lower, precision)
    change = jnp.matmul(inverse, lower_dot, precision=precision)
    return inverse, -jnp.matmul(change, inverse, precision=precision)
