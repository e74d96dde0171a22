"""The Hopper kernels of the mLSTM as the catalogue lists them, at a published shape.

65,536 tokens at width 4,096, as arXiv 2503.14376 times them: B 8, T 8,192, 16 heads, Dk 128,
Dv 256, bfloat16.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.catalogue import Budget, Entry, default_budget
from pallas_kernels.mlstm import mosaic_gpu
from pallas_kernels.mlstm.gradient import Options
from pallas_kernels.mlstm.tuning import TILE, TuningConfig
from pallas_kernels.targets import Chip, Launch

BATCH, TIME, HEADS, Q_DIM, V_DIM = 8, 8192, 16, 128, 256
CHUNK = 128
SEQUENCES, CHUNKS = BATCH * HEADS, TIME // CHUNK
DTYPE = jnp.bfloat16
Q_BYTES = BATCH * TIME * HEADS * Q_DIM * 2  # of q or k
V_BYTES = BATCH * TIME * HEADS * V_DIM * 2  # of v or h
STATE_BYTES = SEQUENCES * CHUNKS * Q_DIM * V_DIM * 2  # of C between the chunks
GATE_BYTES = SEQUENCES * TIME * 4  # of a row of gates


def entries() -> tuple[Entry, ...]:
    """Forward alone, and with the backward: two calls, as a gradient makes them."""
    return _entry(False), _entry(True)


def _entry(backward: bool) -> Entry:
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    q = jax.ShapeDtypeStruct((BATCH, TIME, HEADS, Q_DIM), DTYPE)
    v = jax.ShapeDtypeStruct((BATCH, TIME, HEADS, V_DIM), DTYPE)
    state = (shape((BATCH, HEADS, Q_DIM, V_DIM)), shape((BATCH, HEADS, Q_DIM)))
    gates = shape((BATCH, HEADS, CHUNKS, 8, CHUNK)), shape((BATCH, HEADS, CHUNKS))
    arguments = (q, q, v, *gates, *state)
    config = TuningConfig()
    options = Options(CHUNK, True, True, config)
    forward = functools.partial(mosaic_gpu.forward, options)

    def both(dh, dmemory, dnormalizer, *arguments):
        cotangents = (dh, dmemory, dnormalizer)
        return forward(*arguments), mosaic_gpu.backward(options, *arguments, *cotangents)

    walks = Q_BYTES + V_BYTES + STATE_BYTES
    minimum = 2 * Q_BYTES + 2 * V_BYTES + 8 * GATE_BYTES
    moved = walks + 2 * Q_BYTES + 2 * V_BYTES + STATE_BYTES + 9 * GATE_BYTES
    flops = _products(states=1, scores=1, outputs=1, reads=1)
    if backward:
        # q, k, v, dh and the gates, then the gradients of the first three and the gates.
        minimum += 4 * Q_BYTES + 3 * V_BYTES + 12 * GATE_BYTES
        moved += walks  # The states once more.
        moved += 3 * Q_BYTES + 2 * V_BYTES + STATE_BYTES + 13 * GATE_BYTES  # The rows.
        moved += walks + STATE_BYTES + 2 * GATE_BYTES  # Cotangents of the states, times these.
        moved += 3 * Q_BYTES + 3 * V_BYTES + STATE_BYTES + 15 * GATE_BYTES  # The columns.
        flops += _products(states=2, scores=4, outputs=3, reads=3)

    def budget(chip: Chip) -> Budget:
        # The states between the chunks go through memory, and the chunks read all once more.
        ratio = 2.9 if backward else 2.2
        # What JAX 0.11 makes of the states' backward spills 16 bytes, and loads them again.
        spill = 32 if jax.__version_info__ < (0, 12) else 0
        return dataclasses.replace(
            default_budget(chip), spill=spill, bytes_ratio=ratio, floor_ratio=ratio
        )

    return Entry(
        name="mlstm/published/" + ("forward+backward" if backward else "forward"),
        platform="gpu",
        build=lambda _: (both, (v, *state, *arguments)) if backward else (forward, arguments),
        bytes_minimum=minimum,
        bytes_moved=moved,
        launches=_launches(backward),
        matrix_flops=flops,
        chips=("h100", "h200"),
        budget=budget,
    )


def _launches(backward: bool) -> tuple[Launch, ...]:
    """What the kernels do in their loops, as the compiler orders these.

    A warpgroup's chunks with the tiles of v in each, the loader's, and what it waits for in the
    end. The first loop of each kernel zeroes the barriers.
    """
    everyone, computing, loading = (0, 1, 2), (0, 1), (2,)
    span, tiles, tile_bytes = TuningConfig().span, V_DIM // TILE, CHUNK * TILE * 2

    def by_span(kernel: str, compute: int, load: int, in_flight: int) -> Launch:
        """So many loops over tiles in the one and in the other."""
        trips = (1, span, *[tiles] * compute, span, *[tiles] * load, 1, 1, 1, 1)
        groups = [everyone] + [computing] * (1 + compute) + [loading] * (5 + load)
        return Launch(kernel, trips, bytes_in_flight=in_flight, warpgroups=groups)

    def walk(kernel: str, slots: int) -> Launch:
        trips = (1, CHUNKS, CHUNKS * CHUNK // TILE)
        in_flight = slots * TILE * (Q_DIM + V_DIM) * 2
        return Launch(
            kernel, trips, bytes_in_flight=in_flight, warpgroups=[everyone, computing, loading]
        )

    # A part of a kernel's name must be in no other's.
    launches = [by_span("mlstm_outputs", 1, 1, 4 * 2 * tile_bytes)]
    if not backward:
        return *launches, walk("mlstm_states_forward", 3)
    return (
        *launches,
        walk("mlstm_states_forward", 3),
        walk("mlstm_states_backward", 2),
        by_span("mlstm_rows_gradient", 1, 1, 3 * 3 * tile_bytes),
        by_span("mlstm_columns_gradient", 3, 3, 2 * 3 * tile_bytes),
    )


def _products(*, states: int, scores: int, outputs: int, reads: int) -> int:
    """Operations of so many products of each form, of all chunks."""
    pairs = CHUNK * (CHUNK + 1) // 2  # that a causal product needs
    each = states * CHUNK * Q_DIM * V_DIM + reads * CHUNK * Q_DIM * V_DIM
    each += scores * pairs * Q_DIM + outputs * pairs * V_DIM
    return 2 * each * SEQUENCES * CHUNKS
