"""What follows from the gates of the gated delta rule in chunks, and their gradient, in JAX."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

READ, WRITE, LEFT = range(3)  # rows of `Gates.numbers`


class Gates(NamedTuple):
    """Numbers of every chunk of C tokens, float32; S = B H N.

    Attributes:
        alpha: [S, C].
        numbers: of every token, [S, 3, C]: with what it reads the state before the chunk,
            g = alpha_1 ... alpha_i, beta, and what is left of it after the chunk,
            r = alpha_{i+1} ... alpha_C.
        carry: what is left of the state, the last g, [S].
    """

    alpha: Array
    numbers: Array
    carry: Array


def gates(alpha: Array, beta: Array, chunk: int) -> Gates:
    """Return what follows from alpha and beta, [B, T, H]."""
    batch, _, heads = alpha.shape
    chunks = (x.reshape(batch, -1, chunk, heads) for x in (alpha, beta))
    alpha, beta = (jnp.moveaxis(x, 3, 1).reshape(-1, chunk) for x in chunks)
    read = lax.cumprod(alpha, axis=1)
    after = jnp.pad(alpha[:, 1:], [(0, 0), (0, 1)], constant_values=1)
    left = lax.cumprod(after, axis=1, reverse=True)
    return Gates(alpha, jnp.stack([read, beta, left], axis=1), read[:, -1])


def gradient(
    gates: Gates,
    decay: Array,
    ddecay: Array,
    dnumbers: Array,
    dcarry: Array,
    shape: tuple[int, ...],
) -> tuple[Array, Array]:
    """Return the cotangents of alpha and beta.

    g and r are a row and a column of L but for the first alpha. L is the inverse of a matrix with
    -alpha below the diagonal, so that dalpha_i = (L^T dL L^T)_{i, i-1}: nothing is divided.

    Args:
        gates: of `gates`.
        decay: L, [S, C, C].
        ddecay, dnumbers, dcarry: cotangents of L, `gates.numbers`, `gates.carry`.
        shape: [B, T, H].
    """
    first = gates.alpha[:, :1]
    dread = dnumbers[:, READ].at[:, -1].add(dcarry)
    ddecay = ddecay.at[:, :, 0].add(first * dread).at[:, -1].add(dnumbers[:, LEFT])
    before = jnp.pad(decay[:, :-1], [(0, 0), (1, 0), (0, 0)])
    passed = jnp.einsum("sij,sil->slj", ddecay, decay, precision=lax.Precision.HIGHEST)
    dalpha = jnp.sum(passed * before, axis=2)
    dalpha = dalpha.at[:, 0].add(jnp.sum(dread * decay[:, :, 0], axis=1))

    def by_token(x: Array) -> Array:
        x = x.reshape(shape[0], shape[2], -1, x.shape[1])
        return jnp.moveaxis(x, 1, 3).reshape(shape)

    return by_token(dalpha), by_token(dnumbers[:, WRITE])
