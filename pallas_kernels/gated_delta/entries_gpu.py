"""The Hopper kernels of the gated delta rule at the mLSTM's shape: 65,536 tokens of 16 heads."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.catalogue import Budget, Entry, default_budget
from pallas_kernels.gated_delta.mosaic_gpu import (
    TuningConfig,
    backward,
    forward,
    suited_groups,
)
from pallas_kernels.gated_delta.mosaic_gpu_walk import Walk
from pallas_kernels.hopper.chip import MULTIPROCESSORS, TILE
from pallas_kernels.hopper.parts import PARTS
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
from pallas_kernels.targets import Chip, Launch

_CONFIG = TuningConfig()

_CHUNKS = TOKENS // TILE
_TRIANGLE_BYTES = _CHUNKS * PARTS * TILE * TILE * 2  # of X or P, and of L
_STATE_BYTES = _CHUNKS * PARTS * Q_DIM * V_DIM * 2  # of H, before every chunk
_WRITTEN_BYTES = PARTS * V_BYTES  # of U

_FORWARD_BYTES = 2 * Q_BYTES + 2 * V_BYTES + 2 * GATE_BYTES
# Inputs and the cotangents of results, then those of inputs.
_BACKWARD_BYTES = 4 * Q_BYTES + 3 * V_BYTES + 4 * GATE_BYTES

_TRIANGLES_MOVE = 2 * Q_BYTES + 2 * GATE_BYTES + 2 * _TRIANGLE_BYTES
_COTANGENTS_MOVE = 4 * Q_BYTES + 2 * V_BYTES + 3 * _TRIANGLE_BYTES + 8 * GATE_BYTES
_COTANGENTS_MOVE += 2 * (_STATE_BYTES + _WRITTEN_BYTES) + _CHUNKS * Q_DIM * 4


def entries() -> tuple[Entry, ...]:
    """Of eight sequences, and of a single long one, whose walks do not fill the chip.

    Forward alone, and with the backward: two calls, as a gradient makes them.
    """
    return tuple(
        make(with_backward=with_backward)
        for make in (
            functools.partial(_entry, "published", BATCH, ratios=(3.0, 7.0), issue=0.8),
            functools.partial(_entry, "long", 1, ratios=(5.0, 9.0), issue=1.1),
        )
        for with_backward in (False, True)
    )


def _entry(
    name: str,
    batch: int,
    *,
    ratios: tuple[float, float],
    issue: float,
    with_backward: bool,
) -> Entry:
    """The rule over equal sequences.

    Args:
        name: of the shape.
        batch: sequences.
        ratios: times over the floor, at most, forward and with the backward.
        issue: issue time over memory time, at most.
        with_backward: whether with the gradient.
    """
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    time = BATCH * TIME // batch
    walk = Walk(batch, time // TILE, HEADS, Q_DIM, V_DIM, groups=1)
    groups = suited_groups(walk, MULTIPROCESSORS)
    q = jax.ShapeDtypeStruct((batch, time, HEADS, Q_DIM), DTYPE)
    v = jax.ShapeDtypeStruct((batch, time, HEADS, V_DIM), DTYPE)
    gate, memory = shape((batch, time, HEADS)), shape((batch, HEADS, Q_DIM, V_DIM))
    given, call = (q, q, v, gate, gate, memory), functools.partial(forward, _CONFIG)

    def both(do, dmemory, *arguments):
        return call(*arguments), backward(_CONFIG, *arguments, do, dmemory)

    # The first and the last state; what chunks have in common, for each block of features of V.
    ends = 2 * batch * HEADS * Q_DIM * V_DIM * 4
    in_common = 2 * Q_BYTES + 2 * _TRIANGLE_BYTES + 3 * GATE_BYTES
    walk_moves = V_DIM // TILE // groups * in_common + 2 * V_BYTES + ends
    # Two chunks at a time.
    in_flight = 2 * (2 * Q_DIM + 2 * PARTS * TILE + groups * TILE) * TILE * 2
    walked = functools.partial(
        walk_launch, time=time, chunk=TILE, in_flight=in_flight, alone=groups == 1
    )
    moved, launches = _TRIANGLES_MOVE + walk_moves, [walked("gated_delta_walk_forward")]
    # Of whole matrices; the inverse not counted.
    reads, state = TILE * (Q_DIM + V_DIM), Q_DIM * V_DIM
    products = 2 * reads + 3 * state
    if with_backward:
        moved += _TRIANGLES_MOVE + _TRIANGLE_BYTES + _COTANGENTS_MOVE
        moved += 2 * (walk_moves + _STATE_BYTES + _WRITTEN_BYTES)
        launches += [walked("gated_delta_walk_backward"), _cotangents()]
        products += 5 * reads + 8 * state
    triangles = Launch("gated_delta_triangles", bytes_in_flight=2 * 2 * Q_DIM * TILE * 2)
    passes = "forward+backward" if with_backward else "forward"
    return Entry(
        name=f"gated_delta/{name}/{passes}",
        platform="gpu",
        build=lambda _: (both, (v, memory, *given)) if with_backward else (call, given),
        bytes_minimum=_FORWARD_BYTES + ends + with_backward * (_BACKWARD_BYTES + ends),
        bytes_moved=moved,
        matrix_flops=2 * products * TOKENS,
        launches=(triangles, *launches),
        chips=("h100", "h200"),
        budget=functools.partial(
            _budget, ratios[with_backward], issue, 160 if with_backward else 0
        ),
    )


def _budget(ratio: float, issue: float, spill: int, chip: Chip) -> Budget:
    """The states go through memory in two parts: more bytes than the least, and exact gradients.

    Walks over few sequences wait for one product after the other, on an H200 for as long as memory.
    """
    return dataclasses.replace(
        default_budget(chip), bytes_ratio=ratio, floor_ratio=ratio, issue_ratio=issue, spill=spill
    )


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
