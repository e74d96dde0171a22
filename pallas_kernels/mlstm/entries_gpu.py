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
from pallas_kernels.mlstm.tuning import MULTIPROCESSORS, TILE, TuningConfig, suited_span
from pallas_kernels.targets import Chip, Launch

BATCH, TIME, HEADS, Q_DIM, V_DIM = 8, 8192, 16, 128, 256
FORWARD_CHUNK, CHUNK = 256, 128
SEQUENCES = BATCH * HEADS
DTYPE = jnp.bfloat16
Q_BYTES = BATCH * TIME * HEADS * Q_DIM * 2  # of q or k
V_BYTES = BATCH * TIME * HEADS * V_DIM * 2  # of v or h
STATE_BYTES = SEQUENCES * TIME * Q_DIM * V_DIM * 2  # of C, divided by the chunk: between chunks
GATE_BYTES = SEQUENCES * TIME * 4  # of a row of gates


def entries() -> tuple[Entry, ...]:
    """Forward alone, and with the backward: two calls, as a gradient makes them."""
    return _entry(False), _entry(True)


def _entry(backward: bool) -> Entry:
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    q = jax.ShapeDtypeStruct((BATCH, TIME, HEADS, Q_DIM), DTYPE)
    v = jax.ShapeDtypeStruct((BATCH, TIME, HEADS, V_DIM), DTYPE)
    state = (shape((BATCH, HEADS, Q_DIM, V_DIM)), shape((BATCH, HEADS, Q_DIM)))
    config = TuningConfig()
    given = {}
    for chunk in (FORWARD_CHUNK, CHUNK):
        chunks = (BATCH, HEADS, TIME // chunk)
        given[chunk] = (q, q, v, shape((*chunks, 8, chunk)), shape(chunks), *state)

    forward = functools.partial(mosaic_gpu.forward, Options(FORWARD_CHUNK, True, True, config))
    gradient = functools.partial(mosaic_gpu.backward, Options(CHUNK, True, True, config))

    def both(dh, dmemory, dnormalizer, *arguments):
        first, second = arguments[: len(given[CHUNK])], arguments[len(given[CHUNK]) :]
        return forward(*first), gradient(*second, dh, dmemory, dnormalizer)

    minimum = 2 * Q_BYTES + 2 * V_BYTES + 8 * GATE_BYTES
    states = STATE_BYTES // FORWARD_CHUNK
    # The rows of a chunk's second half read k, v and C again, which the same thread block has read
    # 192 KB before: 132 of them have 25 MB of the 50 that the second cache holds.
    moved = Q_BYTES + V_BYTES + states
    moved += 2 * Q_BYTES + 2 * V_BYTES + states + 9 * GATE_BYTES
    flops = _products(FORWARD_CHUNK, states=1, scores=1, outputs=1, reads=1)
    if backward:
        # q, k, v, dh and the gates, then the gradients of the first three and the gates.
        minimum += 4 * Q_BYTES + 3 * V_BYTES + 12 * GATE_BYTES
        states = STATE_BYTES // CHUNK
        walk = Q_BYTES + V_BYTES + states
        moved += walk  # The states once more.
        moved += 3 * Q_BYTES + 2 * V_BYTES + states + 13 * GATE_BYTES  # The rows.
        moved += walk + states + 2 * GATE_BYTES  # Cotangents of the states, times these.
        moved += 3 * Q_BYTES + 3 * V_BYTES + states + 15 * GATE_BYTES  # The columns.
        flops += _products(CHUNK, states=2, scores=4, outputs=3, reads=3)

    def budget(chip: Chip) -> Budget:
        # The states between the chunks go through memory, and the chunks read all once more.
        ratio = 2.7 if backward else 1.9
        # What JAX 0.11 makes of the states' backward spills 16 bytes, and loads them again.
        spill = 32 if jax.__version_info__ < (0, 12) else 0
        return dataclasses.replace(
            default_budget(chip), spill=spill, bytes_ratio=ratio, floor_ratio=ratio
        )

    return Entry(
        name="mlstm/published/" + ("forward+backward" if backward else "forward"),
        platform="gpu",
        build=lambda _: (
            (both, (v, *state, *given[FORWARD_CHUNK], *given[CHUNK]))
            if backward
            else (forward, given[FORWARD_CHUNK])
        ),
        bytes_minimum=minimum,
        bytes_moved=moved,
        launches=_launches(backward),
        matrix_flops=flops,
        chips=("h100", "h200"),
        budget=budget,
    )


def _launches(backward: bool) -> tuple[Launch, ...]:
    """What the kernels do in their loops, as the compiler orders these.

    A warpgroup's chunks with the tiles in each, the loader's, and what it waits for in the end. The
    first loop of each kernel zeroes the barriers.
    """
    everyone, computing, loading = (0, 1, 2), (0, 1), (2,)
    span = suited_span(SEQUENCES, TIME // FORWARD_CHUNK, MULTIPROCESSORS)  # of either chunk
    tiles, tile_bytes = V_DIM // TILE, CHUNK * TILE * 2

    def by_span(kernel: str, compute: int, load: int, in_flight: int) -> Launch:
        """So many loops over tiles in the one and in the other."""
        trips = (1, span, *[tiles] * compute, span, *[tiles] * load, 1, 1, 1, 1)
        groups = [everyone] + [computing] * (1 + compute) + [loading] * (5 + load)
        return Launch(kernel, trips, bytes_in_flight=in_flight, warpgroups=groups)

    def walk(kernel: str, chunk: int, slots: int) -> Launch:
        trips = (1, TIME // chunk, TIME // TILE)
        in_flight = slots * TILE * (Q_DIM + V_DIM) * 2
        return Launch(
            kernel, trips, bytes_in_flight=in_flight, warpgroups=[everyone, computing, loading]
        )

    # Two turns of 128 rows for each chunk: two tiles of tokens in the first, four in the second.
    # The warpgroup with the later rows adds them all, the other one waits for the last.
    turns, seen = span * FORWARD_CHUNK // (2 * TILE), 3
    outputs = Launch(
        "mlstm_outputs",
        (1, turns, seen, 1, turns, seen, 1, 1, 1, 1),
        bytes_in_flight=3 * TILE * (Q_DIM + V_DIM) * 2,
        warpgroups=[everyone, *[computing] * 3, *[loading] * 6],
    )
    # A part of a kernel's name must be in no other's.
    forward = (outputs, walk("mlstm_states_forward", FORWARD_CHUNK, 3))
    if not backward:
        return forward
    return (
        *forward,
        walk("mlstm_states_again", CHUNK, 3),
        walk("mlstm_states_backward", CHUNK, 2),
        by_span("mlstm_rows_gradient", 1, 1, 3 * 3 * tile_bytes),
        by_span("mlstm_columns_gradient", 3, 3, 2 * 3 * tile_bytes),
    )


def _products(chunk: int, *, states: int, scores: int, outputs: int, reads: int) -> int:
    """Operations of so many products of each form, of all chunks."""
    pairs = chunk * (chunk + 1) // 2  # that a causal product needs
    each = states * chunk * Q_DIM * V_DIM + reads * chunk * Q_DIM * V_DIM
    each += scores * pairs * Q_DIM + outputs * pairs * V_DIM
    return 2 * each * SEQUENCES * (TIME // chunk)
