"""The whole forward pass in one walk over the chunks, where there are sequences enough.

A thread block walks over a sequence in chunks of 64 tokens, each warpgroup with all rows and some
columns of C in registers, and computes h on the way, with the notation of `mosaic_gpu_rows`:

    h = (S v + g (q C)) / divisor,   C' = c C + k^T (a v),   n' = c n + k^T a

q C is a product with a copy of C in 16 bits in shared memory. States do not go through memory: per
token, head and block of W columns the walk reads 2 Dk + W numbers and writes W. It multiplies
64 W + 2 Dk W times, and in each warpgroup 72 Dk times more, for the scores and n.
"""

from typing import Any, NamedTuple

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
    warpgroups,
)
from pallas_kernels.hopper.tiles import (
    MATRIX,
    accumulated,
    inner_with_columns,
    load_columns,
    load_matrix,
    load_rows,
    matrices,
    opaque,
    over_columns,
    over_rows,
    product,
    row_sums,
    store_directly,
    tile_of,
    transposed,
    untyped,
    vectors,
    weighted_sum,
)
from pallas_kernels.mlstm import gates as rows_of
from pallas_kernels.mlstm.mosaic_gpu_problem import Problem, Walk
from pallas_kernels.mlstm.mosaic_gpu_weights import Weights
from pallas_kernels.mlstm.tuning import LONGEST_CHUNK, fitting_slots, suited_pieces

Array = jax.Array
Ref = jax.Ref

# Numbers of C that a warpgroup holds: half of its registers.
_MOST_STATE = 128 * 128
_SHAPES = ((128, 2), (64, 2), (128, 1), (64, 1))


class Tiling(NamedTuple):
    """What a thread block has: columns of v for each warpgroup, warpgroups, slots of the stream.

    And the pieces of a sequence.
    """

    width: int
    groups: int
    slots: int
    pieces: int = 1

    @property
    def columns(self) -> int:
        """Of v, for a thread block."""
        return self.width * self.groups


