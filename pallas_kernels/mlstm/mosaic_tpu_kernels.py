"""Bodies of the TPU kernels: a chunk of an mLSTM at a time, forward, and backward.

Notation of swr_jax/ops/mlstm_chunkwise.py, for one chunk of L tokens of one head:

    q, k, v       [L, Dk], [L, Dk], [L, Dv]; h like v
    C, n          memory [Dk, Dv] and normalizer [1, Dk] before the chunk
    A, g, a, c    weights of columns, and of C and n, in a row; of columns, and of C and n, in what
                  is after the chunk (pallas_kernels/mlstm/gates.py)
    S, P          A * (q k^T), and A * its cotangent; d the denominator; dX the cotangent of X

Matrices L x L are held transposed, rows i in lanes: what belongs to a row (its gates, d, the
divisor, sums over columns) is then spread over sublanes for nothing, and added up without crossing
lanes. What is used again once such a sum is known waits in VMEM, not in registers.
They are walked in blocks of 128 rows, each with the columns up to its end. C stays in VMEM from
chunk to chunk, beside a copy in the dtype of the products' operands.

Two numbers, for Dk 128, Dv 256 and chunks of 128 tokens in bfloat16, per token and head: forward
1,568 bytes and 229,376 operations of products; backward 4,400 bytes (1,024 of them states that the
first pass writes and the second reads) and 557,056.
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
    COLUMN_HIGH,
    COLUMN_LOW,
    D_COLUMN,
    D_KEPT,
    D_OWN,
    D_ROW,
    DOCUMENT,
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
class Plan:
    """What a kernel body is specialised for.

    Attributes:
        heads: of one program.
        chunks: of the sequence.
        together: chunks of one grid step, at most.
        chunk: L, a multiple of 128.
        q_dim, v_dim: Dk and Dv, multiples of 128.
        normalized: whether h is divided by max(|d|, floor), or by the floor alone.
        dtype: of the products' operands.
        columns: of a product's result that are held at a time.
    """

    heads: int
    chunks: int
    together: int
    chunk: int
    q_dim: int
    v_dim: int
    normalized: bool
    dtype: jnp.dtype
    columns: int

    @property
    def steps(self) -> int:
        """Grid steps over the chunks."""
        return pl.cdiv(self.chunks, self.together)

    def count(self, group: Array) -> int | Array:
        """Chunks in a group: the last one may have fewer."""
        if self.chunks % self.together == 0:
            return self.together
        return jnp.minimum(self.together, self.chunks - group * self.together)


def _dot(x: Array, y: Array, contract: tuple[int, int]) -> Array:
    """Product over an axis of each, accumulated in float32; float32 operands are not rounded."""
    exact = x.dtype == jnp.float32
    return lax.dot_general(
        x,
        y,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def _inner(x: Array, y: Array) -> Array:
    return _dot(x, y, (1, 1))


def _product(x: Array, y: Array) -> Array:
    return _dot(x, y, (1, 0))


def _float(x: Array) -> Array:
    return x.astype(jnp.float32)


def _tiles(size: int, tile: int) -> list[slice]:
    return [slice(start, min(start + tile, size)) for start in range(0, size, tile)]


def _above(*blocks: Array) -> Array:
    return jnp.concatenate(blocks, axis=0)


def _down(x: Array) -> Array:
    """Sum over sublanes: [R, n] -> [1, n]."""
    return jnp.sum(x, axis=0, keepdims=True)


def _fold(x: Array) -> Array:
    """Add up the registers of a row: [R, n * 128] -> [R, 128]."""
    return sum((x[:, lanes] for lanes in _tiles(x.shape[1], LANES)[1:]), x[:, :LANES])


def _wide(column: Array, width: int) -> Array:
    """[R, 128] of equal lanes -> [R, width]."""
    return jnp.concatenate([column] * (width // LANES), axis=1)


# Rows of a matrix that registers hold at a time.
_AT_A_TIME = 64
# Rows of `_parts`, a register of any dtype.
_PARTS = 16


def _parts(row: Array, dtype: jnp.dtype) -> Array:
    """Part a row [1, n] into rows [16, n] of a dtype, of which products lose nothing."""
    parts = []
    for _ in range(1 if dtype == jnp.float32 else 3):
        parts.append(row.astype(dtype))
        row = row - _float(parts[-1])
    return _above(*parts, jnp.zeros((_PARTS - len(parts), row.shape[1]), dtype))


class _Columns(NamedTuple):
    """Gates of A by column, along sublanes and alike in all lanes, [L, 128]."""

    high: Array
    low: Array
    document: Array


# Stands for the infinity of a gate that is closed, which would make NaN of zeros in a product.
_CLOSED = 1e30


def _spread(gates: Array) -> _Columns:
    """Spread gates of columns.

    By products with ones, of three parts each that no rounding touches: the unit that moves values
    across lanes would take longer.
    """
    rest, parts = jnp.minimum(gates, _CLOSED), []
    for _ in range(3):
        parts.append(_float(rest.astype(jnp.bfloat16)))
        rest = rest - parts[-1]
    parts = _above(*parts, jnp.zeros_like(rest)).astype(jnp.bfloat16).T
    names = COLUMN_HIGH, COLUMN_LOW, DOCUMENT
    shape = parts.shape[1], len(names) * LANES
    row, lane = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    chosen = functools.reduce(
        jnp.logical_or,
        ((row % 8 == name) & (lane // LANES == place) for place, name in enumerate(names)),
    )
    spread = _product(parts, jnp.where(chosen, 1.0, 0.0).astype(jnp.bfloat16))
    return _Columns(*(spread[:, lanes] for lanes in _tiles(shape[1], LANES)))


def _turn(row: Array) -> Array:
    """A row [1, n] along sublanes, alike in all lanes [n, 128]: moved across lanes."""
    column = jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1]
    return jnp.broadcast_to(column, (row.shape[1], LANES))


def _tokens(columns: slice, rows: slice) -> tuple[Array, Array]:
    """Column (along sublanes) and row (along lanes) of each entry of a block."""
    shape = (columns.stop - columns.start, rows.stop - rows.start)
    column, row = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return columns.start + column, rows.start + row


def _on_diagonal(columns: slice, rows: slice) -> Array:
    column, row = _tokens(columns, rows)
    return column == row


def _weights(gates: Array, by_column: _Columns, rows: slice, columns: slice) -> Array:
    """A of a block of rows, along lanes, with some columns up to its end, along sublanes."""
    exponent = _row(gates, ROW_HIGH, rows) - by_column.high[columns]
    exponent += _row(gates, ROW_LOW, rows) - by_column.low[columns]
    seen = _row(gates, DOCUMENT, rows) == by_column.document[columns]
    if columns.stop > rows.start:
        column, row = _tokens(columns, rows)
        seen &= column <= row
    return jnp.exp(jnp.where(seen, exponent, -jnp.inf))


def _row(gates: Array, name: int, tokens: slice) -> Array:
    return gates[name : name + 1, tokens]


class _Read(NamedTuple):
    """How a block of rows, along lanes, reads its chunk and the state before it.

    Attributes:
        recall: g, [1, rows].
        denominator: d, likewise; None where it is not needed.
        inverse: of the divisor, likewise.
    """

    recall: Array
    denominator: Array | None
    inverse: Array


def _read(
    plan: Plan,
    gates: Array,
    by_column: _Columns,
    rows: slice,
    q: Array,
    k: Array,
    n: Array,
    scores: Any,
    weights: Any = None,
) -> _Read:
    """Read with the queries of a block of rows.

    Args:
        plan, gates, by_column, rows: see above.
        q: of the rows.
        k: of the columns up to their end.
        n: as `_parts`.
        scores, weights: where S and A are left, float32 [columns, rows]; A only if wanted.
    """
    recall, floor = _row(gates, RECALL, rows), _row(gates, FLOOR, rows)
    products = _inner(_above(k, n) if plan.normalized else k, q)
    denominator = jnp.zeros_like(recall)
    for columns in _tiles(rows.stop, _AT_A_TIME):
        weight = _weights(gates, by_column, rows, columns)
        score = weight * products[columns]
        denominator += _down(score)
        scores[columns, :] = score
        if weights is not None:
            weights[columns, :] = weight
    if not plan.normalized:
        return _Read(recall, None, 1.0 / floor)
    denominator += recall * _down(products[rows.stop :])
    return _Read(recall, denominator, 1.0 / jnp.maximum(jnp.abs(denominator), floor))


class _Lanes:
    """Some tokens of one head in a block [1, tokens, heads * D], as a matrix [L, D]."""

    def __init__(self, plan: Plan, ref: Any, chunk: Array, head: int, size: int):
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


def _walk(plan: Plan, last_first: bool, body: Callable[[int | Array, Array], None]) -> None:
    """Call `body` with each chunk of this step, by its place in the step and in the sequence."""
    step = pl.program_id(CHUNK_AXIS)
    group = plan.steps - 1 - step if last_first else step
    count = plan.count(group)

    def turn(index, _):
        place = count - 1 - index if last_first else index
        body(place, group * plan.together + place)

    lax.fori_loop(0, count, turn, None)


def _write(
    plan: Plan, gates: Array, carry: Array, k: Array, v, memory, normalizer, rounded
) -> None:
    """Advance C and n, which `memory` and `normalizer` give access to, over a chunk."""
    kept = gates[KEPT : KEPT + 1]
    written = (_float(k.T) * kept).astype(plan.dtype)
    for columns in _tiles(plan.v_dim, plan.columns):
        for rows in _tiles(plan.q_dim, LANES):
            state = carry * memory[rows, columns] + _product(written[rows], v[:, columns])
            memory[rows, columns] = state
            rounded[rows, columns] = state.astype(plan.dtype)
    normalizer[...] = carry * normalizer[...] + _down(_product(_parts(kept, plan.dtype), k))


def _in_turns(bodies: Iterable[Iterator[None]]) -> None:
    """Run generators in turns, each to its next `yield`.

    The compiler keeps to the order of the program where it can: with parts of one head between
    those of another, each fills the time that the other waits for its products.
    """
    running = list(bodies)
    while running:
        running = [body for body in running if next(body, body) is not body]


def _carry(plan: Plan, carry: Any, head: int, chunk: Array) -> Array:
    return carry[0, 0, 0, head * plan.chunks + chunk]


def forward_kernel(
    plan, carry, q, k, v, gates, memory0, normalizer0, h, memory, normalizer, rounded, scores, reads
):
    """Outputs of a chunk.

    `memory` and `normalizer` are the state so far, in the end the last. Scratch, for each head:
    `rounded` is C in the dtype of the products' operands; of a block of rows, `scores` is S and
    `reads` what h is a product of, both [columns, rows].
    """

    @pl.when(pl.program_id(CHUNK_AXIS) == 0)
    def _():
        memory[...] = memory0[...]
        rounded[...] = memory0[0].astype(plan.dtype)
        normalizer[...] = normalizer0[...]

    def read_and_write(place, chunk):
        _in_turns(run(head, place, chunk) for head in range(plan.heads))

    def run(head, place, chunk):
        of_head = gates[0, head, place]
        by_column = _spread(of_head)
        queries, keys = (_Lanes(plan, x, place, head, plan.q_dim) for x in (q, k))
        values, outputs = (_Lanes(plan, x, place, head, plan.v_dim) for x in (v, h))
        state, sums, copy = memory.at[0, head], normalizer.at[0, head], rounded.at[head]
        n = _parts(sums[...], plan.dtype)
        for rows in _tiles(plan.chunk, LANES):
            query, stop = queries[rows, :], rows.stop
            read = _read(
                plan, *(of_head, by_column, rows, query, keys[:stop, :], n), scores.at[head]
            )
            yield
            # What a row reads of the chunk and of the memory, in one product.
            for columns in _tiles(stop, _AT_A_TIME):
                weighed = scores[head, columns] * read.inverse
                reads[head, columns] = weighed.astype(plan.dtype)
            weighed = _float(query.T) * (read.recall * read.inverse)
            reads[head, stop : stop + plan.q_dim] = weighed.astype(plan.dtype)
            turned = reads[head, : stop + plan.q_dim].T
            for columns in _tiles(plan.v_dim, plan.columns):
                stored = _above(values[:stop, columns], copy[:, columns])
                outputs[rows, columns] = _product(turned, stored)
        factor = _carry(plan, carry, head, chunk)
        _write(plan, of_head, factor, keys[:, :], values, state, sums, copy)

    _walk(plan, False, read_and_write)


def states_kernel(
    plan, carry, k, v, gates, memory0, normalizer0, states, sums, memory, normalizer, rounded
):
    """The states before each chunk; `memory`, `normalizer` and `rounded` are scratch."""

    @pl.when(pl.program_id(CHUNK_AXIS) == 0)
    def _():
        memory[...] = memory0[0]
        rounded[...] = memory0[0].astype(plan.dtype)
        normalizer[...] = normalizer0[0]

    def write(place, chunk):
        for head in range(plan.heads):
            states[0, head, place] = rounded[head]
            sums[0, head, place] = normalizer[head]
            keys = _Lanes(plan, k, place, head, plan.q_dim)
            values = _Lanes(plan, v, place, head, plan.v_dim)
            factor = _carry(plan, carry, head, chunk)
            state = memory.at[head], normalizer.at[head], rounded.at[head]
            _write(plan, gates[0, head, place], factor, keys[:, :], values, *state)

    _walk(plan, False, write)


@dataclasses.dataclass(frozen=True)
class Scratch:
    """Of the backward kernel, for each head.

    Attributes:
        scores: S / divisor, [heads, L, L], columns and rows; later columns stay unwritten. In the
            dtype of the products' operands, as the following ones.
        dweights: P, likewise.
        reads: g q / divisor, [heads, Dk, L].
        rounded: dC, [heads, Dk, Dv].
        block: of a block of rows, A, S and dS, and of all so far the cotangent of log A, summed
            over blocks, [heads, 4, L, 128], in float32.
        query: of a block of rows, q and its cotangent, [heads, 2, Dk, 128], likewise.
        rows: 1 / divisor, the derivative of the divisor by d, and g dd, [heads, 8, L], likewise.
    """

    scores: Any
    dweights: Any
    reads: Any
    rounded: Any
    block: Any
    query: Any
    rows: Any


def backward_kernel(plan, carry, inputs, dstate0, outputs, dstate, scratch: Scratch):
    """Cotangents of a chunk; chunks come from the last to the first.

    Args:
        plan, carry: as above.
        inputs: q, k, v, gates, dh, and C and n before each chunk.
        dstate0: cotangents of the last C and n.
        outputs: dq, dk, dv, dgates, and of log c, to be summed over lanes.
        dstate: cotangents of the state after the chunk; in the end of the first state.
        scratch: see there.
    """

    @pl.when(pl.program_id(CHUNK_AXIS) == 0)
    def _():
        for first, ref in zip(dstate0, dstate, strict=True):
            ref[...] = first[...]
        scratch.rounded[...] = dstate0[0][0].astype(plan.dtype)

    q, k, v, gates, dh, states, sums = inputs
    dq, dk, dv, dgates, dcarry = outputs

    def pull_back(place, chunk):
        chunks = [
            _Chunk(
                plan,
                _carry(plan, carry, head, chunk),
                gates.at[0, head, place],
                *(_Lanes(plan, x, place, head, plan.q_dim) for x in (q, k, dq, dk)),
                *(_Lanes(plan, x, place, head, plan.v_dim) for x in (v, dh, dv)),
                *(states.at[0, head, place], sums.at[0, head, place]),
                *(x.at[0, head] for x in dstate),
                *(dgates.at[0, head, place], dcarry.at[0, head, place]),
                Scratch(*(getattr(scratch, x.name).at[head] for x in dataclasses.fields(Scratch))),
            )
            for head in range(plan.heads)
        ]
        _in_turns(map(_pull_back, chunks))

    _walk(plan, True, pull_back)


class _Chunk(NamedTuple):
    """One head's chunk in the backward pass, and the access to all that belongs to it."""

    plan: Plan
    carry: Array
    gates: Any
    q: _Lanes
    k: _Lanes
    dq: _Lanes
    dk: _Lanes
    v: _Lanes
    dh: _Lanes
    dv: _Lanes
    memory: Any
    normalizer: Any
    dmemory: Any
    dnormalizer: Any
    dgates: Any
    dcarry: Any
    scratch: Scratch


