"""The TPU kernels of the mLSTM at its published shape: 65,536 tokens of 16 heads, bfloat16."""

import jax
import jax.numpy as jnp

from pallas_kernels.catalogue import Budget, Entry, Launch
from pallas_kernels.mlstm.gradient import Options
from pallas_kernels.mlstm.mosaic_tpu import backward, forward
from pallas_kernels.mlstm.mosaic_tpu_calls import plan_for
from pallas_kernels.mlstm.tuning_tpu import TuningConfig
from pallas_kernels.targets import CHIPS, Chip

BATCH, TIME, HEADS, Q_DIM, V_DIM, CHUNK = 8, 8192, 16, 128, 256, 128
_OPTIONS = Options(CHUNK, True, True, TuningConfig())


def _struct(*shape: int, dtype: jnp.dtype = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((BATCH, *shape), dtype)


# As a projection writes them; the kernels read them as they lie.
_Q = _struct(TIME, HEADS * Q_DIM, dtype=jnp.bfloat16)
_V = _struct(TIME, HEADS * V_DIM, dtype=jnp.bfloat16)
_GATES = _struct(HEADS, TIME // CHUNK, 8, CHUNK)
_DGATES = _struct(HEADS, TIME // CHUNK, 4, CHUNK)
_CARRY = _struct(HEADS, TIME // CHUNK)
_STATE = _struct(HEADS, Q_DIM, V_DIM), _struct(HEADS, Q_DIM)
_INPUTS = _Q, _Q, _V, _GATES, _CARRY, *_STATE


def _bytes(*arrays: jax.ShapeDtypeStruct) -> int:
    return sum(x.size * x.dtype.itemsize for x in arrays)


def _by_head(x: jax.Array) -> jax.Array:
    return x.reshape(BATCH, TIME, HEADS, -1)


def _as_it_lies(x: jax.Array) -> jax.Array:
    return x.reshape(BATCH, TIME, -1)


def _forward(q, k, v, *others):
    h, *state = forward(_OPTIONS, *map(_by_head, (q, k, v)), *others)
    return _as_it_lies(h), *state


def _backward(q, k, v, gates, carry, memory, normalizer, dh, *dstate):
    q, k, v, dh = map(_by_head, (q, k, v, dh))
    *dx, drows, dcarry, dmemory, dnormalizer = backward(
        _OPTIONS, q, k, v, gates, carry, memory, normalizer, dh, *dstate
    )
    return *map(_as_it_lies, dx), drows, dcarry, dmemory, dnormalizer


def _budget(chip: Chip) -> Budget:
    """Twice the floor on v5e, v5p and v6e.

    Spilled registers are not bounded: with four heads at a time there are some, which cost no more
    than their loads and stores, and these are in the schedule whose time is bounded. Nor are bytes:
    the backward pass writes states between the chunks, and reads them.
    """
    return Budget(
        spill=None,
        bytes_ratio=None,
        floor_ratio=2.0 if chip.name in ("v5e", "v5p", "v6e") else None,
        vmem_bytes=chip.vmem_limit_bytes,
    )


def _entries(chips: tuple[str, ...], cores: int) -> tuple[Entry, Entry]:
    tokens = BATCH * TIME * HEADS
    plan = plan_for(_OPTIONS, *(jax.eval_shape(_by_head, x) for x in (_Q, _Q, _V)))
    steps = BATCH * HEADS // plan.heads * plan.steps // cores

    def trip_counts(loops):
        # Chunks of a step inside, steps of the grid outside, of which two more fetch and write.
        return [steps + 2 if loop.depth == 1 else plan.together for loop in loops]

    def entry(name, function, arguments, results, per_token):
        return Entry(
            name=f"mlstm/{name}",
            platform="tpu",
            build=lambda _: (function, arguments),  # One tuning serves all chips.
            bytes_minimum=_bytes(*arguments, *results),
            matrix_flops=2 * tokens * per_token,
            launches=(Launch(trip_counts=trip_counts),),
            chips=chips,
            budget=_budget,
        )

    state = Q_DIM * V_DIM
    return (
        entry("forward", _forward, _INPUTS, (_V, *_STATE), CHUNK * (Q_DIM + V_DIM) + 2 * state),
        entry(
            "backward",
            _backward,
            (*_INPUTS, _V, *_STATE),
            (_Q, _Q, _V, _DGATES, _CARRY, *_STATE),
            CHUNK * (3 * Q_DIM + 2 * V_DIM) + 5 * state,
        ),
    )


def entries() -> tuple[Entry, ...]:
    """Forward and backward, for chips of one core and of two that divide the grid."""
    by_cores: dict[int, tuple[str, ...]] = {}
    for chip in CHIPS.values():
        if chip.platform == "tpu":
            by_cores[chip.cores] = (*by_cores.get(chip.cores, ()), chip.name)
    return tuple(entry for cores, chips in by_cores.items() for entry in _entries(chips, cores))
