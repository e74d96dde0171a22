"""The exact recurrence by JAX's own flat scan, which everything here is compared with."""

import jax
from jax import lax

Array = jax.Array


def associative_scan(a: Array, u: Array) -> Array:
    """Returns x_t = a_t x_(t-1) + u_t along axis 1, by `lax.associative_scan`.

    Args:
        a: decays, with the axes of u; may have 1 where u has features, broadcast as the scan goes.
        u: inputs [B, T, ...].
    """

    def combine(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    return lax.associative_scan(combine, (a, u), axis=1)[1]