def tiling(p: Problem, multiprocessors: int) -> Tiling | None:
    """Return how the walk is cut up; None: the kernels that write states down suit better, or must.

    Of all that fill the chip the one that reads and writes least: q and k are read anew for every
    block of columns, k and v for pieces of sequences. `TuningConfig.fused` decides whether there is
    one, if it is not None.

    Args:
        p: the problem, its sequences whole.
        multiprocessors: of the chip.
    """
    if p.config.fused is False:
        return None
    possible = [
        found
        for width, groups in _SHAPES
        if p.v_dim % (width * groups) == 0 and p.q_dim * width <= _MOST_STATE
        if (found := Tiling(width, groups, _slots(p, width, groups))).slots >= 2
    ]
    suited = []
    for found in possible:
        thread_blocks = p.sequences * (p.v_dim // found.columns)
        pieces = suited_pieces(p.config, thread_blocks, p.time // TILE, multiprocessors)
        if pieces is not None:
            suited.append(found._replace(pieces=pieces))
    best = min(suited, key=lambda found: _traffic(p, found), default=None)
    apart = 3 * (p.q_dim + p.v_dim) + 2 * p.q_dim * p.v_dim // LONGEST_CHUNK
    return best if best and (p.config.fused or _traffic(p, best) <= apart) else None


def _traffic(p: Problem, tiling: Tiling) -> float:
    """Numbers of 16 bits that are read and written for each token and head."""
    walked = 2 * (p.q_dim * (p.v_dim // tiling.columns) + p.v_dim)
    if tiling.pieces == 1:
        return walked
    # What pieces add, and their first and last states, in 32 bits: written and read.
    states = 2 * 5 * p.q_dim * p.v_dim * tiling.pieces / p.time
    return walked + p.q_dim + p.v_dim + states


def _slots(p: Problem, width: int, groups: int) -> int:
    fixed = groups * ((p.q_dim * width + TILE * TILE) * p.dtype.itemsize + 4 * p.q_dim)
    slot = (2 * p.q_dim + groups * width) * TILE * p.dtype.itemsize + 8 * TILE * 4
    return fitting_slots(p.config, fixed, slot)


def forward(
    p: Problem, tiling: Tiling, q, k, v, gates, carry, memory, normalizer
) -> tuple[Array, Array, Array]:
    """Return h [B, T, H, Dv], and C [B H, Dk, Dv] and n [B H, Dk] after the last chunk.

    Args:
        p: the problem, with a chunk of 64.
        tiling: how the walk is cut up.
        q, k: [B, T, H, Dk].
        v: [B, T, H, Dv].
        gates: [B H N, 8, 64], float32.
        carry: c, [B H N].
        memory, normalizer: C and n before the first chunk of every sequence or piece, float32.
    """
    width, groups, slots, _ = tiling
    parts = [tile_of(part) for part in range(p.q_dim // TILE)]

    def body(*refs):
        q_gmem, k_gmem, v_gmem, gates_gmem, carry_gmem, memory_gmem, normalizer_gmem = refs[:7]
        h_gmem, last_memory, last_normalizer = refs[7:10]
        q_smem, k_smem, v_smem, gates_smem, c_smem, n_smem, staged, full, free = refs[10:]
        walked, v_block = Walk(p), lax.axis_index("v_block")
        head, batch, sequence = walked.head, walked.batch, walked.sequence
        stream = Stream(slots, free)

        def columns(group: Array | int, tile: int = 0, size: int = width) -> Any:
            return pl.ds((v_block * groups + group) * width + tile * TILE, size)

        def load() -> None:
            @pl.loop(0, p.chunks)
            def _(step):
                slot = stream.acquire(step)
                barrier, tokens = full.at[slot], pl.ds(step * TILE, TILE)
                plgpu.copy_gmem_to_smem(q_gmem.at[batch, tokens, head], q_smem.at[slot], barrier)
                plgpu.copy_gmem_to_smem(k_gmem.at[batch, tokens, head], k_smem.at[slot], barrier)
                source = gates_gmem.at[walked.index(step)]
                plgpu.copy_gmem_to_smem(source, gates_smem.at[slot], barrier)
                for group in range(groups):
                    source = v_gmem.at[batch, tokens, head, columns(group)]
                    plgpu.copy_gmem_to_smem(source, v_smem.at[slot, group], barrier)

            stream.drain(jnp.int32(p.chunks))

        def compute(group: Array) -> None:
            zeros = plgpu.layout_cast(jnp.zeros((TILE, TILE), jnp.float32), MATRIX)
            state = tuple(
                untyped(load_matrix(memory_gmem.at[sequence, part, columns(group)]))
                for part in parts
            )
            vector = tuple(untyped(load_rows(normalizer_gmem.at[sequence, part])) for part in parts)

            def chunk(step: Array, carried):
                state, vector = carried
                decay = carry_gmem[walked.index(step)]
                slot, own = opaque(stream.slot(step)), opaque(group)
                staging, own_c, own_n = staged.at[own], c_smem.at[own], n_smem.at[own]
                weights = Weights(gates_smem.at[slot], jnp.int32(0), own_columns=False)
                own_q, own_k, own_v = q_smem.at[slot], k_smem.at[slot], v_smem.at[slot, own]

                for part, x, n in zip(parts, state, vector, strict=True):
                    own_c[part, :] = x.astype(p.dtype)
                    store_directly(own_n.at[part], n)
                plgpu.barrier_wait(full.at[slot])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                kept = load_columns(gates_smem.at[slot, rows_of.KEPT])
                staging[...] = over_columns(kept, zeros).astype(p.dtype)
                plgpu.commit_smem()

                vector = tuple(
                    decay * n + weighted_sum(own_k.at[:, part], staging)
                    for part, n in zip(parts, vector, strict=True)
                )
                s = product(own_q, transposed(own_k)) * weights.matrix(0)
                recall = weights.own_row(rows_of.RECALL)
                divisor = weights.own_row(rows_of.FLOOR)
                if p.normalized:
                    d = row_sums([s]) + recall * inner_with_columns(own_q, own_n)
                    divisor = jnp.maximum(jnp.abs(d), divisor)
                s = s.astype(p.dtype)
                for i in range(width // TILE):
                    tile = tile_of(i)
                    h = product(own_q, own_c.at[:, tile])
                    h = accumulated(h * over_rows(recall, h), s, own_v.at[:, tile])
                    h *= over_rows(1 / divisor, h)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    staging[...] = h.astype(p.dtype)
                    plgpu.commit_smem()
                    tokens = pl.ds(step * TILE, TILE)
                    target = h_gmem.at[batch, tokens, head, columns(group, i, TILE)]
                    plgpu.copy_smem_to_gmem(staging, target)

                kept = weights.own_row(rows_of.KEPT)
                for tile in range(width // TILE):
                    x = load_matrix(own_v.at[:, tile_of(tile)])
                    own_v[:, tile_of(tile)] = (x * over_rows(kept, x)).astype(p.dtype)
                plgpu.commit_smem()
                state = tuple(
                    accumulated(decay * x, transposed(own_k.at[:, part]), own_v)
                    for part, x in zip(parts, state, strict=True)
                )
                stream.release(step)
                return state, vector

            state, vector = lax.fori_loop(0, p.chunks, chunk, (state, vector))

            @pl.when(walked.is_last)
            def _():
                for part, x in zip(parts, state, strict=True):
                    store_directly(last_memory.at[walked.whole, part, columns(group)], x)

                @pl.when((v_block == 0) & (group == 0))
                def _():
                    for part, n in zip(parts, vector, strict=True):
                        store_directly(last_normalizer.at[walked.whole, part], n)

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        warpgroups(groups, compute, load)

    out = [
        jax.ShapeDtypeStruct(v.shape, v.dtype),
        jax.ShapeDtypeStruct((p.batch * p.heads, p.q_dim, p.v_dim), jnp.float32),
        jax.ShapeDtypeStruct((p.batch * p.heads, p.q_dim), jnp.float32),
    ]
    scratch = [
        matrices(slots, TILE, p.q_dim, dtype=p.dtype),
        matrices(slots, TILE, p.q_dim, dtype=p.dtype),
        matrices(slots, groups, TILE, width, dtype=p.dtype),
        vectors(slots, 8, TILE),
        matrices(groups, p.q_dim, width, dtype=p.dtype),
        vectors(groups, p.q_dim),
        matrices(groups, TILE, TILE, dtype=p.dtype),
        full_barriers(slots, 3 + groups),
        free_barriers(slots, groups),
    ]
    grid = {"v_block": p.v_dim // tiling.columns, **Walk.grid(p)}
    run = launch(body, "mlstm_fused_forward", groups, out, scratch, **grid)
    return run(q, k, v, gates, carry, memory, normalizer)
