"""The Hopper kernels of the mLSTM as the catalogue lists them, at published shapes.

65,536 tokens at width 4,096, as arXiv 2503.14376 times them: 16 heads, Dk 128, Dv 256, bfloat16; as
eight sequences, and as a single long one, which walks over whole states take in pieces. That one
also by chunk, with the kernels that wider heads and short sequences have.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.catalogue import Budget, Entry, default_budget
from pallas_kernels.hopper.chip import MULTIPROCESSORS, TILE
from pallas_kernels.mlstm import mosaic_gpu
from pallas_kernels.mlstm.gradient import Options
from pallas_kernels.mlstm.mosaic_gpu_fused_backward import GROUP
from pallas_kernels.mlstm.tuning import LONGEST_CHUNK, TuningConfig, suited_span
from pallas_kernels.targets import Chip, Launch

BATCH, TIME, HEADS, Q_DIM, V_DIM = 8, 8192, 16, 128, 256
CHUNK = 128  # of the backward pass where states go through memory
PIECES = 8  # of one sequence with 16 heads: 128 thread blocks for 132 multiprocessors
SEQUENCES = BATCH * HEADS
TOKENS = SEQUENCES * TIME
DTYPE = jnp.bfloat16
Q_BYTES = TOKENS * Q_DIM * 2  # of q or k
V_BYTES = TOKENS * V_DIM * 2  # of v or h
STATE_BYTES = TOKENS * Q_DIM * V_DIM * 2  # of C, divided by the chunk: between chunks
GATE_BYTES = TOKENS * 4  # of a row of gates
FORWARD_BYTES = 2 * Q_BYTES + 2 * V_BYTES + 8 * GATE_BYTES
# q, k, v, dh and the gates, then the gradients of the first three and the gates.
BACKWARD_BYTES = 4 * Q_BYTES + 3 * V_BYTES + 12 * GATE_BYTES
EVERYONE, COMPUTING, LOADING = (0, 1, 2), (0, 1), (2,)
# Bytes: what JAX 0.11 makes of the walk over rows spills a few numbers, and loads them again.
_WALK_SPILL = 48 if jax.__version_info__ < (0, 12) else 0


def entries() -> tuple[Entry, ...]:
    """Forward alone, and with the backward: two calls, as a gradient makes them."""
    makers = (_published, _long, _by_chunk)
    return tuple(make(backward) for make in makers for backward in (False, True))


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


def _entry(batch: int, chunks: tuple[int, int], backward: bool, **more: Any) -> Entry:
    forward, gradient = (
        _call(function, chunk)
        for function, chunk in zip((mosaic_gpu.forward, mosaic_gpu.backward), chunks, strict=True)
    )
    given, again = (_given(batch, chunk) for chunk in chunks)
    _, _, v, _, _, *state = given

    def both(dh, dmemory, dnormalizer, *arguments):
        first, second = arguments[: len(given)], arguments[len(given) :]
        return forward(*first), gradient(*second, dh, dmemory, dnormalizer)

    return Entry(
        platform="gpu",
        build=lambda _: (both, (v, *state, *given, *again)) if backward else (forward, given),
        bytes_minimum=FORWARD_BYTES + backward * BACKWARD_BYTES,
        chips=("h100", "h200"),
        **more,
    )


def _budget(ratio: float, chip: Chip, **more: float | int) -> Budget:
    return dataclasses.replace(default_budget(chip), bytes_ratio=ratio, floor_ratio=ratio, **more)


def _published(backward: bool) -> Entry:
    """Walks with the states in registers: one forward, two for the gradient."""
    # Nothing but a few states is read twice in a pass. An H200 has more bandwidth, and issues for
    # more of its time.
    budget = functools.partial(_budget, 1.1)
    if backward:
        budget = functools.partial(_budget, 1.5, spill=_WALK_SPILL, issue_ratio=0.8)
    return _walked(BATCH, 1, backward, name="published", budget=budget)


def _long(backward: bool) -> Entry:
    """One sequence in pieces: the walks, each after one for the states between these."""
    budget = functools.partial(_budget, 1.5)
    if backward:
        budget = functools.partial(_budget, 2.0, spill=_WALK_SPILL, issue_ratio=0.8)
    return _walked(1, PIECES, backward, name="long", budget=budget)


def _walked(batch: int, pieces: int, backward: bool, *, name: str, **more: Any) -> Entry:
    time = BATCH * TIME // batch // pieces
    tokens = TILE * (Q_DIM + V_DIM) * 2
    # What all pieces but one add to the state, and what each begins with: written and read, the
    # latter once more before what is there at first comes to it.
    handed_on = (2 * (pieces - 1) + 4 * pieces * (pieces > 1)) * HEADS * Q_DIM * V_DIM * 4
    passed_over = (Q_BYTES + V_BYTES + GATE_BYTES) * (pieces - 1) // pieces + handed_on
    moved = FORWARD_BYTES + passed_over
    flops = _products(TILE, states=1, scores=1, outputs=1, reads=1)
    # A part of a kernel's name must be in no other's.
    launches = [walk_launch("mlstm_fused_forward", time, TILE, 2 * (tokens + TILE * Q_DIM * 2))]
    for_pieces = ["forward"]
    if backward:
        states = STATE_BYTES // (GROUP * TILE)
        moved += 3 * Q_BYTES + 2 * V_BYTES + states + 13 * GATE_BYTES  # The rows.
        moved += 3 * Q_BYTES + 3 * V_BYTES + states + 14 * GATE_BYTES  # The columns.
        moved += 2 * passed_over
        flops += _products(TILE, states=2, scores=4, outputs=3, reads=3)
        launches += [
            walk_launch(f"mlstm_fused_{name}", time, TILE, 2 * 2 * tokens)
            for name in ("rows", "columns")
        ]
        for_pieces += ["again", "backward"]
    if pieces > 1:
        flops += len(for_pieces) * _products(TILE, states=1) * (pieces - 1) // pieces
        launches += [
            walk_launch(f"mlstm_pieces_{name}", time, TILE, 3 * tokens) for name in for_pieces
        ]
    return _entry(
        batch,
        (TILE, TILE),
        backward,
        name=f"mlstm/{name}/{_name(backward)}",
        bytes_moved=moved,
        launches=tuple(launches),
        matrix_flops=flops,
        **more,
    )


def _name(backward: bool) -> str:
    return "forward+backward" if backward else "forward"


def _by_chunk(backward: bool) -> Entry:
    """One sequence, whose chunks are spread over the chip: their states go through memory."""
    time, chunk = BATCH * TIME, LONGEST_CHUNK
    # A thread block walks with 64 x 64 numbers of the state, so k is read four times and v twice.
    # The rows of a chunk's second half read k, v and C again, which the same thread block has read
    # 192 KB before: 132 of them have 25 MB of the 50 that the second cache holds.
    walk, states = 4 * Q_BYTES + 2 * V_BYTES, STATE_BYTES // chunk
    moved = walk + states
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
    in_flight = 4 * TILE * (64 + 64) * 2
    launches = [outputs, walk_launch("mlstm_states_forward", time, chunk, in_flight, alone=True)]
    flops = _products(chunk, states=1, scores=1, outputs=1, reads=1)
    ratio, spill = 2.7, 0
    if backward:
        states = STATE_BYTES // CHUNK
        moved += walk + states  # The states once more.
        moved += 3 * Q_BYTES + 2 * V_BYTES + states + 13 * GATE_BYTES  # The rows.
        moved += walk + 2 * states + 2 * GATE_BYTES  # Cotangents of the states, times these.
        moved += 3 * Q_BYTES + 3 * V_BYTES + states + 15 * GATE_BYTES  # The columns.
        flops += _products(CHUNK, states=2, scores=4, outputs=3, reads=3)
        launches += _gradient_by_chunk(time, in_flight)
        ratio = 3.7
        # What JAX 0.11 makes of the states' backward spills 16 bytes, and loads them again.
        spill = 32 if jax.__version_info__ < (0, 12) else 0
    return _entry(
        1,
        (chunk, CHUNK),
        backward,
        name=f"mlstm/by_chunk/{_name(backward)}",
        bytes_moved=moved,
        launches=tuple(launches),
        matrix_flops=flops,
        budget=functools.partial(_budget, ratio, spill=spill),
    )


def _gradient_by_chunk(time: int, in_flight: int) -> list[Launch]:
    """What the kernels of the backward pass do in their loops, as the compiler orders these.

    A warpgroup's chunks with the tiles in each, the loader's, and what it waits for in the end. The
    first loop of each kernel zeroes the barriers.
    """
    span = suited_span(HEADS, time // CHUNK, MULTIPROCESSORS)
    tiles, tile_bytes = V_DIM // TILE, CHUNK * TILE * 2

    def by_span(kernel: str, compute: int, load: int, in_flight: int) -> Launch:
        """So many loops over tiles in the one and in the other."""
        trips = (1, span, *[tiles] * compute, span, *[tiles] * load, 1, 1, 1, 1)
        groups = [EVERYONE] + [COMPUTING] * (1 + compute) + [LOADING] * (5 + load)
        return Launch(kernel, trips, bytes_in_flight=in_flight, warpgroups=groups)

    return [
        walk_launch("mlstm_states_again", time, CHUNK, in_flight, alone=True),
        walk_launch("mlstm_states_backward", time, CHUNK, in_flight, alone=True),
        by_span("mlstm_rows_gradient", 1, 1, 3 * 3 * tile_bytes),
        by_span("mlstm_columns_gradient", 3, 3, 2 * 3 * tile_bytes),
    ]


def walk_launch(
    kernel: str, time: int, chunk: int, in_flight: int, *, alone: bool = False
) -> Launch:
    """Over chunks in one warpgroup, or two, and by tiles in the loader."""
    trips, groups = [time // chunk, time // TILE], [COMPUTING, LOADING]
    if alone:
        groups = [(0,), (1,)]
    else:  # The first loop zeroes the barriers.
        trips, groups = [1, *trips], [EVERYONE, *groups]
    return Launch(kernel, tuple(trips), bytes_in_flight=in_flight, warpgroups=groups)


def _products(chunk: int, *, states: int, scores: int = 0, outputs: int = 0, reads: int = 0) -> int:
    """Operations of so many products of each form, of all chunks."""
    pairs = chunk * (chunk + 1) // 2  # that a causal product needs
    each = states * chunk * Q_DIM * V_DIM + reads * chunk * Q_DIM * V_DIM
    each += scores * pairs * Q_DIM + outputs * pairs * V_DIM
    return 2 * each * SEQUENCES * (TIME // chunk)
