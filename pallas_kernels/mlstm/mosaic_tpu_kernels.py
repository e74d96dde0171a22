"""Bodies of the TPU kernels: a chunk of an mLSTM at a time, forward, and backward.

Notation of swr_jax/ops/mlstm_chunkwise.py, for one chunk of L tokens of one head:

    q, k, v       [L, Dk], [L, Dk], [L, Dv]; h like v
    C, n          memory [Dk, Dv] and normalizer [1, Dk] before the chunk
    A, g, a, c    weights of columns, and of C and n, in a row; of columns, and of C and n, in what
                  is after the chunk (pallas_kernels/mlstm/gates.py)
    S, P          A * (q k^T), and A * its cotangent; d the denominator; dX the cotangent of X

Matrices L x L are walked in blocks of 128 rows, each with the columns up to its end. C stays in
VMEM from chunk to chunk.

Two numbers, for Dk 128, Dv 256 and chunks of 128 tokens in bfloat16, per token and head: forward
1,568 bytes and 229,376 operations of products; backward 4,400 bytes (1,024 of them states that the
first pass writes and the second reads) and 557,056.
"""

import dataclasses
from typing import Any

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
# The grid is (batch, groups of heads, chunks).
CHUNK_AXIS = 2


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a kernel body is specialised for.

    Attributes:
        heads: of one program.
        chunk: L, a multiple of 128.
        q_dim, v_dim: Dk and Dv, multiples of 128.
        normalized: whether h is divided by max(|d|, floor), or by the floor alone.
        dtype: of the products' operands.
        columns: of a product's result that are held at a time.
    """

    heads: int
    chunk: int
    q_dim: int
    v_dim: int
    normalized: bool
    dtype: jnp.dtype
    columns: int


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


def _outer(x: Array, y: Array) -> Array:
    return _dot(x, y, (0, 0))


def _tiles(size: int, tile: int) -> list[slice]:
    return [slice(start, min(start + tile, size)) for start in range(0, size, tile)]


def _fold(x: Array) -> Array:
    """Add up the registers of a row: [R, n * 128] -> [R, 128]."""
    return sum((x[:, lanes] for lanes in _tiles(x.shape[1], LANES)[1:]), x[:, :LANES])


def _wide(column: Array, width: int) -> Array:
    """[R, 128] of equal lanes -> [R, width]."""
    return jnp.concatenate([column] * (width // LANES), axis=1)


def _spread(column: Array) -> Array:
    """[R, 1] -> [R, 128]."""
    return jnp.broadcast_to(column, (column.shape[0], LANES))


def _row_sum(x: Array) -> Array:
    """Sum over lanes, in every lane: [R, 128] -> [R, 128]."""
    return _spread(jnp.sum(x, axis=1, keepdims=True))


class _Gates:
    """Gates of a chunk by token, along lanes and along sublanes."""

    def __init__(self, gates: Array):
        self._rows = gates
        self._columns = gates.T

    def row(self, name: int, columns: slice) -> Array:
        """[1, columns]."""
        return self._rows[name : name + 1, columns]

    def column(self, name: int, rows: slice) -> Array:
        """[rows, 128], all lanes alike."""
        return _spread(self._columns[rows, name : name + 1])


def _below(rows: slice, columns: slice, strictly: bool) -> Array:
    shape = (rows.stop - rows.start, columns.stop - columns.start)
    row = rows.start + lax.broadcasted_iota(jnp.int32, shape, 0)
    column = columns.start + lax.broadcasted_iota(jnp.int32, shape, 1)
    return row > column if strictly else row >= column


def _weights(gates: _Gates, rows: slice) -> Array:
    """A of a block of rows with the columns up to its end."""
    blocks = []
    high, low = gates.column(ROW_HIGH, rows), gates.column(ROW_LOW, rows)
    document = gates.column(DOCUMENT, rows)
    for columns in _tiles(rows.stop, LANES):
        exponent = (high - gates.row(COLUMN_HIGH, columns)) + (low - gates.row(COLUMN_LOW, columns))
        seen = document == gates.row(DOCUMENT, columns)
        if columns == rows:
            seen &= _below(rows, columns, strictly=False)
        blocks.append(jnp.exp(jnp.where(seen, exponent, -jnp.inf)))
    return jnp.concatenate(blocks, axis=1)


def _float(x: Array) -> Array:
    return x.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class _Read:
    """How a block of rows reads its chunk and the state before it.

    Attributes:
        weights: A.
        scores: S.
        recall: g, [R, 128].
        query: q in float32.
        denominator: d, [R, 128]; None where it is not needed.
        divisor: [R, 128].
    """

    weights: Array
    scores: Array
    recall: Array
    query: Array
    denominator: Array | None
    divisor: Array


def _read(plan: Plan, gates: _Gates, rows: slice, q: Array, k: Array, n: Array) -> _Read:
    """q of the block of rows, k of the columns up to its end."""
    weights = _weights(gates, rows)
    scores = weights * _inner(q, k)
    recall, query = gates.column(RECALL, rows), _float(q)
    divisor, denominator = gates.column(FLOOR, rows), None
    if plan.normalized:
        denominator = _row_sum(_fold(scores) + recall * _fold(query * n))
        divisor = jnp.maximum(jnp.abs(denominator), divisor)
    return _Read(weights, scores, recall, query, denominator, divisor)


def _write(plan: Plan, gates: _Gates, carry: Array, k: Array, v, memory, normalizer) -> None:
    """Advance C and n, which the last two give access to, over a chunk."""
    chunk = slice(0, plan.chunk)
    written = _wide(gates.column(KEPT, chunk), plan.q_dim) * _float(k)
    keys = written.astype(plan.dtype)
    for columns in _tiles(plan.v_dim, plan.columns):
        for rows in _tiles(plan.q_dim, LANES):
            memory[rows, columns] = carry * memory[rows, columns] + _outer(
                keys[:, rows], v[:, columns]
            )
    normalizer[...] = carry * normalizer[...] + jnp.sum(written, axis=0, keepdims=True)


class _Lanes:
    """The lanes of one head in a block [1, L, heads * D], as a matrix [L, D]."""

    def __init__(self, ref, head: int, size: int):
        self._ref, self._first = ref, head * size
        self.all = slice(0, ref.shape[1]), slice(0, size)

    def _at(self, where):
        rows, columns = where
        rows = slice(*rows.indices(self._ref.shape[1]))
        columns = slice(*columns.indices(self.all[1].stop))
        return (
            0,
            pl.ds(rows.start, rows.stop - rows.start),
            pl.ds(self._first + columns.start, columns.stop - columns.start),
        )

    def __getitem__(self, where) -> Array:
        return self._ref[self._at(where)]

    def __setitem__(self, where, value: Array) -> None:
        self._ref[self._at(where)] = value.astype(self._ref.dtype)


def forward_kernel(
    plan, carry, q, k, v, gates, memory0, normalizer0, h, memory, normalizer, rounded
):
    """Outputs of a chunk.

    `memory` and `normalizer` are the state so far, in the end the last; `rounded` is scratch.
    """
    step = pl.program_id(CHUNK_AXIS)

    @pl.when(step == 0)
    def _():
        memory[...] = memory0[...]
        normalizer[...] = normalizer0[...]

    for head in range(plan.heads):
        weights = _Gates(gates[0, head, 0])
        queries, keys = (_Lanes(x, head, plan.q_dim) for x in (q, k))
        values, outputs = (_Lanes(x, head, plan.v_dim) for x in (v, h))
        state, sums = memory.at[0, head], normalizer.at[0, head]
        rounded[head] = state[...].astype(plan.dtype)
        for rows in _tiles(plan.chunk, LANES):
            query = queries[rows, :]
            read = _read(plan, weights, rows, query, keys[: rows.stop, :], sums[...])
            scores = read.scores.astype(plan.dtype)
            inverse = 1.0 / read.divisor
            for columns in _tiles(plan.v_dim, plan.columns):
                width = columns.stop - columns.start
                recalled = _product(query, rounded[head, :, columns])
                numerator = _product(scores, values[: rows.stop, columns])
                numerator += _wide(read.recall, width) * recalled
                outputs[rows, columns] = numerator * _wide(inverse, width)
        factor = carry[0, 0, 0, head * pl.num_programs(CHUNK_AXIS) + step]
        _write(plan, weights, factor, keys[:, :], values, state, sums)


def states_kernel(plan, carry, k, v, gates, memory0, normalizer0, states, sums, memory, normalizer):
    """The states before each chunk; `memory` and `normalizer` are scratch."""
    step = pl.program_id(CHUNK_AXIS)

    @pl.when(step == 0)
    def _():
        memory[...] = memory0[0]
        normalizer[...] = normalizer0[0]

    for head in range(plan.heads):
        states[0, head, 0] = memory[head].astype(states.dtype)
        sums[0, head, 0] = normalizer[head]
        weights = _Gates(gates[0, head, 0])
        keys, values = _Lanes(k, head, plan.q_dim), _Lanes(v, head, plan.v_dim)
        factor = carry[0, 0, 0, head * pl.num_programs(CHUNK_AXIS) + step]
        state = memory.at[head], normalizer.at[head]
        _write(plan, weights, factor, keys[:, :], values, *state)


@dataclasses.dataclass(frozen=True)
class Scratch:
    """Of the backward kernel, for each head, in the dtype of the products' operands.

    Attributes:
        scores, weights: S and P, [heads, L, L]; blocks above the diagonal are never written.
        outputs: dH, [heads, L, Dv].
        reads: g q, [heads, L, Dk].
        rounded: dC, [heads, Dk, Dv].
    """

    scores: Any
    weights: Any
    outputs: Any
    reads: Any
    rounded: Any


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
    step = pl.program_id(CHUNK_AXIS)
    chunk = pl.num_programs(CHUNK_AXIS) - 1 - step

    @pl.when(step == 0)
    def _():
        for first, ref in zip(dstate0, dstate, strict=True):
            ref[...] = first[...]

    q, k, v, gates, dh, states, sums = inputs
    dq, dk, dv, dgates, dcarry = outputs
    for head in range(plan.heads):
        _pull_back(
            plan,
            carry[0, 0, 0, head * pl.num_programs(CHUNK_AXIS) + chunk],
            _Gates(gates[0, head, 0]),
            tuple(_Lanes(x, head, plan.q_dim) for x in (q, k, dq, dk)),
            tuple(_Lanes(x, head, plan.v_dim) for x in (v, dh, dv)),
            (states.at[0, head, 0], sums[0, head, 0]),
            tuple(x.at[0, head] for x in dstate),
            (dgates.at[0, head, 0], dcarry.at[0, head, 0]),
            Scratch(*(getattr(scratch, x.name).at[head] for x in dataclasses.fields(Scratch))),
        )


def _pull_back(plan, carry, gates, query_key, value, state, dstate, dgates, scratch) -> None:
    """Cotangents of one head's chunk."""
    q, k, dq, dk = query_key
    v, dh, dv = value
    memory, n = state
    dmemory, dnormalizer = dstate
    dgates, dcarry = dgates
    blocks = _tiles(plan.chunk, LANES)
    eye = lax.broadcasted_iota(jnp.int32, (LANES, LANES), 0) == lax.broadcasted_iota(
        jnp.int32, (LANES, LANES), 1
    )

    def along_lanes(column: Array) -> Array:
        """[128, 128] of equal lanes -> [1, 128]."""
        return jnp.sum(jnp.where(eye, column, 0.0), axis=0, keepdims=True)

    def store(name: int, columns: slice, row: Array) -> None:
        dgates[name : name + 1, columns] = row

    # Through h, block of rows by block of rows.
    dcolumns = [jnp.zeros((1, LANES), jnp.float32)] * len(blocks)
    dn = carry * dnormalizer[...]
    for rows in blocks:
        read = _read(plan, gates, rows, q[rows, :], k[: rows.stop, :], n)
        inverse = 1.0 / read.divisor
        dnumerator = (_float(dh[rows, :]) * _wide(inverse, plan.v_dim)).astype(plan.dtype)
        scratch.outputs[rows, :] = dnumerator
        reads = _wide(read.recall, plan.q_dim) * read.query
        scratch.reads[rows, :] = reads.astype(plan.dtype)
        scratch.scores[rows, : rows.stop] = read.scores.astype(plan.dtype)

        dscores = _inner(dnumerator, v[: rows.stop, :])
        drecalled = _inner(dnumerator, memory[...])
        dlog_weights = read.scores * dscores
        if plan.normalized:
            floor = gates.column(FLOOR, rows)
            slope = jnp.where(jnp.abs(read.denominator) > floor, jnp.sign(read.denominator), 0.0)
            total = _row_sum(_fold(dlog_weights) + _fold(reads * drecalled))
            dd = -total * inverse * slope
            dlog_weights += read.scores * _wide(dd, rows.stop)
            dscores += _wide(dd, rows.stop)
            drecalled += _wide(dd, plan.q_dim) * n
            dn += jnp.sum(_wide(dd, plan.q_dim) * reads, axis=0, keepdims=True)
        dweights = (read.weights * dscores).astype(plan.dtype)
        scratch.weights[rows, : rows.stop] = dweights
        from_memory = _wide(read.recall, plan.q_dim) * drecalled
        dq[rows, :] = _product(dweights, k[: rows.stop, :]) + from_memory

        own = dlog_weights[:, rows]
        store(D_OWN, rows, jnp.sum(jnp.where(eye, own, 0.0), axis=0, keepdims=True))
        below = jnp.where(_below(rows, rows, strictly=True), own, 0.0)
        earlier = [dlog_weights[:, columns] for columns in blocks if columns.stop < rows.stop]
        for index, block in enumerate([*earlier, below]):
            dcolumns[index] += jnp.sum(block, axis=0, keepdims=True)
        total = sum(earlier, below) + _fold(read.query * from_memory)
        store(D_ROW, rows, along_lanes(_row_sum(total)))

    # Through the state after the chunk, block of columns by block of columns.
    scratch.rounded[...] = dmemory[...].astype(plan.dtype)
    for columns, dcolumn in zip(blocks, dcolumns, strict=True):
        later = slice(columns.start, plan.chunk)
        kept, key = gates.column(KEPT, columns), k[columns, :]
        written = _inner(v[columns, :], scratch.rounded[...]) + dnormalizer[...]
        written *= _wide(kept, plan.q_dim)
        dk[columns, :] = written + _outer(scratch.weights[later, columns], q[later, :])
        store(D_COLUMN, columns, dcolumn)
        store(D_KEPT, columns, along_lanes(_row_sum(_fold(written * _float(key)))))
        for lanes in _tiles(plan.v_dim, plan.columns):
            through_state = _product(key, scratch.rounded[:, lanes])
            through_state *= _wide(kept, lanes.stop - lanes.start)
            inside = _outer(scratch.scores[later, columns], scratch.outputs[later, lanes])
            dv[columns, lanes] = inside + through_state

    # To the state before the chunk.
    dlog_carry = _fold(carry * dnormalizer[...] * n)
    for rows in _tiles(plan.q_dim, LANES):
        for lanes in _tiles(plan.v_dim, plan.columns):
            passed = carry * dmemory[rows, lanes]
            product = jnp.sum(passed * _float(memory[rows, lanes]), axis=0, keepdims=True)
            dlog_carry += _fold(product)
            dmemory[rows, lanes] = passed + _outer(
                scratch.reads[:, rows], scratch.outputs[:, lanes]
            )
    dnormalizer[...] = dn
    dcarry[...] = dlog_carry
