"""Tiles in shared memory and in registers, as kernels with tensor cores compute with them.

Matrices lie in shared memory as tiles that the tensor cores read in place; the rows that a
warpgroup owns are its first operand, [64, K], and accumulators are [64, N] in registers.
"""

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.chip import TILE
from pallas_kernels.interpreter import simulated_platform

Array = jax.Array
Ref = jax.Ref

MATRIX = plgpu.Layout.WGMMA
ROW, COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)  # A number for each row, or for each column.
WIDEST_PRODUCT = 256  # columns of one tensor core instruction


def matrices(*shape: int, dtype: jnp.dtype) -> plgpu.SMEM:
    """Shared memory for matrices (the last two axes) as the tensor cores read them."""
    columns = min(TILE, shape[-1])
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def vectors(*shape: int) -> plgpu.SMEM:
    """Shared memory for float32 numbers."""
    return plgpu.SMEM(shape, jnp.float32)


def products(*sums: Sequence[tuple[Any, Ref]]) -> tuple[Array, ...]:
    """Return sums [64, N] of products of pairs [64, K], [K, N], in float32."""

    if simulated_platform() and isinstance(sums[0][0][0], jax.Array):
        # The interpreter's first factors lie in shared memory. What is read here, tensor cores read
        # asynchronously: so that loads after it need not wait for more, it says so.
        own = sum(jnp.dot(a, b[...], preferred_element_type=jnp.float32) for a, b in sums[0])
        plgpu.commit_smem()
        return own, *(products(*sums[1:]) if sums[1:] else ())

    def run(*totals: Ref) -> tuple[Array, ...]:
        for total, factors in zip(totals, sums, strict=True):
            for a, b in factors:
                plgpu.wgmma(total, a, b)
        return tuple(total[...] for total in totals)

    shapes = (plgpu.ACC((TILE, factors[0][1].shape[1]), jnp.float32) for factors in sums)
    return pl.run_scoped(run, *shapes)


def product(a: Any, b: Ref) -> Array:
    """Return the product [64, N] of [64, K] and [K, N], in float32."""
    return products([(a, b)])[0]


def accumulated(total: Array, a: Any, b: Ref) -> Array:
    """Return total [64, N] + a b, in the registers of `total`."""
    return all_accumulated([total], [[(a, b)]])[0]


def all_accumulated(
    totals: Sequence[Array], sums: Sequence[Sequence[tuple[Any, Ref]]]
) -> tuple[Array, ...]:
    """Return what `products` does, each sum added to a total, in the registers of that."""
    if simulated_platform():  # The interpreter's accumulators start from zero.
        return tuple(x + y for x, y in zip(totals, products(*sums), strict=True))

    def run(accumulators: tuple[Ref, ...]) -> None:
        for accumulator, factors in zip(accumulators, sums, strict=True):
            for a, b in factors:
                plgpu.wgmma(accumulator, a, b)

    return pl.run_state(run)(tuple(plgpu.ACC.init(total) for total in totals))


def summed_products(
    steps: int,
    step: Callable[[Array], tuple[Sequence[tuple[Ref, Ref]], Callable[[], None]]],
    widths: Sequence[int],
) -> tuple[Array, ...]:
    """Return sums over steps of products [64, N].

    Args:
        steps: their number.
        step: takes a step's number to its pairs of factors, one for each sum, and to what is to be
            done once they have been read.
        widths: N of each sum.
    """

    def run(*sums: Ref) -> tuple[Array, ...]:
        @pl.loop(0, opaque(jnp.int32(steps)))
        def _(index):
            factors, done = step(index)
            for total, (a, b) in zip(sums, factors, strict=True):
                plgpu.wgmma(total, a, b)
            plgpu.wgmma_wait(0)
            done()

        return tuple(total[...] for total in sums)

    return pl.run_scoped(run, *(plgpu.ACC((TILE, width), jnp.float32) for width in widths))


