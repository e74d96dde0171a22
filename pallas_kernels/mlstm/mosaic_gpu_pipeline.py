"""What the Hopper kernels of the mLSTM share: the problem, streams of tiles, products, weights.

A thread block has one warpgroup for each 64 rows that it owns, and a last one that starts the
loads. Matrices lie in shared memory as tiles that the tensor cores read in place; the rows that a
warpgroup owns are its first operand, [64, K], and accumulators are [64, N] in registers.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.interpreter import simulated_platform
from pallas_kernels.mlstm import gates as rows_of
from pallas_kernels.mlstm.tuning import TILE, TuningConfig

Array = jax.Array
Ref = jax.Ref

MATRIX = plgpu.Layout.WGMMA
ROW, COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)  # A number for each row, or for each column.
WIDEST_PRODUCT = 256  # columns of one tensor core instruction
_LONGEST_COPY = 256  # numbers along an axis
_LOG2_E = math.log2(math.e)

# Registers of a thread where two warpgroups compute; one alone has all that a thread can have.
_COMPUTE_REGISTERS, _LOAD_REGISTERS = 240, 32


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is to be computed, static.

    Attributes:
        batch, time, heads, q_dim, v_dim: B, T, H, Dk, Dv; T a multiple of the chunk, Dk and Dv
            of 64.
        chunk: L, 64, 128 or, for the outputs and the states, 256.
        normalized: whether outputs are divided by max(|d|, floor) or by the floor.
        dtype: of q, k, v and h, and of the states between chunks.
        config: how the work is cut up.
        pieces: P, equal ones of every sequence, each a sequence of its own to the walks. Arrays by
            token are then [B P, T / P, H, D], those by sequence have an axis [B H P].
    """

    batch: int
    time: int
    heads: int
    q_dim: int
    v_dim: int
    chunk: int
    normalized: bool
    dtype: jnp.dtype
    config: TuningConfig
    pieces: int = 1

    @property
    def chunks(self) -> int:
        """N, chunks of a sequence or piece."""
        return self.time // self.chunk // self.pieces

    @property
    def sequences(self) -> int:
        """Heads of all batch elements, each a sequence of its own, or the pieces of these."""
        return self.batch * self.heads * self.pieces

    @property
    def groups(self) -> int:
        """Warpgroups that compute, one for each 64 tokens of a chunk, at most two."""
        return min(2, self.chunk // TILE)

    @property
    def v_tiles(self) -> int:
        """Tiles of 64 columns of v."""
        return self.v_dim // TILE


def matrices(*shape: int, dtype: jnp.dtype) -> plgpu.SMEM:
    """Shared memory for matrices (the last two axes) as the tensor cores read them."""
    columns = min(TILE, shape[-1])
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def vectors(*shape: int) -> plgpu.SMEM:
    """Shared memory for float32 numbers."""
    return plgpu.SMEM(shape, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Stream:
    """A ring of slots in shared memory that the last warpgroup fills and the others empty.

    Attributes:
        slots: their number.
        free: a barrier for each slot, at which every warpgroup arrives that is done with it.
    """

    slots: int
    free: Ref

    def slot(self, step: Array) -> Array:
        """Where a step's tiles are."""
        return lax.rem(step, jnp.int32(self.slots))

    def acquire(self, step: Array) -> Array:
        """Wait until the slot of a step is free, and return it."""
        slot = self.slot(step)

        @pl.when(step >= self.slots)
        def _():
            plgpu.barrier_wait(self.free.at[slot])

        return slot

    def release(self, step: Array) -> None:
        """Say that this warpgroup has no more need of a step's tiles."""
        plgpu.barrier_arrive(self.free.at[self.slot(step)])

    def drain(self, steps: Array) -> None:
        """Wait until the last tiles of `steps` have been read."""

        def wait(step: Array, _: None) -> None:
            plgpu.barrier_wait(self.free.at[self.slot(step)])

        lax.fori_loop(jnp.maximum(steps - self.slots, 0), steps, wait, None)


def free_barriers(slots: int, groups: int) -> plgpu.Barrier:
    """Scratch for `Stream.free`."""
    return plgpu.Barrier(num_arrivals=groups, num_barriers=slots)


def full_barriers(slots: int, copies: int = 1) -> plgpu.Barrier:
    """Scratch for the barriers at which so many copies arrive for each slot."""
    return plgpu.Barrier(num_arrivals=copies, num_barriers=slots)


def meet(barrier: Ref) -> None:
    """Wait until every warpgroup that computes has come here; what they stored is seen by all."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def load_own(source: Callable[[int], Ref], target: Ref, barrier: Ref, groups: int) -> None:
    """Load each warpgroup's own rows, [groups, 64, D]."""
    for group in range(groups):
        plgpu.copy_gmem_to_smem(source(group), target.at[group], barrier)


def vector_copies(size: int) -> int:
    """Copies that `load_vector` makes."""
    return pl.cdiv(size, _LONGEST_COPY)


def load_vector(source: Ref, target: Ref, barrier: Ref) -> None:
    """Load a vector of any size."""
    size = target.shape[0]
    for first in range(0, size, _LONGEST_COPY):
        part = pl.ds(first, min(_LONGEST_COPY, size - first))
        plgpu.copy_gmem_to_smem(source.at[part], target.at[part], barrier)


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
    if simulated_platform():  # The interpreter's accumulators start from zero.
        return total + product(a, b)

    def run(accumulator: Ref) -> None:
        plgpu.wgmma(accumulator, a, b)

    return pl.run_state(run)(plgpu.ACC.init(total))


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
    y = x.astype(rounded.dtype)
    rounded[...] = y
    rest[...] = (x - y.astype(jnp.float32)).astype(rest.dtype)


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


class Walk:
    """The sequence, or piece of one, that a thread block walks over from end to end.

    Attributes:
        batch, head: where it is in arrays by token, [B, T, H, D] or [B P, T / P, H, D].
        sequence, whole: where it is in arrays [B H P, ...], and in those [B H, ...].
        is_first, is_last: whether the sequence begins with it, and ends.
        number: where it is among those that are walked over.
    """

    def __init__(self, p: Problem, without: int | None = None):
        """`without` is a piece that is left out: the first or the last."""
        self.chunks = p.chunks
        self.head, self.batch = lax.axis_index("head"), lax.axis_index("batch")
        self.sequence = self.whole = self.number = self.batch * p.heads + self.head
        self.is_first = self.is_last = True
        if p.pieces > 1:
            piece = lax.axis_index("piece")
            self.number = self.whole * (p.pieces - (without is not None)) + piece
            if without == 0:
                piece = piece + 1
            self.is_first, self.is_last = piece == 0, piece == p.pieces - 1
            self.sequence = self.whole * p.pieces + piece
            self.batch = self.batch * p.pieces + piece

    @staticmethod
    def grid(p: Problem, without: int | None = None) -> dict[str, int]:
        """Thread blocks."""
        pieces = {"piece": p.pieces - (without is not None)} if p.pieces > 1 else {}
        return pieces | {"head": p.heads, "batch": p.batch}

    def index(self, chunk: Array) -> Array:
        """Where a chunk is in arrays [B H N, ...]."""
        return self.sequence * self.chunks + chunk


class Place:
    """The chunks of a sequence that a thread block does one after the other: its items.

    Every array lies in memory by token, [B, T, H, D], or by chunk, [B H N, ...].
    """

    def __init__(self, p: Problem):
        self.problem = p
        names = ("head", "batch", "span")
        self.head, self.batch, span = (opaque(lax.axis_index(name)) for name in names)
        self.first = span * p.config.span
        self.count = jnp.minimum(p.chunks - self.first, p.config.span)

    @staticmethod
    def grid(p: Problem) -> dict[str, int]:
        """Thread blocks."""
        return {"span": pl.cdiv(p.chunks, p.config.span), "head": p.heads, "batch": p.batch}

    def index(self, item: Array) -> Array:
        """Where an item is in arrays by chunk."""
        p = self.problem
        return (self.batch * p.heads + self.head) * p.chunks + self.first + item

    def tokens(self, ref: Ref, item: Array, tile: Array | None = None) -> Ref:
        """A chunk of an array by token, or a tile of 64 columns of it."""
        p = self.problem
        tokens = pl.ds((self.first + item) * p.chunk, p.chunk)
        return ref.at[self.batch, tokens, self.head, _columns(tile)]

    def own_tokens(
        self, ref: Ref, item: Array, group: Array, tile: Array | None = None, width: int = TILE
    ) -> Ref:
        """64 tokens of a chunk, as the rows of a warpgroup are."""
        p = self.problem
        tokens = pl.ds((self.first + item) * p.chunk + group * TILE, TILE)
        return ref.at[self.batch, tokens, self.head, _columns(tile, width)]

    def memory(self, ref: Ref, item: Array, rows: slice, tile: Array, width: int = TILE) -> Ref:
        """Rows of a chunk's C, [B H N Dk, Dv], and a tile of its columns."""
        first = self.index(item) * self.problem.q_dim + rows.start
        return ref.at[pl.ds(first, rows.stop - rows.start), _columns(tile, width)]


def _columns(tile: Array | None, width: int = TILE) -> Any:
    return slice(None) if tile is None else pl.ds(tile * width, width)


def tile_of(tile: int) -> Any:
    """The tile's 64 columns, static."""
    return pl.ds(tile * TILE, TILE)


def rounds(p: Problem, widest: int) -> list[slice]:
    """Dk cut into parts of at most so many."""
    return [slice(x, min(x + widest, p.q_dim)) for x in range(0, p.q_dim, widest)]


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


class Weights:
    """The weights A of a warpgroup's 64 rows i, or 64 columns j, and their places.

    The warpgroup's own tokens are the rows of matrices [64, width], one for each tile of so many of
    the chunk's tokens.
    """

    def __init__(self, gates: Ref, group: Array, *, own_columns: bool, width: int = TILE):
        self.gates, self.group, self.own_columns = gates, group, own_columns
        self.own, self.width = pl.ds(group * TILE, TILE), width

    def own_row(self, name: int) -> Array:
        """A row of the gates for the warpgroup's own tokens."""
        return load_rows(self.gates.at[name, self.own])

    def _row_of_tile(self, name: int, tile: int) -> Array:
        """A row of the gates for the tokens of a tile."""
        return load_columns(self.gates.at[name, pl.ds(tile * self.width, self.width)])

    def _own_places(self) -> Array:
        """The warpgroup's own tokens within the chunk."""
        return opaque(plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=ROW)) + self.group * TILE

    def _places(self, tile: int) -> tuple[Array, Array]:
        """The warpgroup's own tokens, and those of a tile, within the chunk, over a matrix."""
        like = jnp.zeros((TILE, self.width), jnp.int32)
        token = opaque(plgpu.broadcasted_iota(jnp.int32, (self.width,), 0, layout=COLUMN))
        return over_rows(self._own_places(), like), over_columns(token + tile * self.width, like)

    def seen(self, tile: int) -> Array:
        """Where j < i."""
        own, token = self._places(tile)
        return token > own if self.own_columns else token < own

    def diagonal(self, tile: int) -> Array:
        """Where i = j."""
        own, token = self._places(tile)
        return token == own

    def _difference(self, row: int, column: int, tile: int, like: Array) -> Array:
        """rows[row]_i - rows[column]_j."""
        own, other = (column, row) if self.own_columns else (row, column)
        x = over_rows(self.own_row(own), like)
        y = over_columns(self._row_of_tile(other, tile), like)
        return y - x if self.own_columns else x - y

    def matrix(self, tile: int) -> Array:
        """A, exactly 0 where nothing is read."""
        own, token = self._places(tile)
        exponent = self._difference(rows_of.ROW_HIGH, rows_of.COLUMN_HIGH, tile, own)
        exponent += self._difference(rows_of.ROW_LOW, rows_of.COLUMN_LOW, tile, own)
        # Numbers of rows (few in a thread) are converted, not those of columns.
        if self.own_columns:
            begin = over_columns(self._row_of_tile(rows_of.BEGIN, tile), own)
            reads = over_rows(self._own_places().astype(jnp.float32), own) >= begin
            reads &= token >= own
        else:
            begin = self.own_row(rows_of.BEGIN).astype(jnp.int32)
            reads = (token <= own) & (token >= over_rows(begin, own))
        # Selected behind the exponential, which may have overflowed where nothing is read.
        a = jnp.exp2(exponent * _LOG2_E)
        return jnp.where(reads, a, jnp.zeros_like(a))


def tiles_of(x: Array) -> list[Array]:
    """Cut a matrix [64, N] into tiles of 64 columns."""
    return [x[:, first : first + TILE] for first in range(0, x.shape[1], TILE)]


def warpgroups(groups: int, compute: Callable[[Array], None], load: Callable[[], None]) -> None:
    """Run `compute(group)` in all warpgroups but the last, and `load` in that."""
    group = lax.axis_index("warpgroup")

    @pl.when(group < groups)
    def _():
        if groups > 1:
            plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        compute(group)

    @pl.when(group == groups)
    def _():
        if groups > 1:
            plgpu.set_max_registers(_LOAD_REGISTERS, action="decrease")
        load()


def launch(
    body: Callable, name: str, groups: int, out_type: Any, scratch_types: Any, **grid: int
) -> Callable:
    """Return the kernel over a grid with these axes."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=groups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            reduction_scratch_bytes=16,  # Nothing is reduced across warps.
        ),
        kernel_name=name,
    )


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
