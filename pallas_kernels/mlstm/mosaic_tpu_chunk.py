"""A chunk's reads and writes in the TPU kernels of an mLSTM.

Notation and layout: pallas_kernels/mlstm/mosaic_tpu_kernels.py.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

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
from pallas_kernels.mlstm.mosaic_tpu_plan import Plan
from pallas_kernels.tpu.arithmetic import (
    as_float,
    exact_parts,
    multiply,
    multiply_rows,
    stack,
    sum_down,
    tiles,
    token_pairs,
)
from pallas_kernels.tpu.chip import LANES

Array = jax.Array


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


def carry_of(plan: Plan, carry: Any, head: int, chunk: Array) -> Array:
    """Return c of a head's chunk, as `Call.flat_carry` lays it out."""
    return carry[0, 0, 0, head * plan.chunks + chunk]
