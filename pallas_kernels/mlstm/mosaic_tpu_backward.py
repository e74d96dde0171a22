"""Body of the TPU kernel of an mLSTM's backward pass.

Notation and layout: pallas_kernels/mlstm/mosaic_tpu_kernels.py. With dX the cotangent of X and P
that of q k^T, from right to left:

    dH = dh / divisor    dS = dH v^T    dd = -(sum_j (S dS)_ij + dH_i . (g q C)_i) / divisor
    P = A (dS + dd)      dlog A = S (dS + dd)
    dq = P k + g (dH C^T + dd n)        dv = S^T dH + a k dC
    dk = P^T q + w,  w = a (v dC^T + dn)
    dC <- c dC + (g q)^T dH             dn <- c dn + sum_i g_i dd_i q_i

where dd is 0 on the floor. Cotangents of gates are sums over rows and columns of dlog A, w k, and
dC C + dn n.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.mlstm.gates import D_COLUMN, D_KEPT, D_OWN, D_ROW, FLOOR, KEPT, RECALL
from pallas_kernels.mlstm.mosaic_tpu_chunk import carry_of, gate_row, read_chunk, spread_gates
from pallas_kernels.mlstm.mosaic_tpu_plan import Plan
from pallas_kernels.tpu.arithmetic import (
    PARTS,
    as_float,
    exact_parts,
    fold_lanes,
    multiply,
    multiply_rows,
    on_diagonal,
    stack,
    sum_down,
    tiles,
    turn_row,
    widen,
)
from pallas_kernels.tpu.chip import LANES
from pallas_kernels.tpu.chunks import CHUNK_AXIS, HeadView, in_turns, walk_chunks

Array = jax.Array


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
                carry_of(plan, carry, head, chunk),
                gates.at[0, head, place],
                *(HeadView(plan, x, place, head, plan.q_dim) for x in (q, k, dq, dk)),
                *(HeadView(plan, x, place, head, plan.v_dim) for x in (v, dh, dv)),
                *(states.at[0, head, place], sums.at[0, head, place]),
                *(x.at[0, head] for x in dstate),
                *(dgates.at[0, head, place], dcarry.at[0, head, place]),
                Scratch(*(getattr(scratch, x.name).at[head] for x in dataclasses.fields(Scratch))),
            )
            for head in range(plan.heads)
        ]
        in_turns(map(_pull_back, chunks))

    walk_chunks(plan, True, pull_back)


class _Chunk(NamedTuple):
    """One head's chunk in the backward pass, and the access to all that belongs to it."""

    plan: Plan
    carry: Array
    gates: Any
    q: HeadView
    k: HeadView
    dq: HeadView
    dk: HeadView
    v: HeadView
    dh: HeadView
    dv: HeadView
    memory: Any
    normalizer: Any
    dmemory: Any
    dnormalizer: Any
    dgates: Any
    dcarry: Any
    scratch: Scratch


def _pull_back(x: _Chunk) -> Iterator[None]:
    """Cotangents of one head's chunk."""
    for rows in tiles(x.plan.chunk, LANES):
        _read_rows(rows, x)
        yield
        _pull_back_rows(rows, x)
        yield
        _pull_back_queries(rows, x)
    for columns in tiles(x.plan.chunk, LANES):
        _pull_back_columns(columns, x)
    _pull_back_state(x)


# Rows of what is kept of rows.
_INVERSE, _SLOPE, _DSUM = range(3)


def _read_rows(rows: slice, x: _Chunk) -> None:
    """Leave what a block of rows reads: A, S, and how d depends on them."""
    plan, scratch, gates = x.plan, x.scratch, x.gates[...]
    by_column = spread_gates(gates)
    weights, scores, *_ = (scratch.block.at[index] for index in range(4))
    query = x.q[rows, :]
    parts = exact_parts(x.normalizer[...], plan.dtype)
    read = read_chunk(
        plan, *(gates, by_column, rows, query, x.k[: rows.stop, :], parts), scores, weights
    )
    scratch.rows[_INVERSE : _INVERSE + 1, rows] = read.inverse
    if plan.normalized:
        floor = gate_row(gates, FLOOR, rows)
        slope = jnp.where(jnp.abs(read.denominator) > floor, jnp.sign(read.denominator), 0.0)
        scratch.rows[_SLOPE : _SLOPE + 1, rows] = slope
    turned = as_float(query.T)
    scratch.query[0] = turned
    scratch.reads[:, rows] = (turned * (read.recall * read.inverse)).astype(plan.dtype)