def _pull_back(x: _Chunk) -> Iterator[None]:
    """Cotangents of one head's chunk."""
    for rows in _tiles(x.plan.chunk, LANES):
        _read_rows(rows, x)
        yield
        _pull_back_rows(rows, x)
        yield
        _pull_back_queries(rows, x)
    for columns in _tiles(x.plan.chunk, LANES):
        _pull_back_columns(columns, x)
    _pull_back_state(x)


# Rows of what is kept of rows.
_INVERSE, _SLOPE, _DSUM = range(3)


def _read_rows(rows: slice, x: _Chunk) -> None:
    """Leave what a block of rows reads: A, S, and how d depends on them."""
    plan, scratch, gates = x.plan, x.scratch, x.gates[...]
    by_column = _spread(gates)
    weights, scores, *_ = (scratch.block.at[index] for index in range(4))
    query = x.q[rows, :]
    parts = _parts(x.normalizer[...], plan.dtype)
    read = _read(
        plan, *(gates, by_column, rows, query, x.k[: rows.stop, :], parts), scores, weights
    )
    scratch.rows[_INVERSE : _INVERSE + 1, rows] = read.inverse
    if plan.normalized:
        floor = _row(gates, FLOOR, rows)
        slope = jnp.where(jnp.abs(read.denominator) > floor, jnp.sign(read.denominator), 0.0)
        scratch.rows[_SLOPE : _SLOPE + 1, rows] = slope
    turned = _float(query.T)
    scratch.query[0] = turned
    scratch.reads[:, rows] = (turned * (read.recall * read.inverse)).astype(plan.dtype)


