"""Products and sums of matrices in VMEM, and their parts."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.tpu.chip import LANES

Array = jax.Array

# Rows of `parts`, a register of any dtype.
PARTS = 16


def dot(x: Array, y: Array, contract: tuple[int, int]) -> Array:
    """Product over an axis of each, accumulated in float32; float32 operands are not rounded."""
    exact = x.dtype == jnp.float32
    return lax.dot_general(
        x,
        y,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def multiply_rows(x: Array, y: Array) -> Array:
    """x y^T."""
    return dot(x, y, (1, 1))


def multiply(x: Array, y: Array) -> Array:
    """x y."""
    return dot(x, y, (1, 0))


def as_float(x: Array) -> Array:
    """Return x in float32."""
    return x.astype(jnp.float32)


def tiles(size: int, tile: int) -> list[slice]:
    """Slices of an axis, the last one shorter where they must."""
    return [slice(start, min(start + tile, size)) for start in range(0, size, tile)]


def stack(*blocks: Array) -> Array:
    """Put matrices above one another."""
    return jnp.concatenate(blocks, axis=0)


def sum_down(x: Array) -> Array:
    """Sum over sublanes: [R, n] -> [1, n]."""
    return jnp.sum(x, axis=0, keepdims=True)


def fold_lanes(x: Array) -> Array:
    """Add up the registers of a row: [R, n * 128] -> [R, 128]."""
    return sum((x[:, lanes] for lanes in tiles(x.shape[1], LANES)[1:]), x[:, :LANES])


def widen(column: Array, width: int) -> Array:
    """[R, 128] of equal lanes -> [R, width]."""
    return jnp.concatenate([column] * (width // LANES), axis=1)


def exact_parts(row: Array, dtype: jnp.dtype) -> Array:
    """Part a row [1, n] into rows [16, n] of a dtype, of which products lose nothing."""
    parts = []
    for _ in range(1 if dtype == jnp.float32 else 3):
        parts.append(row.astype(dtype))
        row = row - as_float(parts[-1])
    return stack(*parts, jnp.zeros((PARTS - len(parts), row.shape[1]), dtype))


def turn_row(row: Array) -> Array:
    """A row [1, n] along sublanes, alike in all lanes [n, 128]: moved across lanes."""
    column = jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1]
    return jnp.broadcast_to(column, (row.shape[1], LANES))


def token_pairs(columns: slice, rows: slice) -> tuple[Array, Array]:
    """Column (along sublanes) and row (along lanes) of each entry of a block."""
    shape = (columns.stop - columns.start, rows.stop - rows.start)
    column, row = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return columns.start + column, rows.start + row


def on_diagonal(columns: slice, rows: slice) -> Array:
    """Return where a row reads its own column."""
    column, row = token_pairs(columns, rows)
    return column == row
