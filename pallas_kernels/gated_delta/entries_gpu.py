"""The Hopper kernels of the gated delta rule at the mLSTM's shape: 65,536 tokens of 16 heads."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.catalogue import Budget, Entry, default_budget
from pallas_kernels.gated_delta.mosaic_gpu import TuningConfig, backward, forward
from pallas_kernels.gated_delta.mosaic_gpu_parts import PARTS
from pallas_kernels.mlstm.entries_gpu import (
    BATCH,
    DTYPE,
    GATE_BYTES,
    HEADS,
    Q_BYTES,
    Q_DIM,
    TIME,
    TOKENS,
    V_BYTES,
    V_DIM,
    walk_launch,
)
from pallas_kernels.mlstm.tuning import TILE
from pallas_kernels.targets import Chip, Launch

_CONFIG = TuningConfig(groups=2)
_V_BLOCKS = V_DIM // TILE // 2

_CHUNKS = TOKENS // TILE
_TRIANGLE_BYTES = _CHUNKS * PARTS * TILE * TILE * 2  # of X or P, and of L
_STATE_BYTES = _CHUNKS * PARTS * Q_DIM * V_DIM * 2  # of H, before every chunk
_WRITTEN_BYTES = PARTS * V_BYTES  # of U
_ENDS_BYTES = 2 * BATCH * HEADS * Q_DIM * V_DIM * 4  # of the first and the last state

_FORWARD_BYTES = 2 * Q_BYTES + 2 * V_BYTES + 2 * GATE_BYTES + _ENDS_BYTES
# Inputs and the cotangents of results, then those of inputs.
_BACKWARD_BYTES = 4 * Q_BYTES + 3 * V_BYTES + 4 * GATE_BYTES + _ENDS_BYTES

_TRIANGLES_MOVE = 2 * Q_BYTES + 2 * GATE_BYTES + 2 * _TRIANGLE_BYTES
# Every block of features of V reads what its chunks have in common.
_IN_COMMON = 2 * Q_BYTES + 2 * _TRIANGLE_BYTES + 3 * GATE_BYTES
_WALK_MOVES = _V_BLOCKS * _IN_COMMON + 2 * V_BYTES + _ENDS_BYTES
_KEEPING_MOVES = _WALK_MOVES + _STATE_BYTES + _WRITTEN_BYTES
_COTANGENTS_MOVE = 4 * Q_BYTES + 2 * V_BYTES + 3 * _TRIANGLE_BYTES + 8 * GATE_BYTES
_COTANGENTS_MOVE += 2 * (_STATE_BYTES + _WRITTEN_BYTES) + _CHUNKS * Q_DIM * 4


def entries() -> tuple[Entry, ...]:
    """Forward alone, and with the backward: two calls, as a gradient makes them."""
    return _entry(with_backward=False), _entry(with_backward=True)


def _entry(*, with_backward: bool) -> Entry:
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    q = jax.ShapeDtypeStruct((BATCH, TIME, HEADS, Q_DIM), DTYPE)
    v = jax.ShapeDtypeStruct((BATCH, TIME, HEADS, V_DIM), DTYPE)
    gate, memory = shape((BATCH, TIME, HEADS)), shape((BATCH, HEADS, Q_DIM, V_DIM))
    given, call = (q, q, v, gate, gate, memory), functools.partial(forward, _CONFIG)

    def both(do, dmemory, *arguments):
        return call(*arguments), backward(_CONFIG, *arguments, do, dmemory)

    # Of what a program's tokens do, twice: a walk loads a chunk ahead.
    in_flight = 2 * (2 * Q_DIM + 2 * PARTS * TILE + 2 * TILE) * TILE * 2
    moved, launches = _TRIANGLES_MOVE + _WALK_MOVES, [_walk("forward", in_flight)]
    # Of whole matrices; the inverse not counted.
    reads, state = TILE * (Q_DIM + V_DIM), Q_DIM * V_DIM
    products, ratio = 2 * reads + 3 * state, 3.0
    if with_backward:
        moved += _TRIANGLES_MOVE + _TRIANGLE_BYTES + 2 * _KEEPING_MOVES + _COTANGENTS_MOVE
        launches += [_walk("backward", in_flight), _cotangents()]
        products, ratio = products + 5 * reads + 8 * state, 7.0
    name = "forward+backward" if with_backward else "forward"
    return Entry(
        name=f"gated_delta/published/{name}",
        platform="gpu",
        build=lambda _: (both, (v, memory, *given)) if with_backward else (call, given),
        bytes_minimum=_FORWARD_BYTES + with_backward * _BACKWARD_BYTES,
        bytes_moved=moved,
        matrix_flops=2 * products * TOKENS,
        launches=(
            Launch("gated_delta_triangles", bytes_in_flight=2 * 2 * Q_DIM * TILE * 2),
            *launches,
        ),
        chips=("h100", "h200"),
        budget=functools.partial(_budget, ratio, 160 if with_backward else 0),
    )


def _budget(ratio: float, spill: int, chip: Chip) -> Budget:
    """The states go through memory in two parts: more bytes than the least, and exact gradients."""
    return dataclasses.replace(
        default_budget(chip), bytes_ratio=ratio, floor_ratio=ratio, spill=spill
    )


def _walk(direction: str, in_flight: int) -> Launch:
    return walk_launch(f"gated_delta_walk_{direction}", TIME, TILE, in_flight)


def _cotangents() -> Launch:
    """Each of three warpgroups has a loop over the features of V; the loader's is unrolled."""
    steps = V_DIM // TILE
    slot = (2 * TILE + 2 * PARTS * (Q_DIM + TILE)) * TILE * 2
    return Launch(
        "gated_delta_cotangents",
        (1, steps, steps, steps),
        bytes_in_flight=2 * slot,
        warpgroups=[(0, 1, 2, 3), (0,), (1,), (2,)],
    )