def weighted_sum(tokens: Ref, weights: Ref) -> Array:
    """Return the sum of 64 rows, a number for each column; all rows of `weights` have theirs."""
    # Rows that are alike, and so are the columns of the product.
    return jnp.max(product(transposed(tokens), transposed(weights.at[pl.ds(0, 8)])), axis=1)


def store_in_two(x: Array, rounded: Ref, rest: Ref) -> None:
    """Store float32 numbers as two of 16 bits: what they are rounded to, and the rest of them."""
    # Opaque, or the compiler rounds number by number, in the slow unit for conversions; and in this
    # order it needs the fewest registers.
    y = opaque(x.astype(rounded.dtype))
    rest[...] = (x - y.astype(jnp.float32)).astype(rest.dtype)
    rounded[...] = y


def transposed(ref: Ref) -> Ref:
    """The transposed matrix."""
    return ref.transpose((1, 0))


def load_matrix(ref: Ref) -> Array:
    """A matrix of shared memory, in float32."""
    return plgpu.load(ref, layout=MATRIX, optimized=False).astype(jnp.float32)


def load_rows(ref: Ref) -> Array:
    """A number for each row."""
    return plgpu.load(ref, layout=ROW, optimized=False)


def load_columns(ref: Ref) -> Array:
    """A number for each column."""
    return plgpu.load(ref, layout=COLUMN, optimized=False)


def over_rows(x: Array, like: Array) -> Array:
    """Numbers of rows over the columns of a matrix."""
    return lax.broadcast_in_dim(x, like.shape, (0,))


def over_columns(x: Array, like: Array) -> Array:
    """Numbers of columns over the rows of a matrix."""
    return lax.broadcast_in_dim(x, like.shape, (1,))


def tile_of(tile: int) -> Any:
    """The tile's 64 columns, static."""
    return pl.ds(tile * TILE, TILE)


def inner_with_columns(rows: Ref, numbers: Ref) -> Array:
    """Inner product of each of 64 rows in shared memory with a vector there."""

    def term(tile: int) -> Array:
        x = load_matrix(rows.at[:, tile_of(tile)])
        return x * over_columns(load_columns(numbers.at[tile_of(tile)]), x)

    return row_sums(term(tile) for tile in range(rows.shape[1] // TILE))


def inner_with_rows(rows: Ref, matrix: Array) -> Array:
    """Inner product of each of 64 rows in shared memory with the same row of a matrix."""
    return row_sums(
        load_matrix(rows.at[:, tile_of(tile)]) * x for tile, x in enumerate(tiles_of(matrix))
    )


def row_sums(matrices: Iterable[Array]) -> Array:
    """Sum of each row of matrices side by side."""
    return jnp.sum(functools.reduce(operator.add, matrices), axis=1)


def plus(total: Array | None, x: Array) -> Array:
    """A sum that begins with None."""
    return x if total is None else total + x


def where(mask: Array, x: Array) -> Array:
    """x, or 0."""
    return jnp.where(mask, x, jnp.zeros_like(x))


def tiles_of(x: Array) -> list[Array]:
    """Cut a matrix [64, N] into tiles of 64 columns."""
    return [x[:, first : first + TILE] for first in range(0, x.shape[1], TILE)]


def opaque(x: Array) -> Array:
    """Return x such that the compiler computes anew what is made of it.

    It would keep addresses in registers that nothing is left of, from one chunk to the next.
    """
    return lax.optimization_barrier(x)


def untyped(x: Array) -> Array:
    """Return x with the type of what is computed here.

    Under `shard_map` what is loaded from an argument varies over the mesh, by its type, but what is
    computed from it inside a kernel does not; and a loop's state must keep its type.
    """
    return x * jnp.float32(1)


def afresh(ref: Ref, index: Array | int = 0) -> Ref:
    """A part of shared memory, whose address is not kept in registers."""
    return ref.at[opaque(jnp.int32(index))]


def store_directly(ref: Ref, x: Array) -> None:
    """Store straight to global memory: few bytes, or once."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, x, optimized=False)
    else:  # JAX 0.11 asks for nothing better.
        ref[...] = x
