"""The walk over the chunks, from left to right for the states, back for their cotangents.

    C' = c C + (w x)^T y,   n' = c n + sum_j w_j u_j x_j

Forward: x = k, y = v, w = a, u = 1. Backward: dC and dn for C and n, x = q, y = dh, w = g / divisor
and u = dd divisor. What a chunk finds is written down (C in 16 bits), and in the backward its inner
product with the C that the forward wrote there, which the cotangent of log c is.

A thread block owns a tile of C, each warpgroup 64 of its rows, in registers; it walks in steps of
64 tokens. w enters x on its way through registers; n is a product with a matrix whose columns all
are u. Per chunk and head the walk reads L (Dk + Dv) numbers and writes Dk Dv, and multiplies
L Dk Dv times.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mlstm.mosaic_gpu_pipeline import (
    MATRIX,
    Problem,
    Stream,
    accumulated,
    free_barriers,
    full_barriers,
    launch,
    load_matrix,
    load_own,
    load_rows,
    matrices,
    over_rows,
    product,
    store_directly,
    transposed,
    untyped,
    vectors,
    warpgroups,
)
from pallas_kernels.mlstm.tuning import TILE, fitting_slots, state_tiles

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
    q_tile, v_tile = state_tiles(p.config, p.sequences, p.q_dim, p.v_dim, multiprocessors)
    groups, v_blocks = q_tile // TILE, p.v_dim // v_tile
    per_chunk = p.chunk // TILE
    chunks, steps = p.chunks, p.chunks * per_chunk
    arrays = 1 if ratios is None else 2
    slots = fitting_slots(
        p.config,
        groups * TILE * (v_tile + TILE) * p.dtype.itemsize,
        TILE * (q_tile + v_tile) * p.dtype.itemsize + arrays * 4 * TILE,
    )
    rows = p.sequences * chunks
    outputs = [
        jax.ShapeDtypeStruct((rows * p.q_dim, p.v_dim), p.dtype),
        jax.ShapeDtypeStruct((rows, p.q_dim), jnp.float32),
        jax.ShapeDtypeStruct(memory.shape, jnp.float32),
        jax.ShapeDtypeStruct(normalizer.shape, jnp.float32),
    ]
    inputs = [x, y, weights[0], carry, memory, normalizer]
    if ratios is not None:
        inputs.append(ratios[0])
    if backward:
        inputs.append(others)
        outputs.append(jax.ShapeDtypeStruct((rows, v_blocks, p.q_dim), jnp.float32))

    def body(*refs):
        arguments, refs = refs[: len(inputs)], refs[len(inputs) :]
        results, scratch = refs[: len(outputs)], refs[len(outputs) :]
        x_gmem, y_gmem, weights_gmem, carry_gmem, memory_gmem, normalizer_gmem = arguments[:6]
        x_smem, y_smem, ones_smem, staging, numbers_smem, full, free, fetched = scratch
        head, batch = lax.axis_index("head"), lax.axis_index("batch")
        sequence = batch * p.heads + head
        q_block, v_block = lax.axis_index("q_block"), lax.axis_index("v_block")
        stream = Stream(slots, free)

        def place(step: Array) -> tuple[Array, Array]:
            """Row of the arrays by chunk, and the part of the chunk that a step is for."""
            turn = lax.div(step, jnp.int32(per_chunk))
            chunk = chunks - 1 - turn if backward else turn
            return sequence * chunks + chunk, lax.rem(step, jnp.int32(per_chunk))

        def load() -> None:
            @pl.loop(0, steps)
            def _(step):
                slot = stream.acquire(step)
                barrier = full.at[slot]
                index, part = place(step)
                chunk = index - sequence * chunks
                tokens = pl.ds(chunk * p.chunk + part * TILE, TILE)
                in_chunk = pl.ds(part * TILE, TILE)

                def own(group: int) -> Ref:
                    columns = pl.ds(q_block * q_tile + group * TILE, TILE)
                    return x_gmem.at[batch, tokens, head, columns]

                load_own(own, x_smem.at[slot], barrier, groups)
                source = y_gmem.at[batch, tokens, head, pl.ds(v_block * v_tile, v_tile)]
                plgpu.copy_gmem_to_smem(source, y_smem.at[slot], barrier)
                sources = [weights_gmem.at[index, weights[1], in_chunk]]
                if ratios is not None:
                    sources.append(arguments[6].at[index, ratios[1], in_chunk])
                for i, source in enumerate(sources):
                    plgpu.copy_gmem_to_smem(source, numbers_smem.at[slot, i], barrier)

            stream.drain(jnp.int32(steps))

        def compute(group: Array) -> None:
            first = q_block * q_tile + group * TILE
            own = pl.ds(first, TILE)

            columns = pl.ds(v_block * v_tile, v_tile)

            def states(ref: Ref, index: Array) -> Ref:
                return ref.at[pl.ds(index * p.q_dim + first, TILE), columns]

            def fetch(index: Array) -> None:
                source = states(arguments[-1], index)
                plgpu.copy_gmem_to_smem(source, staging.at[group], fetched.at[group])

            zeros = plgpu.layout_cast(jnp.zeros((TILE, TILE), jnp.float32), MATRIX)
            state = untyped(load_matrix(memory_gmem.at[sequence, own, columns]))
            vector = untyped(load_rows(normalizer_gmem.at[sequence, own]))
            if ratios is None:
                ones_smem[group] = (zeros + 1).astype(p.dtype)
            if backward:
                fetch(place(jnp.int32(0))[0])

            def write(index: Array, state: Array, vector: Array) -> None:
                """Write down what a chunk finds."""
                if backward:
                    plgpu.barrier_wait(fetched.at[group])
                    terms = jnp.zeros_like(zeros)
                    for piece in range(0, v_tile, TILE):
                        other = load_matrix(staging.at[group, :, pl.ds(piece, TILE)])
                        terms += state[:, piece : piece + TILE] * other
                    store_directly(results[4].at[index, v_block, own], jnp.sum(terms, axis=1))
                else:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                staging[group] = state.astype(p.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(staging.at[group], states(results[0], index))

                @pl.when(v_block == 0)
                def _():
                    store_directly(results[1].at[index, own], vector)

            def advance(step: Array, state: Array, vector: Array) -> tuple[Array, Array]:
                slot = stream.slot(step)
                plgpu.barrier_wait(full.at[slot])
                own_x = x_smem.at[slot, group]
                weighted = load_matrix(own_x)
                weighted *= over_rows(load_rows(numbers_smem.at[slot, 0]), weighted)
                own_x[...] = weighted.astype(p.dtype)
                if ratios is not None:
                    ratio = load_rows(numbers_smem.at[slot, 1])
                    ones_smem[group] = over_rows(ratio, zeros).astype(p.dtype)
                plgpu.commit_smem()

                state = accumulated(state, transposed(own_x), y_smem.at[slot])
                added = product(transposed(own_x), ones_smem.at[group])
                vector += jnp.max(added, axis=1)  # All columns are alike.
                stream.release(step)
                return state, vector

            def chunk(turn: Array, carried: tuple[Array, Array]) -> tuple[Array, Array]:
                state, vector = carried
                index, _ = place(turn * per_chunk)
                decay = carry_gmem[index]
                write(index, state, vector)
                state, vector = state * decay, vector * decay
                for part in range(per_chunk):
                    step = turn * per_chunk + part
                    state, vector = advance(step, state, vector)
                    if backward and part == 0:

                        @pl.when(turn + 1 < chunks)
                        def _():
                            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                            fetch(place((turn + 1) * per_chunk)[0])

                return state, vector

            state, vector = lax.fori_loop(0, chunks, chunk, (state, vector))
            store_directly(results[2].at[sequence, own, columns], state)

            @pl.when(v_block == 0)
            def _():
                store_directly(results[3].at[sequence, own], vector)

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        warpgroups(groups, compute, load)

    scratch = [
        matrices(slots, groups, TILE, TILE, dtype=p.dtype),
        matrices(slots, TILE, v_tile, dtype=p.dtype),
        matrices(groups, TILE, TILE, dtype=p.dtype),
        matrices(groups, TILE, v_tile, dtype=p.dtype),
        vectors(slots, arrays, TILE),
        full_barriers(slots, groups + 1 + arrays),
        free_barriers(slots, groups),
        full_barriers(groups),
    ]
    grid = {"v_block": v_blocks, "q_block": p.q_dim // q_tile, "head": p.heads, "batch": p.batch}
    return launch(body, name, groups, outputs, scratch, **grid)(*inputs)
