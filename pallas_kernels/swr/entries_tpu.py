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
_STATE = jax.ShapeDtypeStruct((BATCH, FEATURES, HEADS), jnp.float32)


def _bytes(*arrays: jax.ShapeDtypeStruct | None) -> int:
    return sum(x.size * x.dtype.itemsize for x in arrays if x is not None)


def _forward(window, a, v, gates):
    return forward_pass(window, a, v, gates, None, None, save=True)


def _backward(window, a, v, gates, starts, dx, dfinal):
    return backward_pass(window, a, v, gates, starts, dx, dfinal, states=(False, False))


def _entries(operator: str, lookback: int | None, gates) -> tuple[Entry, Entry]:
    """The forward pass, with what it saves for the backward pass, and the backward pass."""
    window = Window(BLOCK_SIZE, lookback, TuningConfig())
    final = _STATE if lookback is None else None
    inputs = (_A, _V, *(gates or ()))
    plan, _ = plans(window, _A, _V, gates)

    def trip_counts(loops):
        # The compiler loses the counts of the two nested loops of a tile of several intervals.
        inside = {2: plan.tile // plan.interval, 3: plan.interval // plan.rows}
        return [loop.known_trip_count or inside[loop.depth] for loop in loops]

    def build_forward(chip):
        del chip  # One tuning serves them all.
        return functools.partial(_forward, window), (_A, _V, gates)

    def build_backward(chip):
        del chip
        _, starts, _ = jax.eval_shape(functools.partial(_forward, window), _A, _V, gates)
        return functools.partial(_backward, window), (_A, _V, gates, starts, _V, final)

    return (
        Entry(
            name=f"swr/{operator}/forward",
            platform="tpu",
            build=build_forward,
            bytes_minimum=_bytes(*inputs, _V, final),
            launches=(Launch(trip_counts=trip_counts),),
        ),
        Entry(
            name=f"swr/{operator}/backward",
            platform="tpu",
            build=build_backward,
            # What the forward pass saved is not counted: a pass that saved nothing would need none.
            bytes_minimum=_bytes(*inputs, _V, final, *inputs),
        ),
    )


def entries() -> tuple[Entry, ...]:
    """Every kernel: plain and gated, windowed and exact, forward and backward."""
    gates = (_V, _V)
    return (
        *_entries("plain", 1, None),
        *_entries("gated", 1, gates),
        *_entries("exact", None, None),
        *_entries("gated exact", None, gates),
    )
