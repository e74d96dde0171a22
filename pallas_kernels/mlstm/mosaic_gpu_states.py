"""The walk over the chunks, from left to right for the states, back for their cotangents.

    C' = c C + (w x)^T y,   n' = c n + sum_j w_j u_j x_j

Forward: x = k, y = v, w = a, u = 1. Backward: dC and dn for C and n, x = q, y = dh, w = g / divisor
and u = dd divisor. What a chunk finds is written down (C in 16 bits), and in the backward its inner
product with the C that the forward wrote there, which the cotangent of log c is. Of pieces of a
sequence the walk has only what each adds to the state.

A thread block owns a tile of C, each warpgroup 64 of its rows, in registers; it walks in steps of
64 tokens. w enters x on its way through registers; n is a product with a matrix whose columns all
are u. Per chunk and head the walk reads L (Dk + Dv) numbers and writes Dk Dv, and multiplies
L Dk Dv times.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.chip import TILE
from pallas_kernels.hopper.pipeline import (
    Stream,
    free_barriers,
    full_barriers,
    launch,
    load_own,
    warpgroups,
)
from pallas_kernels.hopper.tiles import (
    MATRIX,
    ROW,
    accumulated,
    load_matrix,
    load_rows,
    matrices,
    over_rows,
    product,
    store_directly,
    transposed,
    untyped,
    vectors,
)
from pallas_kernels.mlstm.mosaic_gpu_problem import Problem, Walk
from pallas_kernels.mlstm.tuning import fitting_slots, state_tiles

Array = jax.Array
Ref = jax.Ref


def walk(
    p: Problem,
    x: Array,
    y: Array,
    weights: tuple[Array, int],
    ratios: tuple[Array, int] | None,
    carry: Array,
    memory: Array,
    normalizer: Array,
    others: Array | None,
    *,
    name: str,
    multiprocessors: int,
) -> tuple[Array, ...]:
    """Return what each chunk finds, and what the last one leaves.

    Args:
        p: the problem.
        x: [B, T, H, Dk].
        y: [B, T, H, Dv].
        weights: an array [B H N, rows, L], float32, and the row of it that w is.
        ratios: the same for u; None for 1.
        carry: c, [B H N].
        memory, normalizer: what the first chunk finds, [B H, Dk, Dv] and [B H, Dk], float32.
        others: C of every chunk, [B H N Dk, Dv]: the walk goes backward, from the last chunk to
            the first.
        name: of the kernel.
        multiprocessors: of the chip.

    Returns:
        C [B H N Dk, Dv] in x's dtype and n [B H N, Dk] of every chunk; C [B H, Dk, Dv] and
        n [B H, Dk] in the end; and, with `others`, partial sums of the inner products
        [B H N, tiles, Dk], float32.
    """
    backward = others is not None
    more = {"memory": memory, "normalizer": normalizer} | ({"others": others} if backward else {})
    given, rows = _given(x, y, weights, ratios, carry, **more)
    found = _launch(p, given, rows, name, multiprocessors, backward=backward)
    order = ("memories", "normalizers", "last_memory", "last_normalizer", "inner")
    return tuple(found[key] for key in order if key in found)


def added(
    p: Problem,
    x: Array,
    y: Array,
    weights: tuple[Array, int],
    ratios: tuple[Array, int] | None,
    carry: Array,
    *,
    backward: bool,
    name: str,
    multiprocessors: int,
) -> tuple[Array, Array]:
    """Return what each piece of a sequence adds to the state, C [B H, P - 1, Dk, Dv] and n.

    All but the last of P pieces, or but the first where the walk goes back.

    Args:
        p: the problem, with more pieces than one.
        backward: whether the walk goes back.
        x, y, weights, ratios, carry, name, multiprocessors: as in `walk`.
    """
    given, rows = _given(x, y, weights, ratios, carry)
    found = _launch(p, given, rows, name, multiprocessors, backward=backward)
    return tuple(
        x.reshape(-1, p.pieces - 1, *x.shape[1:])
        for x in (found["last_memory"], found["last_normalizer"])
    )


def _given(x, y, weights, ratios, carry, **more: Array) -> tuple[dict[str, Array], list[int]]:
    """What a kernel is given, by name, and the rows of the weights and of the ratios."""
    numbers = {"weights": weights} | ({} if ratios is None else {"ratios": ratios})
    arrays = {name: array for name, (array, _) in numbers.items()}
    return {"x": x, "y": y, "carry": carry, **arrays, **more}, [row for _, row in numbers.values()]


def _launch(
    p: Problem,
    given: dict[str, Array],
    rows: list[int],
    name: str,
    multiprocessors: int,
    *,
    backward: bool,
) -> dict[str, Array]:
    """Run the walk: over all chunks and with what each finds, or, given no state, over pieces.

    Args:
        p: the problem.
        given, rows: from `_given`.
        name: of the kernel.
        multiprocessors: of the chip.
        backward: whether the walk goes back.
    """
    in_pieces, has_ratios, has_others = "memory" not in given, "ratios" in given, "others" in given
    without = None if not in_pieces else 0 if backward else p.pieces - 1
    q_tile, v_tile = state_tiles(p.config, p.sequences, p.q_dim, p.v_dim, multiprocessors)
    groups, v_blocks = q_tile // TILE, p.v_dim // v_tile
    per_chunk = p.chunk // TILE
    chunks, steps = p.chunks, p.chunks * per_chunk
    arrays = 1 + has_ratios
    slots = fitting_slots(
        p.config,
        groups * TILE * (TILE if in_pieces else v_tile + TILE) * p.dtype.itemsize,
        TILE * (q_tile + v_tile) * p.dtype.itemsize + arrays * 4 * TILE,
    )

    def numbers(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    walks = math.prod(Walk.grid(p, without).values())
    by_chunk = p.sequences * chunks
    out = {
        "last_memory": numbers(walks, p.q_dim, p.v_dim),
        "last_normalizer": numbers(walks, p.q_dim),
    }
    if not in_pieces:
        out["memories"] = jax.ShapeDtypeStruct((by_chunk * p.q_dim, p.v_dim), p.dtype)
        out["normalizers"] = numbers(by_chunk, p.q_dim)
    if has_others:
        out["inner"] = numbers(by_chunk, v_blocks, p.q_dim)
    scratch = {
        "x": matrices(slots, groups, TILE, TILE, dtype=p.dtype),
        "y": matrices(slots, TILE, v_tile, dtype=p.dtype),
        "ones": matrices(groups, TILE, TILE, dtype=p.dtype),
        "numbers": vectors(slots, arrays, TILE),
        "full": full_barriers(slots, groups + 1 + arrays),
        "free": free_barriers(slots, groups),
    }
    if not in_pieces:
        scratch["staging"] = matrices(groups, TILE, v_tile, dtype=p.dtype)
    if has_others:
        scratch["fetched"] = full_barriers(groups)

    def body(*refs):
        source, refs = dict(zip(given, refs, strict=False)), refs[len(given) :]
        target, refs = dict(zip(out, refs, strict=False)), refs[len(out) :]
        smem = dict(zip(scratch, refs, strict=True))
        walked = Walk(p, without)
        q_block, v_block = lax.axis_index("q_block"), lax.axis_index("v_block")
        stream, full = Stream(slots, smem["free"]), smem["full"]

        def place(step: Array) -> tuple[Array, Array]:
            """Chunk of a step, and part of the chunk."""
            turn = lax.div(step, jnp.int32(per_chunk))
            return chunks - 1 - turn if backward else turn, lax.rem(step, jnp.int32(per_chunk))

        def load() -> None:
            @pl.loop(0, steps)
            def _(step):
                slot = stream.acquire(step)
                barrier = full.at[slot]
                chunk, part = place(step)
                tokens = pl.ds(chunk * p.chunk + part * TILE, TILE)
                in_chunk = pl.ds(part * TILE, TILE)

                def own(group: int) -> Ref:
                    columns = pl.ds(q_block * q_tile + group * TILE, TILE)
                    return source["x"].at[walked.batch, tokens, walked.head, columns]

                load_own(own, smem["x"].at[slot], barrier, groups)
                columns = pl.ds(v_block * v_tile, v_tile)
                y = source["y"].at[walked.batch, tokens, walked.head, columns]
                plgpu.copy_gmem_to_smem(y, smem["y"].at[slot], barrier)
                for i, key in enumerate(("weights", "ratios")[:arrays]):
                    x = source[key].at[walked.index(chunk), rows[i], in_chunk]
                    plgpu.copy_gmem_to_smem(x, smem["numbers"].at[slot, i], barrier)

            stream.drain(jnp.int32(steps))

        def compute(group: Array) -> None:
            first = q_block * q_tile + group * TILE
            own = pl.ds(first, TILE)
            columns = pl.ds(v_block * v_tile, v_tile)

            def states(ref: Ref, chunk: Array) -> Ref:
                return ref.at[pl.ds(walked.index(chunk) * p.q_dim + first, TILE), columns]

            def fetch(turn: Array) -> None:
                x = states(source["others"], place(turn * per_chunk)[0])
                plgpu.copy_gmem_to_smem(x, smem["staging"].at[group], smem["fetched"].at[group])

            zeros = plgpu.layout_cast(jnp.zeros((TILE, TILE), jnp.float32), MATRIX)
            if in_pieces:
                state = plgpu.layout_cast(jnp.zeros((TILE, v_tile), jnp.float32), MATRIX)
                vector = plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), ROW)
            else:
                state = untyped(load_matrix(source["memory"].at[walked.sequence, own, columns]))
                vector = untyped(load_rows(source["normalizer"].at[walked.sequence, own]))
            if not has_ratios:
                smem["ones"][group] = (zeros + 1).astype(p.dtype)
            if has_others:
                fetch(jnp.int32(0))

            def write(chunk: Array, state: Array, vector: Array) -> None:
                """Write down what a chunk finds."""
                staging = smem["staging"]
                if has_others:
                    plgpu.barrier_wait(smem["fetched"].at[group])
                    terms = jnp.zeros_like(zeros)
                    for piece in range(0, v_tile, TILE):
                        other = load_matrix(staging.at[group, :, pl.ds(piece, TILE)])
                        terms += state[:, piece : piece + TILE] * other
                    inner = target["inner"].at[walked.index(chunk), v_block, own]
                    store_directly(inner, jnp.sum(terms, axis=1))
                else:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                staging[group] = state.astype(p.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(staging.at[group], states(target["memories"], chunk))

                @pl.when(v_block == 0)
                def _():
                    store_directly(target["normalizers"].at[walked.index(chunk), own], vector)

            def advance(step: Array, state: Array, vector: Array) -> tuple[Array, Array]:
                slot = stream.slot(step)
                plgpu.barrier_wait(full.at[slot])
                own_x = smem["x"].at[slot, group]
                weighted = load_matrix(own_x)
                weighted *= over_rows(load_rows(smem["numbers"].at[slot, 0]), weighted)
                own_x[...] = weighted.astype(p.dtype)
                if has_ratios:
                    ratio = load_rows(smem["numbers"].at[slot, 1])
                    smem["ones"][group] = over_rows(ratio, zeros).astype(p.dtype)
                plgpu.commit_smem()

                state = accumulated(state, transposed(own_x), smem["y"].at[slot])
                sums = product(transposed(own_x), smem["ones"].at[group])
                vector += jnp.max(sums, axis=1)  # All columns are alike.
                stream.release(step)
                return state, vector

            def of_chunk(turn: Array, carried: tuple[Array, Array]) -> tuple[Array, Array]:
                state, vector = carried
                chunk, _ = place(turn * per_chunk)
                decay = source["carry"][walked.index(chunk)]
                if not in_pieces:
                    write(chunk, state, vector)
                state, vector = state * decay, vector * decay
                for part in range(per_chunk):
                    step = turn * per_chunk + part
                    state, vector = advance(step, state, vector)
                    if has_others and part == 0:

                        @pl.when(turn + 1 < chunks)
                        def _():
                            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                            fetch(turn + 1)

                return state, vector

            state, vector = lax.fori_loop(0, chunks, of_chunk, (state, vector))
            store_directly(target["last_memory"].at[walked.number, own, columns], state)

            @pl.when(v_block == 0)
            def _():
                store_directly(target["last_normalizer"].at[walked.number, own], vector)

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        warpgroups(groups, compute, load)

    grid = {"v_block": v_blocks, "q_block": p.q_dim // q_tile}
    grid |= Walk.grid(p, without)
    run = launch(body, name, groups, list(out.values()), list(scratch.values()), **grid)
    return dict(zip(out, run(*given.values()), strict=True))
