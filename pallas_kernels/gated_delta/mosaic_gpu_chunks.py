"""What chunks of the gated delta rule are before and after the walks over them, in plain JAX.

Notation, C tokens to a chunk, with H the state before it, [Dk, Dv]:

    L           decay matrix, L_ij = alpha_i ... alpha_{j+1}, 1 on the diagonal, 0 above
    g, r        prefix products alpha_1 ... alpha_i of the chunk; last row of L
    M           strictly lower part of diag(beta) (K K^T * L)
    X           (I + M)^-1
    P           Q K^T * L
    E, U        beta (V - g K H), and X E: what each token writes

The walks have the sums over Dk, and over tokens; here are the cotangents that sum over Dv, all
chunks at once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gated_delta.triangles import decay_matrix, unit_lower_inverse

Array = jax.Array


class Chunks(NamedTuple):
    """Of every chunk what depends on keys, queries and gates alone, float32.

    Attributes:
        lower: M [B, H, N, C, C].
        scores: P, likewise.
        numbers: g, beta and r, [B, H, N, 3, C].
        carry: g_C, [B, H, N].
    """

    lower: Array
    scores: Array
    numbers: Array
    carry: Array


def by_chunk(x: Array, chunk: int) -> Array:
    """[B, T, H, ...] -> [B, H, N, C, ...]."""
    x = x.reshape(x.shape[0], -1, chunk, *x.shape[2:])
    return jnp.moveaxis(x, 3, 1)


def by_token(x: Array) -> Array:
    """Undo `by_chunk`."""
    x = jnp.moveaxis(x, 1, 3)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def prepare(q: Array, k: Array, alpha: Array, beta: Array) -> Chunks:
    """Return what the walks need, from [B, H, N, C, Dk] and [B, H, N, C], float32."""
    decay = decay_matrix(alpha)
    prefix = alpha[..., :1] * decay[..., 0]
    lower = jnp.tril(beta[..., None] * _sum("ik,jk->ij", k, k) * decay, -1)
    numbers = jnp.stack([prefix, beta, decay[..., -1, :]], axis=-2)
    return Chunks(lower, _sum("ik,jk->ij", q, k) * decay, numbers, prefix[..., -1])


def inverse(chunks: Chunks) -> Array:
    """Return X."""
    return unit_lower_inverse(chunks.lower, lax.Precision.HIGHEST)


def gradient(
    chunks: Chunks,
    q: Array,
    k: Array,
    v: Array,
    do: Array,
    states: Array,
    dstates: Array,
    written: Array,
    derrors: Array,
) -> tuple[Array, Array, Chunks]:
    """Return the cotangents of Q and K as the walk reads them, and of `chunks`.

    Args:
        chunks: of `prepare`.
        q, k: [B, H, N, C, Dk].
        v, do: [B, H, N, C, Dv].
        states, dstates: H^T before every chunk, and its cotangent after, [B, H, N, Dv, Dk].
        written, derrors: U^T, and the cotangent of E^T, [B, H, N, Dv, C].
    """
    read, write, left = (chunks.numbers[..., name, :, None] for name in range(3))
    recalled = _sum("vc,vk->ck", derrors, states)
    remembered = _sum("vc,vk->ck", written, dstates)
    asked = _sum("cv,vk->ck", do, states)
    dread = jnp.sum(q * asked - write * k * recalled, axis=-1)
    dwrite = jnp.sum(v * jnp.swapaxes(derrors, -1, -2), axis=-1)
    dwrite -= jnp.sum(read * k * recalled, axis=-1)
    dleft = jnp.sum(k * remembered, axis=-1)
    dchunks = Chunks(
        lower=-jnp.tril(_sum("vi,vj->ij", derrors, written), -1),
        scores=jnp.tril(_sum("iv,vj->ij", do, written)),
        numbers=jnp.stack([dread, dwrite, dleft], axis=-2),
        carry=jnp.sum(states * dstates, axis=(-1, -2)),
    )
    return read * asked, left * remembered - write * read * recalled, dchunks


def _sum(axes: str, x: Array, y: Array) -> Array:
    """Sum of products, for every chunk on its own."""
    left, right = axes.split("->")
    axes = ",".join("..." + part for part in left.split(",")) + "->..." + right
    return jnp.einsum(axes, x, y, precision=lax.Precision.HIGH)