def _pull_back_rows(rows: slice, x: _Chunk) -> None:
    """Through h to A and to what a block of rows recalls."""
    plan, scratch, stop = x.plan, x.scratch, rows.stop
    weights, scores, dscores, dcolumns = (scratch.block.at[index] for index in range(4))
    turned, recalled = (scratch.query.at[index] for index in range(2))
    recall, inverse = _row(x.gates, RECALL, rows), _row(scratch.rows, _INVERSE, rows)
    through = _inner(_above(x.v[:stop, :], x.memory[...]), x.dh[rows, :])
    total = jnp.zeros_like(inverse)
    for columns in _tiles(stop, _AT_A_TIME):
        total += _down(scores[columns] * through[columns])
        dscores[columns] = through[columns]
    for features in _tiles(plan.q_dim, _AT_A_TIME):
        through_memory = through[stop + features.start : stop + features.stop]
        recalled[features] = through_memory
        total += recall * _down(turned[features] * through_memory)
    dd = jnp.zeros_like(total)
    if plan.normalized:
        dd = -total * (inverse * inverse) * _row(scratch.rows, _SLOPE, rows)
        scratch.rows[_DSUM : _DSUM + 1, rows] = recall * dd

    drow = jnp.zeros_like(total)
    down = jnp.zeros_like(total)
    for columns in _tiles(stop, _AT_A_TIME):
        score, dscore = scores[columns], dscores[columns] * inverse + dd
        scratch.scores[columns, rows] = (score * inverse).astype(plan.dtype)
        scratch.dweights[columns, rows] = (weights[columns] * dscore).astype(plan.dtype)
        dlog_weights = score * dscore
        if columns.stop > rows.start:
            own = _on_diagonal(columns, rows)
            down += _down(jnp.where(own, dlog_weights, 0.0))
            dlog_weights = jnp.where(own, 0.0, dlog_weights)
            dcolumns[columns] = dlog_weights
        else:
            dcolumns[columns] += dlog_weights
        drow += _down(dlog_weights)
    x.dgates[D_OWN : D_OWN + 1, rows] = down
    x.dgates[D_ROW : D_ROW + 1, rows] = drow


