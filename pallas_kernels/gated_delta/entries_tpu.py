"""The TPU kernels of the gated delta rule at the mLSTM's shape: 65,536 tokens of 16 heads."""

import functools

from pallas_kernels.catalogue import Budget, Entry
from pallas_kernels.gated_delta.mosaic_tpu import TuningConfig, backward, forward, tiling_for
from pallas_kernels.gated_delta.mosaic_tpu_chunk import CHUNK
from pallas_kernels.mlstm.reference_tpu import (
    HEADS,
    MEMORY,
    Q_DIM,
    TIME,
    V_DIM,
    Q,
    V,
    as_it_lies,
    by_head,
    chips_by_cores,
    entry,
    heads_of_inputs,
    struct,
)
from pallas_kernels.targets import Chip

_CONFIG = TuningConfig()

_GATE = struct(TIME, HEADS)
_STATES = struct(HEADS, TIME // CHUNK, Q_DIM, V_DIM)
_INPUTS = Q, Q, V, _GATE, _GATE


def _forward(q, k, v, *others, keep):
    o, *state = forward(_CONFIG, *map(by_head, (q, k, v)), *others, keep=keep)
    return as_it_lies(o), *state


def _backward(q, k, v, alpha, beta, states, do, dmemory):
    q, k, v, do = map(by_head, (q, k, v, do))
    *dx, dalpha, dbeta, dmemory = backward(_CONFIG, q, k, v, alpha, beta, states, do, dmemory)
    return *map(as_it_lies, dx), dalpha, dbeta, dmemory


def _budget(chip: Chip, floor_ratio: float) -> Budget:
    """VMEM, and on v5e, v5p and v6e no more time than a sixth over what was predicted first.

    Matrices of 128 by 128 wait in VMEM where registers do not hold them, products are made of two
    or three of 16 bits each, and the inverse comes on top: instructions, not memory, take the time.
    """
    return Budget(
        spill=None,
        bytes_ratio=1.01,
        floor_ratio=floor_ratio if chip.name in ("v5e", "v5p", "v6e") else None,
        vmem_bytes=chip.vmem_limit_bytes,
    )


def _entries(chips: tuple[str, ...]) -> tuple[Entry, ...]:
    tiling = tiling_for(_CONFIG, *heads_of_inputs())

    def of_rule(name, function, arguments, results, per_token, floor_ratio):
        return entry(
            f"gated_delta/{name}",
            function,
            arguments,
            results,
            per_token=per_token,
            tilings={"gated_delta": tiling},
            chips=chips,
            budget=functools.partial(_budget, floor_ratio=floor_ratio),
        )

    state = Q_DIM * V_DIM
    # Of whole matrices, as of the mLSTM's kernels; the inverse not counted.
    reads = CHUNK * (Q_DIM + V_DIM)
    given, forwards = (*_INPUTS, MEMORY), 2 * reads + 3 * state
    plain, keeping = (functools.partial(_forward, keep=keep) for keep in (False, True))
    return (
        of_rule("forward", plain, given, (V, MEMORY), forwards, 7.5),
        of_rule("forward_keeping", keeping, given, (V, MEMORY, _STATES), forwards, 5.5),
        of_rule(
            "backward",
            _backward,
            (*_INPUTS, _STATES, V, MEMORY),
            (Q, Q, V, _GATE, _GATE, MEMORY),
            5 * reads + 8 * state,
            5.6,
        ),
    )


def entries() -> tuple[Entry, ...]:
    """Forward and backward, for chips of one core and of two that divide the grid."""
    return tuple(entry for chips in chips_by_cores() for entry in _entries(chips))
