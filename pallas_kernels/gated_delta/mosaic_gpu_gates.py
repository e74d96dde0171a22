"""What follows from the gates of the gated delta rule in chunks, in plain JAX."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.gated_delta.triangles import decay_matrix

Array = jax.Array

READ, WRITE, LEFT = range(3)  # rows of `Gates.numbers`


class Gates(NamedTuple):
    """Numbers of every chunk of C tokens, float32.

    Attributes:
        decay: L [B, H, N, C, C], L_ij = alpha_i ... alpha_{j+1}, 1 on the diagonal, 0 above.
        numbers: of every token, [B, H, N, 3, C]: with what it reads the state before the chunk,
            g = alpha_1 ... alpha_i, beta, and what is left of it after the chunk, L's last row.
        carry: what is left of the state, the last g, [B, H, N].
    """

    decay: Array
    numbers: Array
    carry: Array

    def flat(self) -> "Gates":
        """The same with one axis for [B, H, N]."""
        return Gates(*(x.reshape(-1, *x.shape[3:]) for x in self))


def gates(alpha: Array, beta: Array) -> Gates:
    """Return what follows from alpha and beta, [B, H, N, C]."""
    decay = decay_matrix(alpha)
    prefix = alpha[..., :1] * decay[..., 0]
    return Gates(decay, jnp.stack([prefix, beta, decay[..., -1, :]], axis=-2), prefix[..., -1])


def by_chunk(x: Array, chunk: int) -> Array:
    """[B, T, H] -> [B, H, N, C]."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, x.shape[2]), 3, 1)


def by_token(x: Array) -> Array:
    """Undo `by_chunk`."""
    x = jnp.moveaxis(x, 1, 3)
    return x.reshape(x.shape[0], -1, x.shape[3])