def _pull_back_queries(rows: slice, x: _Chunk) -> None:
    """Queries of a block of rows, and the sums of their part in what is recalled."""
    plan, scratch, stop = x.plan, x.scratch, rows.stop
    turned, recalled = (scratch.query.at[index] for index in range(2))
    recall, inverse = _row(x.gates, RECALL, rows), _row(scratch.rows, _INVERSE, rows)
    if plan.normalized:
        n_column = _turn(x.normalizer[...])
        dsum = _row(scratch.rows, _DSUM, rows)
    inside = _product(x.k[:stop, :].T, scratch.dweights[:stop, rows])
    drow = x.dgates[D_ROW : D_ROW + 1, rows]
    for features in _tiles(plan.q_dim, _AT_A_TIME):
        dquery = recalled[features] * (recall * inverse)
        if plan.normalized:
            dquery += n_column[features] * dsum
        drow += _down(turned[features] * dquery)
        recalled[features] = inside[features] + dquery
    x.dq[rows, :] = recalled[...].astype(plan.dtype).T
    x.dgates[D_ROW : D_ROW + 1, rows] = drow


def _pull_back_columns(columns: slice, x: _Chunk) -> None:
    """Keys and values of a block of columns, through the chunk and the state after it."""
    plan, scratch = x.plan, x.scratch
    kept = _wide(_turn(_row(x.gates, KEPT, columns)), plan.q_dim)
    ones = jnp.ones((_PARTS, plan.q_dim), plan.dtype)
    later = slice(columns.start, plan.chunk)
    key, query = _float(x.k[columns, :]), x.q[later, :]
    inside = _product(scratch.dweights[columns, later], query)
    written = _inner(x.v[columns, :], scratch.rounded[...]) + x.dnormalizer[...]
    written *= kept
    x.dk[columns, :] = inside + written
    dkept = _inner(ones, (written * key).astype(plan.dtype))
    x.dgates[D_KEPT : D_KEPT + 1, columns] = dkept[:1]
    x.dgates[D_COLUMN : D_COLUMN + 1, columns] = _along_lanes(scratch.block[3, columns])
    # What reads a column, in the chunk and behind it, in one product.
    reads = scratch.scores[columns, later], (kept * key).astype(plan.dtype)
    reads = jnp.concatenate(reads, axis=1)
    for lanes in _tiles(plan.v_dim, plan.columns):
        stored = _above(x.dh[later, lanes], scratch.rounded[:, lanes])
        x.dv[columns, lanes] = _product(reads, stored)


