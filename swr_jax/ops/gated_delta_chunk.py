"""Chunkwise evaluation of the gated delta rule in plain JAX (`implementation="xla"`).

Notation, C tokens to a chunk:

    H           state before the chunk, [Dk, Dv]: the transpose of the paper's S
    L           decay matrix, L_ij = alpha_i alpha_{i-1} ... alpha_{j+1}, 1 on the diagonal, 0 above
    g, r        prefix products alpha_1 ... alpha_i of the chunk; last row of L
    M           strictly lower part of diag(beta) (K K^T * L)
    U           what each token really writes, beta_i (v_i - alpha_i H_{i-1}^T k_i), [C, Dv]

The rule is H_i = alpha_i H_{i-1} + k_i u_i^T. Unrolled over a chunk, u_i depends linearly on the
u_j before it, (I + M) U = diag(beta) (V - diag(g) K H), and the rest are matrix products:

    O  = diag(g) Q H + (Q K^T * L) U
    H' = g_C H + K^T diag(r) U

This is the WY representation of arXiv 2412.06464 with the state kept inside the brackets, which
saves the second solve for K. Nothing divides by a decay or takes its logarithm: alpha = 0 is exact,
in value and in gradient.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

# Matrices up to this size are inverted level by level at full size; larger ones by halves.
_SMALL = 8


def gated_delta_rule(
    q: Array | None,
    k: Array,
    v: Array,
    alpha: Array,
    beta: Array,
    state: Array,
    *,
    chunk: int,
    group: int,
) -> tuple[Array | None, Array]:
    """Return outputs and last state, one group of chunks after the other.

    The backward pass keeps the state before each group and computes the rest anew.

    Args:
        q, k: [B, T, H, Dk]; without q there are no outputs.
        v: [B, T, H, Dv].
        alpha, beta: [B, T, H], resets already in alpha.
        state: [B, H, Dk, Dv]; its dtype is that of the maths.
        chunk: tokens in a chunk, a power of two.
        group: chunks, at most, that are prepared together: what does not need the state is done
            for all of them at once, which keeps wide devices busy but leaves a cache sooner.

    Returns:
        o [B, T, H, Dv] in v's dtype, None without q, and the state after the last token in that of
        the maths.
    """
    batch, time, heads = alpha.shape
    chunks = -(-time // chunk)
    groups = -(-chunks // group)
    group = -(-chunks // groups)
    # Inputs of 16 bits gain nothing from products that are exact to 24.
    exact = max(x.dtype.itemsize for x in jax.tree.leaves((q, k, v))) > 2
    precision = lax.Precision.HIGHEST if exact else lax.Precision.HIGH

    def cut(x: Array, fill: float = 0.0) -> Array:
        """[B, T, H, ...] -> [groups, group, B, H, C, ...]; padding hands the state on as it is."""
        pad = [(0, groups * group * chunk - time if axis == 1 else 0) for axis in range(x.ndim)]
        x = jnp.pad(x, pad, constant_values=fill)
        x = x.reshape(batch, groups, group, chunk, *x.shape[2:])
        return jnp.moveaxis(x, (1, 2, 4), (0, 1, 3))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(state: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        inputs = jax.tree.map(lambda x: x.astype(state.dtype), inputs)
        state, o = _group(state, *inputs, precision)
        return state, None if q is None else o.astype(v.dtype)

    inputs = (None if q is None else cut(q), cut(k), cut(v), cut(alpha, 1.0), cut(beta))
    state, o = lax.scan(body, state, inputs)
    if q is None:
        return None, state
    o = jnp.moveaxis(o, (0, 1, 3), (1, 2, 4)).reshape(batch, -1, heads, v.shape[-1])
    return o[:, :time], state


def _group(
    state: Array,
    q: Array | None,
    k: Array,
    v: Array,
    alpha: Array,
    beta: Array,
    precision: lax.Precision,
) -> tuple[Array, Array | None]:
    """Return the state after a group of chunks, and its outputs; arrays [group, B, H, C, ...]."""
    product = functools.partial(jnp.matmul, precision=precision)
    decay = decay_matrix(alpha)
    prefix = (alpha[..., :1] * decay[..., 0])[..., None]
    beta = beta[..., None]
    keys = jnp.swapaxes(k, -1, -2)
    inverse = unit_lower_inverse(jnp.tril(beta * product(k, keys) * decay, -1), precision)
    # What reads the state: keys and queries in one product.
    readers = [beta * prefix * k] if q is None else [beta * prefix * k, prefix * q]
    kinds = len(readers)
    readers = jnp.concatenate(readers, axis=-2)
    writers = keys * decay[..., -1:, :]

    def across(state: Array, inputs: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        readers, v, inverse, writers, whole = inputs
        by_keys, *by_queries = jnp.split(product(readers, state), kinds, axis=-2)
        written = product(inverse, v - by_keys)
        return whole * state + product(writers, written), (by_queries, written)

    inputs = (readers, beta * v, inverse, writers, prefix[..., -1:, :])
    state, (by_queries, written) = lax.scan(across, state, inputs)
    if q is None:
        return state, None
    return state, by_queries[0] + product(product(q, keys) * decay, written)


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