def _pull_back_rows(rows: slice, x: _Chunk) -> None:
    """Through h to A and to what a block of rows recalls."""
    plan, scratch, stop = x.plan, x.scratch, rows.stop
    weights, scores, dscores, dcolumns = (scratch.block.at[index] for index in range(4))
    turned, recalled = (scratch.query.at[index] for index in range(2))
    recall, inverse = gate_row(x.gates, RECALL, rows), gate_row(scratch.rows, _INVERSE, rows)
    through = multiply_rows(stack(x.v[:stop, :], x.memory[...]), x.dh[rows, :])
    total = jnp.zeros_like(inverse)
    for columns in tiles(stop, LANES):
        total += sum_down(scores[columns] * through[columns])
        dscores[columns] = through[columns]
    for features in tiles(plan.q_dim, LANES):
        through_memory = through[stop + features.start : stop + features.stop]
        recalled[features] = through_memory
        total += recall * sum_down(turned[features] * through_memory)
    dd = jnp.zeros_like(total)
    if plan.normalized:
        dd = -total * (inverse * inverse) * gate_row(scratch.rows, _SLOPE, rows)
        scratch.rows[_DSUM : _DSUM + 1, rows] = recall * dd

    drow = jnp.zeros_like(total)
    down = jnp.zeros_like(total)
    for columns in tiles(stop, LANES):
        score, dscore = scores[columns], dscores[columns] * inverse + dd
        scratch.scores[columns, rows] = (score * inverse).astype(plan.dtype)
        scratch.dweights[columns, rows] = (weights[columns] * dscore).astype(plan.dtype)
        dlog_weights = score * dscore
        if columns.stop > rows.start:
            own = on_diagonal(columns, rows)
            down += sum_down(jnp.where(own, dlog_weights, 0.0))
            dlog_weights = jnp.where(own, 0.0, dlog_weights)
            dcolumns[columns] = dlog_weights
        else:
            dcolumns[columns] += dlog_weights
        drow += sum_down(dlog_weights)
    x.dgates[D_OWN : D_OWN + 1, rows] = down
    x.dgates[D_ROW : D_ROW + 1, rows] = drow


def _pull_back_queries(rows: slice, x: _Chunk) -> None:
    """Queries of a block of rows, and the sums of their part in what is recalled."""
    plan, scratch, stop = x.plan, x.scratch, rows.stop
    turned, recalled = (scratch.query.at[index] for index in range(2))
    recall, inverse = gate_row(x.gates, RECALL, rows), gate_row(scratch.rows, _INVERSE, rows)
    if plan.normalized:
        n_column = turn_row(x.normalizer[...])
        dsum = gate_row(scratch.rows, _DSUM, rows)
    inside = multiply(x.k[:stop, :].T, scratch.dweights[:stop, rows])
    drow = x.dgates[D_ROW : D_ROW + 1, rows]
    for features in tiles(plan.q_dim, LANES):
        dquery = recalled[features] * (recall * inverse)
        if plan.normalized:
            dquery += n_column[features] * dsum
        drow += sum_down(turned[features] * dquery)
        recalled[features] = inside[features] + dquery
    x.dq[rows, :] = recalled[...].astype(plan.dtype).T
    x.dgates[D_ROW : D_ROW + 1, rows] = drow


def _pull_back_columns(columns: slice, x: _Chunk) -> None:
    """Keys and values of a block of columns, through the chunk and the state after it."""
    plan, scratch = x.plan, x.scratch
    kept = widen(turn_row(gate_row(x.gates, KEPT, columns)), plan.q_dim)
    ones = jnp.ones((PARTS, plan.q_dim), plan.dtype)
    later = slice(columns.start, plan.chunk)
    key, query = as_float(x.k[columns, :]), x.q[later, :]
    inside = multiply(scratch.dweights[columns, later], query)
    written = multiply_rows(x.v[columns, :], scratch.rounded[...]) + x.dnormalizer[...]
    written *= kept
    x.dk[columns, :] = inside + written
    dkept = multiply_rows(ones, (written * key).astype(plan.dtype))
    x.dgates[D_KEPT : D_KEPT + 1, columns] = dkept[:1]
    x.dgates[D_COLUMN : D_COLUMN + 1, columns] = _along_lanes(scratch.block[3, columns])
    # What reads a column, in the chunk and behind it, in one product.
    reads = scratch.scores[columns, later], (kept * key).astype(plan.dtype)
    reads = jnp.concatenate(reads, axis=1)
    for lanes in tiles(plan.v_dim, plan.columns):
        stored = stack(x.dh[later, lanes], scratch.rounded[:, lanes])
        x.dv[columns, lanes] = multiply(reads, stored)


def _pull_back_state(x: _Chunk) -> None:
    """To the state before the chunk."""
    plan, scratch = x.plan, x.scratch
    dlog_carry = fold_lanes(x.carry * x.dnormalizer[...] * x.normalizer[...])
    for rows in tiles(plan.q_dim, LANES):
        for lanes in tiles(plan.v_dim, plan.columns):
            passed = x.carry * x.dmemory[rows, lanes]
            dlog_carry += fold_lanes(sum_down(passed * as_float(x.memory[rows, lanes])))
            passed += multiply(scratch.reads[rows, :], x.dh[:, lanes])
            x.dmemory[rows, lanes] = passed
            scratch.rounded[rows, lanes] = passed.astype(plan.dtype)
    dn = x.carry * x.dnormalizer[...]
    if plan.normalized:
        dsum = exact_parts(scratch.rows[_DSUM : _DSUM + 1, :], plan.dtype)
        dn += sum_down(multiply(dsum, x.q[:, :]))
    x.dnormalizer[...] = dn
    x.dcarry[...] = dlog_carry


def _along_lanes(block: Array) -> Array:
    """Sums over the lanes of a block [128, 128], one beside the other [1, 128]."""
    sums = jnp.broadcast_to(jnp.sum(block, axis=1, keepdims=True), block.shape)
    own = on_diagonal(slice(0, LANES), slice(0, LANES))
    return sum_down(jnp.where(own, sums, 0.0))
