"""The TPU kernels of the mLSTM at its published shape: 65,536 tokens of 16 heads, bfloat16."""

import functools

import jax.numpy as jnp

from pallas_kernels.catalogue import Budget, Entry
from pallas_kernels.mlstm.gradient import Options
from pallas_kernels.mlstm.mosaic_tpu import backward, forward
from pallas_kernels.mlstm.mosaic_tpu_plan import tilings
from pallas_kernels.mlstm.tuning_tpu import TuningConfig
from pallas_kernels.targets import Chip
from pallas_kernels.tpu.chip import vmem_of
from pallas_kernels.tpu.reference import (
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
    entry,
    heads_of_inputs,
    struct,
    tpus,
)

_GATES = struct(HEADS, TIME // CHUNK, 8, CHUNK)
_DGATES = struct(HEADS, TIME // CHUNK, 4, CHUNK)
_CARRY = struct(HEADS, TIME // CHUNK)
_STATE = MEMORY, struct(HEADS, Q_DIM)
_STATES = (
    struct(HEADS, TIME // CHUNK, Q_DIM, V_DIM, dtype=jnp.bfloat16),
    struct(HEADS, TIME // CHUNK, 1, Q_DIM),
)
_INPUTS = Q, Q, V, _GATES, _CARRY


def _forward(options, q, k, v, *others, keep):
    h, *state = forward(options, *map(by_head, (q, k, v)), *others, keep=keep)
    return as_it_lies(h), *state


def _backward(options, q, k, v, gates, carry, memories, normalizers, dh, *dstate):
    q, k, v, dh = map(by_head, (q, k, v, dh))
    *dx, drows, dcarry, dmemory, dnormalizer = backward(
        options, q, k, v, gates, carry, memories, normalizers, dh, *dstate
    )
    return *map(as_it_lies, dx), drows, dcarry, dmemory, dnormalizer


def _budget(chip: Chip) -> Budget:
    """Twice the time of the bytes that are moved, which are no more than must be.

    Spilled registers are not bounded: with eight heads at a time there are some, which cost no more
    than their loads and stores, and these are in the schedule whose time is bounded.
    """
    return Budget(
        spill=None,
        bytes_ratio=1.01,
        issue_ratio=2.0,
        floor_ratio=2.0,
        vmem_bytes=vmem_of(chip.vmem_bytes),
    )


def _entries(chip: Chip) -> tuple[Entry, ...]:
    config = TuningConfig(vmem_bytes=vmem_of(chip.vmem_bytes))
    options = Options(CHUNK, True, True, config)

    def of_mlstm(name, function, arguments, results, per_token, **static):
        return entry(
            f"mlstm/{name}",
            functools.partial(function, options, **static),
            arguments,
            results,
            per_token=per_token,
            tilings=tilings(options, *heads_of_inputs()),
            chip=chip,
            budget=_budget(chip),
        )

    state = Q_DIM * V_DIM
    forwards = _forward, (*_INPUTS, *_STATE)
    per_token = CHUNK * (Q_DIM + V_DIM) + 2 * state
    return (
        of_mlstm("forward", *forwards, (V, *_STATE), per_token, keep=False),
        of_mlstm("forward_keeping", *forwards, (V, *_STATE, *_STATES), per_token, keep=True),
        of_mlstm(
            "backward",
            _backward,
            (*_INPUTS, *_STATES, V, *_STATE),
            (Q, Q, V, _DGATES, _CARRY, *_STATE),
            CHUNK * (3 * Q_DIM + 2 * V_DIM) + 4 * state,
        ),
    )


def entries() -> tuple[Entry, ...]:
    """Forward and backward, for every TPU."""
    return tuple(entry for chip in tpus() for entry in _entries(chip))
