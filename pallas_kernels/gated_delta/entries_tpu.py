"""The TPU kernels of the gated delta rule at the mLSTM's shape: 65,536 tokens of 16 heads."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.catalogue import Budget, Entry, Launch
from pallas_kernels.gated_delta.mosaic_tpu import TuningConfig, backward, forward, tiling_for
from pallas_kernels.gated_delta.mosaic_tpu_chunk import CHUNK
from pallas_kernels.targets import CHIPS, Chip

BATCH, TIME, HEADS, Q_DIM, V_DIM = 8, 8192, 16, 128, 256
_CONFIG = TuningConfig()


def _struct(*shape: int, dtype: jnp.dtype = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((BATCH, *shape), dtype)


# As a projection writes them; the kernels read them as they lie.
_Q = _struct(TIME, HEADS * Q_DIM, dtype=jnp.bfloat16)
_V = _struct(TIME, HEADS * V_DIM, dtype=jnp.bfloat16)
_GATE = _struct(TIME, HEADS)
_MEMORY = _struct(HEADS, Q_DIM, V_DIM)
_STATES = _struct(HEADS, TIME // CHUNK, Q_DIM, V_DIM)
_INPUTS = _Q, _Q, _V, _GATE, _GATE


def _bytes(*arrays: jax.ShapeDtypeStruct) -> int:
    return sum(x.size * x.dtype.itemsize for x in arrays)


def _by_head(x: jax.Array) -> jax.Array:
    return x.reshape(BATCH, TIME, HEADS, -1)


def _as_it_lies(x: jax.Array) -> jax.Array:
    return x.reshape(BATCH, TIME, -1)


def _forward(q, k, v, *others, keep):
    o, *state = forward(_CONFIG, *map(_by_head, (q, k, v)), *others, keep=keep)
    return _as_it_lies(o), *state


def _backward(q, k, v, alpha, beta, states, do, dmemory):
    q, k, v, do = map(_by_head, (q, k, v, do))
    *dx, dalpha, dbeta, dmemory = backward(_CONFIG, q, k, v, alpha, beta, states, do, dmemory)
    return *map(_as_it_lies, dx), dalpha, dbeta, dmemory


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


def _entries(chips: tuple[str, ...], cores: int) -> tuple[Entry, ...]:
    tokens = BATCH * TIME * HEADS
    tiling = tiling_for(_CONFIG, *(jax.eval_shape(_by_head, x) for x in (_Q, _Q, _V)))
    steps = BATCH * HEADS // tiling.heads * tiling.steps // cores

    def trip_counts(loops):
        # Chunks of a step inside, steps of the grid outside, of which two more fetch and write.
        return [steps + 2 if loop.depth == 1 else tiling.together for loop in loops]

    def entry(name, function, arguments, results, per_token, floor_ratio):
        return Entry(
            name=f"gated_delta/{name}",
            platform="tpu",
            build=lambda _: (function, arguments),  # One tuning serves all chips.
            bytes_minimum=_bytes(*arguments, *results),
            matrix_flops=2 * tokens * per_token,
            launches=(Launch(trip_counts=trip_counts),),
            chips=chips,
            budget=functools.partial(_budget, floor_ratio=floor_ratio),
        )

    state = Q_DIM * V_DIM
    # Of whole matrices, as of the mLSTM's kernels; the inverse not counted.
    reads = CHUNK * (Q_DIM + V_DIM)
    given, keeping = (*_INPUTS, _MEMORY), functools.partial(_forward, keep=True)
    return (
        entry(
            "forward",
            functools.partial(_forward, keep=False),
            given,
            (_V, _MEMORY),
            2 * reads + 3 * state,
            7.5,
        ),
        entry(
            "forward_keeping", keeping, given, (_V, _MEMORY, _STATES), 2 * reads + 3 * state, 5.5
        ),
        entry(
            "backward",
            _backward,
            (*_INPUTS, _STATES, _V, _MEMORY),
            (_Q, _Q, _V, _GATE, _GATE, _MEMORY),
            5 * reads + 8 * state,
            5.6,
        ),
    )


def entries() -> tuple[Entry, ...]:
    """Forward and backward, for chips of one core and of two that divide the grid."""
    by_cores: dict[int, tuple[str, ...]] = {}
    for chip in CHIPS.values():
        if chip.platform == "tpu":
            by_cores[chip.cores] = (*by_cores.get(chip.cores, ()), chip.name)
    return tuple(entry for cores, chips in by_cores.items() for entry in _entries(chips, cores))
