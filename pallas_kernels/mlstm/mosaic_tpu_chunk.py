"""What the TPU kernels of an mLSTM are made of: plans, products, gates, a chunk's reads and writes.

`Tiling`, `HeadView`, products and the walk over chunks serve every matrix memory.

Notation and layout: pallas_kernels/mlstm/mosaic_tpu_kernels.py.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.mlstm.gates import (
    BEGIN,
    COLUMN_HIGH,
    COLUMN_LOW,
    FLOOR,
    KEPT,
    RECALL,
    ROW_HIGH,
    ROW_LOW,
)
from pallas_kernels.mlstm.tuning_tpu import LANES

Array = jax.Array
# The grid is (batch, groups of heads, groups of chunks).
CHUNK_AXIS = 2


@dataclasses.dataclass(frozen=True)
class Tiling:
    """What a kernel body that walks over chunks is specialised for.

    Attributes:
        heads: of one program.
        chunks: of the sequence.
        together: chunks of one grid step, at most.
        chunk: L, a multiple of 128.
        q_dim, v_dim: Dk and Dv, multiples of 128.
        dtype: of the products' operands.
    """

    heads: int
    chunks: int
    together: int
    chunk: int
    q_dim: int
    v_dim: int
    dtype: jnp.dtype

    @property
    def steps(self) -> int:
        """Grid steps over the chunks."""
        return pl.cdiv(self.chunks, self.together)

    def count(self, group: Array) -> int | Array:
        """Chunks in a group: the last one may have fewer."""
        if self.chunks % self.together == 0:
            return self.together
        return jnp.minimum(self.together, self.chunks - group * self.together)


@dataclasses.dataclass(frozen=True)
class Plan(Tiling):
    """What the bodies of the mLSTM's kernels are specialised for.

    Attributes:
        normalized: whether h is divided by max(|d|, floor), or by the floor alone.
        columns: of a product's result that are held at a time.
    """

    normalized: bool
    columns: int


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


# Rows of `parts`, a register of any dtype.
PARTS = 16


def exact_parts(row: Array, dtype: jnp.dtype) -> Array:
    """Part a row [1, n] into rows [16, n] of a dtype, of which products lose nothing."""
    parts = []
    for _ in range(1 if dtype == jnp.float32 else 3):
        parts.append(row.astype(dtype))
        row = row - as_float(parts[-1])
    return stack(*parts, jnp.zeros((PARTS - len(parts), row.shape[1]), dtype))


class Columns(NamedTuple):
    """Gates of A by column, along sublanes and alike in all lanes, [L, 128]."""

    high: Array
    low: Array


# Stands for the infinity of a gate that is closed, which would make NaN of zeros in a product.
_CLOSED = 1e30


def spread_gates(gates: Array) -> Columns:
    """Spread gates of columns.

    By products with ones, of three parts each that no rounding touches: the unit that moves values
    across lanes would take longer.
    """
    rest, parts = jnp.minimum(gates, _CLOSED), []
    for _ in range(3):
        parts.append(as_float(rest.astype(jnp.bfloat16)))
        rest = rest - parts[-1]
    parts = stack(*parts, jnp.zeros_like(rest)).astype(jnp.bfloat16).T
    names = COLUMN_HIGH, COLUMN_LOW
    shape = parts.shape[1], len(names) * LANES
    row, lane = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    chosen = functools.reduce(
        jnp.logical_or,
        ((row % 8 == name) & (lane // LANES == place) for place, name in enumerate(names)),
    )
    spread = multiply(parts, jnp.where(chosen, 1.0, 0.0).astype(jnp.bfloat16))
    return Columns(*(spread[:, lanes] for lanes in tiles(shape[1], LANES)))


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


def _weights(gates: Array, by_column: Columns, rows: slice, columns: slice) -> Array:
    """A of a block of rows, along lanes, with some columns up to its end, along sublanes."""
    exponent = gate_row(gates, ROW_HIGH, rows) - by_column.high[columns]
    exponent += gate_row(gates, ROW_LOW, rows) - by_column.low[columns]
    column, row = token_pairs(columns, rows)
    seen = column >= gate_row(gates, BEGIN, rows).astype(jnp.int32)
    if columns.stop > rows.start:
        seen &= column <= row
    return jnp.exp(jnp.where(seen, exponent, -jnp.inf))


def gate_row(gates: Any, name: int, tokens: slice) -> Array:
    """Return one of the gates [8, L] along lanes, [1, tokens]."""
    return gates[name : name + 1, tokens]


class Read(NamedTuple):
    """How a block of rows, along lanes, reads its chunk and the state before it.

    Attributes:
        recall: g, [1, rows].
        denominator: d, likewise; None where it is not needed.
        inverse: of the divisor, likewise.
    """

    recall: Array
    denominator: Array | None
    inverse: Array


def read_chunk(
    plan: Plan,
    gates: Array,
    by_column: Columns,
    rows: slice,
    q: Array,
    k: Array,
    n: Array,
    scores: Any,
    weights: Any = None,
) -> Read:
    """Read with the queries of a block of rows.

    Args:
        plan, gates, by_column, rows: see above.
        q: of the rows.
        k: of the columns up to their end.
        n: as `parts`.
        scores, weights: where S and A are left, float32 [columns, rows]; A only if wanted.
    """
    recall, floor = gate_row(gates, RECALL, rows), gate_row(gates, FLOOR, rows)
    products = multiply_rows(stack(k, n) if plan.normalized else k, q)
    denominator = jnp.zeros_like(recall)
    for columns in tiles(rows.stop, LANES):
        weight = _weights(gates, by_column, rows, columns)
        score = weight * products[columns]
        denominator += sum_down(score)
        scores[columns, :] = score
        if weights is not None:
            weights[columns, :] = weight
    if not plan.normalized:
        return Read(recall, None, 1.0 / floor)
    denominator += recall * sum_down(products[rows.stop :])
    return Read(recall, denominator, 1.0 / jnp.maximum(jnp.abs(denominator), floor))


class HeadView:
    """Some tokens of one head in a block [1, tokens, heads * D], as a matrix [L, D]."""

    def __init__(self, plan: Tiling, ref: Any, chunk: Array, head: int, size: int):
        self._ref, self._first = ref, head * size
        self._tokens = pl.multiple_of(chunk * plan.chunk, plan.chunk)
        self._shape = plan.chunk, size

    def _at(self, where: tuple[slice, slice]) -> tuple:
        (top, bottom, _), (left, right, _) = (
            part.indices(size) for part, size in zip(where, self._shape, strict=True)
        )
        tokens = pl.ds(self._tokens + top, bottom - top)
        return 0, tokens, pl.ds(self._first + left, right - left)

    def __getitem__(self, where: tuple[slice, slice]) -> Array:
        return self._ref[self._at(where)]

    def __setitem__(self, where: tuple[slice, slice], value: Array) -> None:
        self._ref[self._at(where)] = value.astype(self._ref.dtype)


def walk_chunks(plan: Tiling, last_first: bool, body: Callable[[int | Array, Array], None]) -> None:
    """Call `body` with each chunk of this step, by its place in the step and in the sequence."""
    step = pl.program_id(CHUNK_AXIS)
    group = plan.steps - 1 - step if last_first else step
    count = plan.count(group)

    def turn(index, _):
        place = count - 1 - index if last_first else index
        body(place, group * plan.together + place)

    lax.fori_loop(0, count, turn, None)


def write_chunk(
    plan: Plan, gates: Array, carry: Array, k: Array, v, memory, normalizer, rounded
) -> None:
    """Advance C and n, which `memory` and `normalizer` give access to, over a chunk."""
    kept = gates[KEPT : KEPT + 1]
    written = (as_float(k.T) * kept).astype(plan.dtype)
    for columns in tiles(plan.v_dim, plan.columns):
        for rows in tiles(plan.q_dim, LANES):
            state = carry * memory[rows, columns] + multiply(written[rows], v[:, columns])
            memory[rows, columns] = state
            rounded[rows, columns] = state.astype(plan.dtype)
    normalizer[...] = carry * normalizer[...] + sum_down(multiply(exact_parts(kept, plan.dtype), k))


def in_turns(bodies: Iterable[Iterator[None]]) -> None:
    """Run generators in turns, each to its next `yield`.

    The compiler keeps to the order of the program where it can: with parts of one head between
    those of another, each fills the time that the other waits for its products.
    """
    running = list(bodies)
    while running:
        running = [body for body in running if next(body, body) is not body]


def carry_of(plan: Plan, carry: Any, head: int, chunk: Array) -> Array:
    """Return c of a head's chunk, as `Call.flat_carry` lays it out."""
    return carry[0, 0, 0, head * plan.chunks + chunk]
