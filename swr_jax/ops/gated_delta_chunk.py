"""Chunkwise evaluation of the gated delta rule in plain JAX (`implementation="xla"`).

Notation; every array has the axes [B, H, C, ...], C tokens of one chunk:

    H           state before the chunk, [Dk, Dv]: the transpose of the paper's S
    L           decay matrix, L_ij = alpha_i alpha_{i-1} ... alpha_{j+1}, 1 on the diagonal, 0 above
    g, r        prefix products alpha_1 ... alpha_i of the chunk; last row of L
    M           strictly lower part of diag(beta) (K K^T * L)
    U           what each token really writes, beta_i (v_i - alpha_i H_{i-1}^T k_i), [C, Dv]

The rule is H_i = alpha_i H_{i-1} + k_i u_i^T. Unrolled over a chunk, u_i depends linearly on the
u_j before it, (I + M) U = diag(beta) (V - diag(g) K H), and the rest are matrix products:

    O  = diag(g) Q H + (Q K^T * L) U
    H' = g_C H + K^T diag(r) U

This is the WY representation of arXiv 2412.06464, with the state kept inside the brackets instead
of a second solve for K. Nothing divides by a decay or takes its logarithm: alpha = 0 is exact, in
value and in gradient.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def gated_delta_rule(
    q: Array, k: Array, v: Array, alpha: Array, beta: Array, state: Array, *, chunk: int
) -> tuple[Array, Array]:
    """Return outputs and last state, one chunk after the other.

    The backward pass keeps the state before each chunk and computes the rest anew.

    Args:
        q, k: [B, T, H, Dk].
        v: [B, T, H, Dv].
        alpha, beta: [B, T, H], resets already in alpha.
        state: [B, H, Dk, Dv]; its dtype is that of the maths.
        chunk: tokens in a chunk, a power of two.

    Returns:
        o [B, T, H, Dv] in v's dtype, and the state after the last token in that of the maths.
    """
    batch, time, heads = alpha.shape
    # In float32, all of it; what was rounded to fewer bits before gains nothing from more passes.
    exact = v.dtype.itemsize >= 4
    precision = lax.Precision.HIGHEST if exact else lax.Precision.HIGH

    def chunks(x: Array, fill: float = 0.0) -> Array:
        """[B, T, H, ...] -> [n, B, H, C, ...]; padding hands the state on unchanged."""
        pad = [(0, 0)] * x.ndim
        pad[1] = (0, -time % chunk)
        x = jnp.pad(x, pad, constant_values=fill)
        x = x.reshape(batch, -1, chunk, *x.shape[2:])
        return jnp.moveaxis(x, (1, 3), (0, 2))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(state: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        inputs = (x.astype(state.dtype) for x in inputs)
        state, o = _chunk(state, *inputs, precision)
        return state, o.astype(v.dtype)

    inputs = (chunks(q), chunks(k), chunks(v), chunks(alpha, 1.0), chunks(beta))
    state, o = lax.scan(body, state, inputs)
    o = jnp.moveaxis(o, (0, 2), (1, 3)).reshape(batch, -1, heads, v.shape[-1])
    return o[:, :time], state


def _chunk(
    state: Array,
    q: Array,
    k: Array,
    v: Array,
    alpha: Array,
    beta: Array,
    precision: lax.Precision,
) -> tuple[Array, Array]:
    """Return the state after one chunk, and its outputs."""
    product = functools.partial(jnp.matmul, precision=precision)
    decay = decay_matrix(alpha)
    prefix = (alpha[..., :1] * decay[..., 0])[..., None]
    beta = beta[..., None]
    keys = jnp.swapaxes(k, -1, -2)
    system = jnp.tril(beta * product(k, keys) * decay, -1)
    written = beta * (v - prefix * product(k, state))
    written = product(unit_lower_inverse(system, precision), written)
    o = prefix * product(q, state) + product(product(q, keys) * decay, written)
    state = prefix[..., -1:, :] * state + product(keys * decay[..., -1:, :], written)
    return state, o


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

    Blocks of 1, 2, 4, ... rows are inverted in turn: a pair of neighbours A, D with the corner B
    below A has the inverse [[A^-1, 0], [-D^-1 B A^-1, D^-1]].
    """
    size = lower.shape[-1]
    row = jnp.arange(size)
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=lower.dtype), lower.shape)
    rows = 1
    while rows < size:
        pair = row // (2 * rows)
        second = row // rows % 2 == 1
        corner = (pair[:, None] == pair) & second[:, None] & ~second
        product = jnp.matmul(inverse, jnp.where(corner, lower, 0), precision=precision)
        inverse = inverse - jnp.matmul(product, inverse, precision=precision)
        rows *= 2
    return inverse


@unit_lower_inverse.defjvp
def _(precision, primals, tangents):
    (lower,), (lower_dot,) = primals, tangents
    inverse = unit_lower_inverse(lower, precision)
    change = jnp.matmul(inverse, lower_dot, precision=precision)
    return inverse, -jnp.matmul(change, inverse, precision=precision)
