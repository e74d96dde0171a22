"""What chunks of the gated delta rule are before and after the walks over them, in plain JAX.

Notation, C tokens to a chunk, with H the state before it, [Dk, Dv]:

    L           decay matrix, L_ij = alpha_i ... alpha_{j+1}, 1 on the diagonal, 0 above
    g, r        prefix products alpha_1 ... alpha_i of the chunk; last row of L
    M           strictly lower part of diag(beta) (K K^T * L); X = (I + M)^-1
    P           Q K^T * L
    E, U        beta (V - g K H), and X E: what each token writes

The walks have the sums over Dk, and over tokens; here are the cotangents that sum over Dv, all
chunks at once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gated_delta.triangles import decay_matrix

Array = jax.Array


class Gates(NamedTuple):
    """What follows from the gates of every chunk, float32.

    Attributes:
        decay: L [B, H, N, C, C].
        numbers: g, beta and r, [B, H, N, 3, C].
        carry: g_C, [B, H, N].
    """

    decay: Array
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


def gates(alpha: Array, beta: Array) -> Gates:
    """Return what follows from alpha and beta, [B, H, N, C]."""
    decay = decay_matrix(alpha)
    prefix = alpha[..., :1] * decay[..., 0]
    return Gates(decay, jnp.stack([prefix, beta, decay[..., -1, :]], axis=-2), prefix[..., -1])


def gradient(
    gates: Gates,
    q: Array,
    k: Array,
    v: Array,
    do: Array,
    states: Array,
    dstates: Array,
    written: Array,
    derrors: Array,
) -> tuple[Array, Array, Gates]:
    """Return the cotangents of Q, K and of `gates`.

    Args:
        gates: of `gates`.
        q, k: [B, H, N, C, Dk].
        v, do: [B, H, N, C, Dv].
        states, dstates: H^T before every chunk, and its cotangent after, [B, H, N, Dv, Dk].
        written, derrors: U^T, and the cotangent of E^T / beta, [B, H, N, Dv, C].
    """
    read, write, left = (gates.numbers[..., name, :, None] for name in range(3))
    recalled = _sum("vc,vk->ck", derrors, states)
    remembered = _sum("vc,vk->ck", written, dstates)
    asked = _sum("cv,vk->ck", do, states)
    dlower = -jnp.tril(_sum("vi,vj->ij", derrors, written), -1)
    dscores = jnp.tril(_sum("iv,vj->ij", do, written))

    alike, scores = dlower * _sum("ik,jk->ij", k, k), _sum("ik,jk->ij", q, k)
    dlower, asking = write * dlower * gates.decay, dscores * gates.decay
    dq = read * asked + _sum("ij,jk->ik", asking, k)
    dk = left * remembered - write * read * recalled + _sum("ji,jk->ik", asking, q)
    dk += _sum("ij,jk->ik", dlower + jnp.swapaxes(dlower, -1, -2), k)

    under_keys = jnp.sum(k * recalled, axis=-1, keepdims=True)
    dread = jnp.sum(q * asked, axis=-1, keepdims=True) - write * under_keys
    dwrite = jnp.sum(v * jnp.swapaxes(derrors, -1, -2), axis=-1, keepdims=True)
    dwrite += jnp.sum(alike * gates.decay, axis=-1, keepdims=True) - read * under_keys
    dleft = jnp.sum(k * remembered, axis=-1, keepdims=True)
    dnumbers = jnp.concatenate([dread, dwrite, dleft], axis=-1)
    dcarry = jnp.sum(states * dstates, axis=(-1, -2))
    ddecay = write * alike + dscores * scores
    return dq, dk, Gates(ddecay, jnp.swapaxes(dnumbers, -1, -2), dcarry)


def _sum(axes: str, x: Array, y: Array) -> Array:
    """Sum of products, for every chunk on its own."""
    left, right = axes.split("->")
    axes = ",".join("..." + part for part in left.split(",")) + "->..." + right
    return jnp.einsum(axes, x, y, precision=lax.Precision.HIGH)
