"""The TPU kernels of the gated delta rule at the mLSTM's shape: 65,536 tokens of 16 heads."""

import functools

from pallas_kernels.catalogue import Budget, Entry
from pallas_kernels.gated_delta.mosaic_tpu import backward, forward
from pallas_kernels.gated_delta.mosaic_tpu_chunk import CHUNK
from pallas_kernels.gated_delta.mosaic_tpu_plan import TuningConfig, tilings
from pallas_kernels.targets import Chip
from pallas_kernels.tpu.chip import vmem_of
from pallas_kernels.tpu.reference import (
    HEADS,
    MEMORY,
    Q_DIM,
    TIME,
    V_DIM,
    Q,
    V,
    as_it_lies,
    by_head,
    entry,
    heads_of_inputs,
    struct,
    tpus,
)

_GATE = struct(TIME, HEADS)
_STATES = struct(HEADS, TIME // CHUNK, Q_DIM, V_DIM)
_INPUTS = Q, Q, V, _GATE, _GATE


def _forward(config, q, k, v, *others, keep):
    o, *state = forward(config, *map(by_head, (q, k, v)), *others, keep=keep)
    return as_it_lies(o), *state


def _backward(config, q, k, v, alpha, beta, states, do, dmemory):
    q, k, v, do = map(by_head, (q, k, v, do))
    *dx, dalpha, dbeta, dmemory = backward(config, q, k, v, alpha, beta, states, do, dmemory)
    return *map(as_it_lies, dx), dalpha, dbeta, dmemory


def _budget(chip: Chip, floor_ratio: float) -> Budget:
    """VMEM, and on v5e, v5p and v6e no more time than a sixth over what is predicted.

    Matrices of 128 by 128 wait in VMEM where registers do not hold them, products are made of two
    or three of 16 bits each, and the inverse comes on top: instructions, not memory, take the time.
    """
    return Budget(
        spill=None,
        bytes_ratio=1.01,
        floor_ratio=floor_ratio if chip.name in ("v5e", "v5p", "v6e") else None,
        vmem_bytes=vmem_of(chip.vmem_bytes),
    )


def _entries(chip: Chip) -> tuple[Entry, ...]:
    config = TuningConfig(vmem_bytes=vmem_of(chip.vmem_bytes))

    def of_rule(name, function, arguments, results, per_token, floor_ratio, **static):
        return entry(
            f"gated_delta/{name}",
            functools.partial(function, config, **static),
            arguments,
            results,
            per_token=per_token,
            tilings=tilings(config, *heads_of_inputs()),
            chip=chip,
            budget=_budget(chip, floor_ratio),
        )

    state = Q_DIM * V_DIM
    # Of whole matrices, as of the mLSTM's kernels; the inverse not counted.
    reads = CHUNK * (Q_DIM + V_DIM)
    forwards, per_token = (_forward, (*_INPUTS, MEMORY)), 2 * reads + 3 * state
    kept = V, MEMORY, _STATES
    return (
        of_rule("forward", *forwards, (V, MEMORY), per_token, 4.5, keep=False),
        of_rule("forward_keeping", *forwards, kept, per_token, 3.8, keep=True),
        of_rule(
            "backward",
            _backward,
            (*_INPUTS, _STATES, V, MEMORY),
            (Q, Q, V, _GATE, _GATE, MEMORY),
            5 * reads + 8 * state,
            3.8,
        ),
    )


def entries() -> tuple[Entry, ...]:
    """Forward and backward, for every TPU."""
    return tuple(entry for chip in tpus() for entry in _entries(chip))
