"""Arrays filled up to whole tiles."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

Array = jax.Array


def fill_up(x: Array, multiples: Mapping[int, int], value: float = 0.0) -> Array:
    """Return x with axes filled up at their ends.

    Args:
        x: of any shape.
        multiples: by axis (negative: from the last one), of what its size shall be a multiple.
        value: what is filled in.
    """
    widths = [(0, 0)] * x.ndim
    for axis, multiple in multiples.items():
        widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, constant_values=value) if any(map(sum, widths)) else x
