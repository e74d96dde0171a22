"""Numbers in two parts of 16 bits: how the Hopper kernels multiply what they have computed.

bfloat16 has 8 bits; of a product of two numbers in two parts each, that of the second parts is left
out, 2^-16 of the whole.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.hopper.tiles import products, store_in_two, transposed

Array = jax.Array
Ref = jax.Ref

PARTS = 2


def split(x: Array) -> tuple[Array, Array]:
    """Return x rounded to bfloat16, and the rest of it, rounded likewise."""
    rounded = x.astype(jnp.bfloat16)
    return rounded, (x - rounded.astype(jnp.float32)).astype(jnp.bfloat16)


def store_parts(x: Array, ref: Ref) -> None:
    """Store x in a matrix [2, 64, N] in parts."""
    store_in_two(x, ref.at[0], ref.at[1])


def product_of_parts(x: Array, matrix: Ref, *, transpose: bool = False) -> Array:
    """x [64, 64] times a matrix [2, 64, 64] in parts, or times its transpose."""
    parts = [matrix.at[part] for part in range(PARTS)]
    if transpose:
        parts = [transposed(part) for part in parts]
    rounded, rest = split(x)
    return products([(rounded, parts[0]), (rest, parts[0]), (rounded, parts[1])])[0]
