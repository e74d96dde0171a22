"""The TPU kernels at the catalogue's reference shape."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.catalogue import BATCH, FEATURES, HEADS, TIME, Entry, Launch
from pallas_kernels.swr.mosaic_tpu_calls import Window, backward_pass, forward_pass, plans
from pallas_kernels.swr.tuning_tpu import TuningConfig

BLOCK_SIZE = 16
_A = jax.ShapeDtypeStruct((BATCH, TIME, HEADS), jnp.bfloat16)
_V = jax.ShapeDtypeStruct((BATCH, TIME, FEATURES, HEADS), jnp.bfloat16)
_LANE_ORDER = jax.ShapeDtypeStruct((BATCH, TIME, FEATURES * HEADS), jnp.bfloat16)
_STATE = jax.ShapeDtypeStruct((BATCH, FEATURES, HEADS), jnp.float32)


def _bytes(*arrays: jax.ShapeDtypeStruct | None) -> int:
    return sum(x.size * x.dtype.itemsize for x in arrays if x is not None)


def _forward(window, a, v, gates):
    return forward_pass(window, a, v, gates, None, None, save=True)


def _backward(window, a, v, gates, starts, dx, dfinal):
    return backward_pass(window, a, v, gates, starts, dx, dfinal, states=(False, False))


def _entries(operator: str, lookback: int | None, v, gates=None) -> tuple[Entry, Entry]:
    """The forward pass, with what it saves for the backward pass, and the backward pass."""
    window = Window(BLOCK_SIZE, lookback, TuningConfig())
    final = _STATE if lookback is None else None
    inputs = (_A, v, *(gates or ()))
    plan, _ = plans(window, _A, v, gates)

    def trip_counts(loops):
        # The compiler loses the counts of the two nested loops of a tile of several intervals.
        inside = {2: plan.tile // plan.interval, 3: plan.interval // plan.rows}
        return [loop.known_trip_count or inside[loop.depth] for loop in loops]

    def build_forward(chip):
        del chip  # One tuning serves them all.
        return functools.partial(_forward, window), (_A, v, gates)

    def build_backward(chip):
        del chip
        _, starts, _ = jax.eval_shape(functools.partial(_forward, window), _A, v, gates)
        return functools.partial(_backward, window), (_A, v, gates, starts, v, final)

    return (
        Entry(
            name=f"swr/{operator}/forward",
            platform="tpu",
            build=build_forward,
            bytes_minimum=_bytes(*inputs, v, final),
            launches=(Launch(trip_counts=trip_counts),),
        ),
        Entry(
            name=f"swr/{operator}/backward",
            platform="tpu",
            build=build_backward,
            # What the forward pass saved is not counted: a pass that saved nothing would need none.
            bytes_minimum=_bytes(*inputs, v, final, *inputs),
        ),
    )


def entries() -> tuple[Entry, ...]:
    """Every kernel: plain and gated, windowed and exact, in both layouts, forward and backward."""
    return (
        *_entries("plain", 1, _V),
        *_entries("gated", 1, _V, (_V, _V)),
        *_entries("exact", None, _V),
        *_entries("gated exact", None, _V, (_V, _V)),
        *_entries("gated, lane order", 1, _LANE_ORDER, (_LANE_ORDER, _LANE_ORDER)),
        *_entries("gated exact, lane order", None, _LANE_ORDER, (_LANE_ORDER, _LANE_ORDER)),
    )