def _pull_back_state(x: _Chunk) -> None:
    """To the state before the chunk."""
    plan, scratch = x.plan, x.scratch
    dlog_carry = _fold(x.carry * x.dnormalizer[...] * x.normalizer[...])
    for rows in _tiles(plan.q_dim, LANES):
        for lanes in _tiles(plan.v_dim, plan.columns):
            passed = x.carry * x.dmemory[rows, lanes]
            dlog_carry += _fold(_down(passed * _float(x.memory[rows, lanes])))
            passed += _product(scratch.reads[rows, :], x.dh[:, lanes])
            x.dmemory[rows, lanes] = passed
            scratch.rounded[rows, lanes] = passed.astype(plan.dtype)
    dn = x.carry * x.dnormalizer[...]
    if plan.normalized:
        dsum = _parts(scratch.rows[_DSUM : _DSUM + 1, :], plan.dtype)
        dn += _down(_product(dsum, x.q[:, :]))
    x.dnormalizer[...] = dn
    x.dcarry[...] = dlog_carry


def _along_lanes(block: Array) -> Array:
    """Sums over the lanes of a block [128, 128], one beside the other [1, 128]."""
    sums = jnp.broadcast_to(jnp.sum(block, axis=1, keepdims=True), block.shape)
    own = _on_diagonal(slice(0, LANES), slice(0, LANES))
    return _down(jnp.where(own, sums, 0.0))
