"""The Hopper kernels of the mLSTM as the catalogue lists them, at published shapes.

65,536 tokens at width 4,096, as arXiv 2503.14376 times them: 16 heads, Dk 128, Dv 256, bfloat16; as
eight sequences, and forward as a single one, too few for one walk to fill the chip.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.catalogue import Budget, Entry, default_budget
from pallas_kernels.mlstm import mosaic_gpu
from pallas_kernels.mlstm.gradient import Options
from pallas_kernels.mlstm.tuning import (
    LONGEST_CHUNK,
    MULTIPROCESSORS,
    TILE,
    TuningConfig,
    suited_span,
)
from pallas_kernels.targets import Chip, Launch

BATCH, TIME, HEADS, Q_DIM, V_DIM = 8, 8192, 16, 128, 256
FORWARD_CHUNK, CHUNK = TILE, 128  # one walk forward
SEQUENCES = BATCH * HEADS
TOKENS = SEQUENCES * TIME
DTYPE = jnp.bfloat16
Q_BYTES = TOKENS * Q_DIM * 2  # of q or k
V_BYTES = TOKENS * V_DIM * 2  # of v or h
STATE_BYTES = TOKENS * Q_DIM * V_DIM * 2  # of C, divided by the chunk: between chunks
GATE_BYTES = TOKENS * 4  # of a row of gates
FORWARD_BYTES = 2 * Q_BYTES + 2 * V_BYTES + 8 * GATE_BYTES
EVERYONE, COMPUTING, LOADING = (0, 1, 2), (0, 1), (2,)


def entries() -> tuple[Entry, ...]:
    """Forward alone, and with the backward: two calls, as a gradient makes them; one sequence."""
    return _entry(False), _entry(True), _long_entry()


def _given(batch: int, chunk: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What `mosaic_gpu.forward` takes."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    time = BATCH * TIME // batch
    q = jax.ShapeDtypeStruct((batch, time, HEADS, Q_DIM), DTYPE)
    v = jax.ShapeDtypeStruct((batch, time, HEADS, V_DIM), DTYPE)
    chunks = (batch, HEADS, time // chunk)
    state = (shape((batch, HEADS, Q_DIM, V_DIM)), shape((batch, HEADS, Q_DIM)))
    return q, q, v, shape((*chunks, 8, chunk)), shape(chunks), *state


def _call(function, chunk: int):
    return functools.partial(function, Options(chunk, True, True, TuningConfig()))


def _entry(backward: bool) -> Entry:
    forward = _call(mosaic_gpu.forward, FORWARD_CHUNK)
    gradient = _call(mosaic_gpu.backward, CHUNK)
    given, again = _given(BATCH, FORWARD_CHUNK), _given(BATCH, CHUNK)
    _, _, v, _, _, *state = given

    def both(dh, dmemory, dnormalizer, *arguments):
        first, second = arguments[: len(given)], arguments[len(given) :]
        return forward(*first), gradient(*second, dh, dmemory, dnormalizer)

    minimum = FORWARD_BYTES
    moved = minimum
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

    # In the backward pass states go through memory, and the chunks read all once more.
    ratio = 2.4 if backward else 1.1
    return Entry(
        name="mlstm/published/" + ("forward+backward" if backward else "forward"),
        platform="gpu",
        build=lambda _: (both, (v, *state, *given, *again)) if backward else (forward, given),
        bytes_minimum=minimum,
        bytes_moved=moved,
        launches=_launches(backward),
        matrix_flops=flops,
        chips=("h100", "h200"),
        budget=functools.partial(_budget, ratio, backward),
    )


def _budget(ratio: float, backward: bool, chip: Chip) -> Budget:
    # What JAX 0.11 makes of the states' backward spills 16 bytes, and loads them again.
    spill = 32 if backward and jax.__version_info__ < (0, 12) else 0
    return dataclasses.replace(
        default_budget(chip), spill=spill, bytes_ratio=ratio, floor_ratio=ratio
    )


def _long_entry() -> Entry:
    """One sequence, whose chunks are spread over the chip: their states go through memory."""
    time, chunk = BATCH * TIME, LONGEST_CHUNK
    # A thread block walks with 64 x 64 numbers of the state, so k is read four times and v twice.
    # The rows of a chunk's second half read k, v and C again, which the same thread block has read
    # 192 KB before: 132 of them have 25 MB of the 50 that the second cache holds.
    states = STATE_BYTES // chunk
    moved = 4 * Q_BYTES + 2 * V_BYTES + states
    moved += 2 * Q_BYTES + 2 * V_BYTES + states + 9 * GATE_BYTES
    # Two turns of 128 rows for each chunk: two tiles of tokens in the first, four in the second.
    # The warpgroup with the later rows adds them all, the other one waits for the last.
    span = suited_span(HEADS, time // chunk, MULTIPROCESSORS)
    turns, seen = span * chunk // (2 * TILE), 3
    outputs = Launch(
        "mlstm_outputs",
        (1, turns, seen, 1, turns, seen, 1, 1, 1, 1),
        bytes_in_flight=3 * TILE * (Q_DIM + V_DIM) * 2,
        warpgroups=[EVERYONE, *[COMPUTING] * 3, *[LOADING] * 6],
    )
    walk = _walk("mlstm_states_forward", time, chunk, 4 * TILE * (64 + 64) * 2, alone=True)
    return Entry(
        name="mlstm/long/forward",
        platform="gpu",
        build=lambda _: (_call(mosaic_gpu.forward, chunk), _given(1, chunk)),
        bytes_minimum=FORWARD_BYTES,
        bytes_moved=moved,
        launches=(outputs, walk),
        matrix_flops=_products(chunk, states=1, scores=1, outputs=1, reads=1),
        chips=("h100", "h200"),
        budget=functools.partial(_budget, 2.7, False),
    )


def _launches(backward: bool) -> tuple[Launch, ...]:
    """What the kernels do in their loops, as the compiler orders these.

    A warpgroup's chunks with the tiles in each, the loader's, and what it waits for in the end. The
    first loop of each kernel zeroes the barriers.
    """
    span = suited_span(SEQUENCES, TIME // CHUNK, MULTIPROCESSORS)
    tiles, tile_bytes = V_DIM // TILE, CHUNK * TILE * 2

    def by_span(kernel: str, compute: int, load: int, in_flight: int) -> Launch:
        """So many loops over tiles in the one and in the other."""
        trips = (1, span, *[tiles] * compute, span, *[tiles] * load, 1, 1, 1, 1)
        groups = [EVERYONE] + [COMPUTING] * (1 + compute) + [LOADING] * (5 + load)
        return Launch(kernel, trips, bytes_in_flight=in_flight, warpgroups=groups)

    tokens = TILE * (Q_DIM + V_DIM) * 2
    # A part of a kernel's name must be in no other's.
    forward = _walk("mlstm_fused_forward", TIME, TILE, 2 * TILE * (2 * Q_DIM + V_DIM) * 2)
    if not backward:
        return (forward,)
    return (
        forward,
        _walk("mlstm_states_again", TIME, CHUNK, 3 * tokens),
        _walk("mlstm_states_backward", TIME, CHUNK, 2 * tokens),
        by_span("mlstm_rows_gradient", 1, 1, 3 * 3 * tile_bytes),
        by_span("mlstm_columns_gradient", 3, 3, 2 * 3 * tile_bytes),
    )


def _walk(kernel: str, time: int, chunk: int, in_flight: int, *, alone: bool = False) -> Launch:
    """Over chunks in one warpgroup, or two, and by tiles in the loader."""
    trips, groups = [time // chunk, time // TILE], [COMPUTING, LOADING]
    if alone:
        groups = [(0,), (1,)]
    else:  # The first loop zeroes the barriers.
        trips, groups = [1, *trips], [EVERYONE, *groups]
    return Launch(kernel, tuple(trips), bytes_in_flight=in_flight, warpgroups=groups)


def _products(chunk: int, *, states: int, scores: int, outputs: int, reads: int) -> int:
    """Operations of so many products of each form, of all chunks."""
    pairs = chunk * (chunk + 1) // 2  # that a causal product needs
    each = states * chunk * Q_DIM * V_DIM + reads * chunk * Q_DIM * V_DIM
    each += scores * pairs * Q_DIM + outputs * pairs * V_DIM
    return 2 * each * SEQUENCES * (TIME // chunk)
