"""Numbers in two parts of 16 bits: how the Hopper kernels multiply what they have computed.

bfloat16 has 8 bits; of a product of two numbers in two parts each, that of the second parts is left
out, 2^-16 of the whole.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper.tiles import products, transposed

Array = jax.Array
Ref = jax.Ref

PARTS = 2

_HALF, _HIGH = 0x8000, 0xFFFF0000  # of the last place of bfloat16, and its bits


def split(x: Array) -> tuple[Array, Array]:
    """Return x rounded to bfloat16, and the rest of it, rounded likewise.

    Rounded by its bits: a conversion whose result is converted back takes the compiler to a unit
    that does one number at a time.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32) + jnp.uint32(_HALF)
    rounded = lax.bitcast_convert_type(bits & jnp.uint32(_HIGH), jnp.float32)
    return rounded.astype(jnp.bfloat16), (x - rounded).astype(jnp.bfloat16)


def store_parts(x: Array, ref: Ref) -> None:
    """Store x in a matrix [2, 64, N] in parts."""
    for part, y in enumerate(split(x)):
        ref[part] = y


def product_of_parts(x: Array, matrix: Ref, *, transpose: bool = False) -> Array:
    """x [64, 64] times a matrix [2, 64, 64] in parts, or times its transpose."""
    parts = [matrix.at[part] for part in range(PARTS)]
    if transpose:
        parts = [transposed(part) for part in parts]
    rounded, rest = split(x)
    return products([(rounded, parts[0]), (rest, parts[0]), (rounded, parts[1])])[0]
