"""The Hopper kernels as the catalogue lists them: at its reference shape, with what they move."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.catalogue import BATCH, FEATURES, HEADS, TIME, Budget, Entry, default_budget
from pallas_kernels.swr.mosaic_gpu import block_two_pass, default_problem
from pallas_kernels.swr.mosaic_gpu_pipeline import Problem
from pallas_kernels.swr.tuning import SUBBLOCK
from pallas_kernels.targets import Chip, Launch

DTYPE = jnp.bfloat16
WIDE = BATCH * TIME * HEADS * FEATURES * DTYPE.dtype.itemsize  # bytes of v, b, c, x
NARROW = BATCH * TIME * HEADS * DTYPE.dtype.itemsize  # bytes of a


def entries() -> tuple[Entry, ...]:
    """Plain and gated, window and exact recurrence; forward alone, and with the backward."""
    return tuple(
        _entry(gated, lookback, block_size, backward)
        for gated in (False, True)
        for lookback, block_size in ((1, 16), (1, 64), (None, 16))
        for backward in (False, True)
    )


def _entry(gated: bool, lookback: int | None, block_size: int, backward: bool) -> Entry:
    wide = jax.ShapeDtypeStruct((BATCH, TIME, HEADS, FEATURES), DTYPE)
    a = jax.ShapeDtypeStruct(wide.shape[:3], DTYPE)
    arguments = (a, wide) + ((wide, wide) if gated else ())
    window = {"block_size": block_size, "lookback": lookback}
    problem = default_problem(a, wide, arguments[2:] or None, **window)

    def forward(a, v, *gates):
        config = problem.config  # One for all chips: that of an H100.
        return block_two_pass(a, v, gates or None, None, None, config=config, **window)[0]

    def both(dx, *arguments):
        x, pull = jax.vjp(forward, *arguments)
        return x, pull(dx)

    inputs = 3 if gated else 1
    launches, moved = _launches(problem, inputs, backward)
    minimum = NARROW + (inputs + 1) * WIDE
    if backward:  # a and the wide inputs and dx, then their gradients.
        minimum += 2 * NARROW + (2 * inputs + 1) * WIDE

    def budget(chip: Chip) -> Budget:
        # The exact recurrence reads its inputs twice, once to know what enters each chunk.
        limit = default_budget(chip)
        return dataclasses.replace(limit, bytes_ratio=1.52) if lookback is None else limit

    reach = "exact" if lookback is None else f"window{block_size}"
    return Entry(
        name=f"swr/{'gated' if gated else 'plain'}/{reach}/"
        + ("forward+backward" if backward else "forward"),
        platform="gpu",
        build=lambda _: (both, (wide, *arguments)) if backward else (forward, arguments),
        bytes_minimum=minimum,
        bytes_moved=moved,
        launches=launches,
        budget=budget,
    )


def _launches(p: Problem, inputs: int, backward: bool) -> tuple[tuple[Launch, ...], int]:
    """Return what the kernels do in their loops, and the bytes that they move altogether.

    `inputs` counts the arrays like v: one, or three with gates.
    """
    steps = p.config.chunk // SUBBLOCK + p.halo
    # Of every chunk but one (the first forward, the last backward), halo tokens are read again.
    again = 1 + (p.chunks - 1) * p.halo * SUBBLOCK / TIME
    states = p.saved_states * WIDE * 4 // DTYPE.dtype.itemsize // SUBBLOCK

    def launch(kernel: str, slots: int, wide: int, states: int) -> Launch:
        """`wide` arrays and `states` states are loaded."""
        row = p.config.heads * p.features
        stage = SUBBLOCK * (wide * row + p.config.heads) * DTYPE.dtype.itemsize + states * row * 4
        return Launch(kernel=kernel, trip_counts=(steps,), bytes_in_flight=(slots - 1) * stage)

    config = p.config
    launches = [launch("swr_forward", config.forward_slots, inputs, 0)]
    moved = again * (inputs * WIDE + NARROW) + WIDE
    if backward:
        launches.append(launch("swr_backward", config.backward_slots, inputs + 1, p.saved_states))
        moved += states  # Written by the forward, and read with all else.
        moved += again * ((inputs + 1) * WIDE + NARROW + states) + inputs * WIDE + NARROW
    if p.lookback is None:
        factors = min(inputs, 2)  # The output's gate has no part in the states.
        launches.append(launch("swr_reduce", config.forward_slots, factors, 0))
        moved += (1 + backward) * (factors * WIDE + NARROW)
    return tuple(launches), round(moved)
