"""The TPU kernels of the mLSTM at its published shape: 65,536 tokens of 16 heads, bfloat16."""

import functools

from pallas_kernels.catalogue import Budget, Entry
from pallas_kernels.mlstm.gradient import Options
from pallas_kernels.mlstm.mosaic_tpu import backward, forward, tilings
from pallas_kernels.mlstm.reference_tpu import (
    CHUNK,
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
from pallas_kernels.mlstm.tuning_tpu import TuningConfig
from pallas_kernels.targets import Chip

_OPTIONS = Options(CHUNK, True, True, TuningConfig())

_GATES = struct(HEADS, TIME // CHUNK, 8, CHUNK)
_DGATES = struct(HEADS, TIME // CHUNK, 4, CHUNK)
_CARRY = struct(HEADS, TIME // CHUNK)
_STATE = MEMORY, struct(HEADS, Q_DIM)
_INPUTS = Q, Q, V, _GATES, _CARRY, *_STATE


def _forward(q, k, v, *others):
    h, *state = forward(_OPTIONS, *map(by_head, (q, k, v)), *others)
    return as_it_lies(h), *state


def _backward(q, k, v, gates, carry, memory, normalizer, dh, *dstate):
    q, k, v, dh = map(by_head, (q, k, v, dh))
    *dx, drows, dcarry, dmemory, dnormalizer = backward(
        _OPTIONS, q, k, v, gates, carry, memory, normalizer, dh, *dstate
    )
    return *map(as_it_lies, dx), drows, dcarry, dmemory, dnormalizer


def _budget(chip: Chip, floor_chips: tuple[str, ...]) -> Budget:
    """Twice the time of the bytes that are moved, and on some chips twice the floor.

    Spilled registers are not bounded: with eight heads at a time there are some, which cost no more
    than their loads and stores, and these are in the schedule whose time is bounded. Nor are bytes:
    the backward pass writes states between the chunks, and reads them.
    """
    return Budget(
        spill=None,
        bytes_ratio=None,
        issue_ratio=2.0,
        floor_ratio=2.0 if chip.name in floor_chips else None,
        vmem_bytes=chip.vmem_limit_bytes,
    )


def _entries(chips: tuple[str, ...]) -> tuple[Entry, Entry]:
    shared = {"tilings": tilings(_OPTIONS, *heads_of_inputs()), "chips": chips}
    state = Q_DIM * V_DIM
    return (
        entry(
            "mlstm/forward",
            _forward,
            _INPUTS,
            (V, *_STATE),
            per_token=CHUNK * (Q_DIM + V_DIM) + 2 * state,
            budget=functools.partial(_budget, floor_chips=chips),
            **shared,
        ),
        entry(
            "mlstm/backward",
            _backward,
            (*_INPUTS, V, *_STATE),
            (Q, Q, V, _DGATES, _CARRY, *_STATE),
            per_token=CHUNK * (3 * Q_DIM + 2 * V_DIM) + 5 * state,
            budget=functools.partial(_budget, floor_chips=("v5e", "v5p", "v6e")),
            **shared,
        ),
    )


def entries() -> tuple[Entry, ...]:
    """Forward and backward, for chips of one core and of two that divide the grid."""
    return tuple(entry for chips in chips_by_cores() for entry in _entries(chips))
