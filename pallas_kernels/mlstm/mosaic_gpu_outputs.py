"""The outputs h = (S v + g (q C)) / divisor, with the notation of `mosaic_gpu_rows`.

A thread block does some chunks of a sequence one after the other, in turns of 64 rows for each
warpgroup, and up to 256 columns of v. A turn begins with what the memory before the chunk says to
its rows, g (q C), and adds S v by tiles of 64 tokens, from the chunk's first to the rows' own: no
more than one tile of S is there at a time, so that a chunk can have more rows than a turn. Per
chunk of L tokens, r rows a turn, head and block of columns W:

    numbers read                                              written    multiplications
    L Dk + (L / r) Dk W + (L + r) L / 2r (Dk + W)             L W        L (Dk W + L/2 (Dk + W))
"""

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
    load_vector,
    vector_copies,
    warpgroups,
)
from pallas_kernels.hopper.tiles import (
    accumulated,
    afresh,
    inner_with_columns,
    matrices,
    opaque,
    over_rows,
    product,
    row_sums,
    tile_of,
    tiles_of,
    transposed,
    vectors,
)
from pallas_kernels.mlstm import gates as rows_of
from pallas_kernels.mlstm.mosaic_gpu_problem import Place, Problem
from pallas_kernels.mlstm.mosaic_gpu_weights import Weights
from pallas_kernels.mlstm.tuning import fitting_slots

Array = jax.Array
Ref = jax.Ref

_WIDTHS = (256, 192, 128, 64)


def tiling(p: Problem) -> tuple[int, int]:
    """Return columns of v for a thread block, and slots of its stream; 0: no room for one.

    The most columns with which one tile can be loaded beside another: the scores are computed anew
    for every block of columns.
    """
    fixed = p.groups * (p.q_dim + 2 * TILE) * TILE * p.dtype.itemsize + 4 * (8 * p.chunk + p.q_dim)
    possible = [
        (width, fitting_slots(p.config, fixed, (p.q_dim + width) * TILE * p.dtype.itemsize))
        for width in _WIDTHS
        if p.v_dim % width == 0
    ]
    enough = min(2, p.config.slots)
    return next((found for found in possible if found[1] >= enough), max(possible, key=_slots))


def _slots(found: tuple[int, int]) -> int:
    return found[1]


def outputs(p: Problem, q, k, v, gates, memories, normalizers) -> Array:
    """Return h [B, T, H, Dv].

    Args:
        p: the problem.
        q, k: [B, T, H, Dk].
        v: [B, T, H, Dv].
        gates: [B H N, 8, L], float32.
        memories: C of every chunk, [B H N Dk, Dv].
        normalizers: n of every chunk, [B H N, Dk], float32.
    """
    width, slots = tiling(p)
    parts, blocks = p.q_dim // TILE, p.chunk // TILE // p.groups

    def body(q_gmem, k_gmem, v_gmem, gates_gmem, memories_gmem, normalizers_gmem, h_gmem, *scratch):
        x_smem, k_smem, staged, q_smem, gates_smem, n_smem, *barriers = scratch
        head_full, head_free, x_full, k_full, free = barriers
        place, head, stream = Place(p), Stream(1, head_free), Stream(slots, free)
        column = opaque(lax.axis_index("v_block"))
        turns = place.count * blocks

        def parted(turn: Array) -> tuple[Array, Array, Array]:
            """A turn's chunk, its block of rows there, and the first of its steps."""
            item, block = lax.div(turn, jnp.int32(blocks)), lax.rem(turn, jnp.int32(blocks))
            before = block * parts + p.groups * lax.div(block * (block + 1), jnp.int32(2))
            per_item = blocks * parts + p.groups * blocks * (blocks + 1) // 2
            return item, block, item * per_item + before

        def load() -> None:
            @pl.loop(0, turns)
            def _(turn):
                item, block, first = parted(turn)
                head.acquire(turn)
                barrier, index = head_full.at[0], place.index(item)
                load_own(
                    lambda group: place.own_tokens(q_gmem, item, block * p.groups + group),
                    q_smem,
                    barrier,
                    p.groups,
                )
                plgpu.copy_gmem_to_smem(gates_gmem.at[index], gates_smem, barrier)
                load_vector(normalizers_gmem.at[index], n_smem, barrier)
                for part in range(parts):
                    slot = stream.acquire(first + part)
                    rows = slice(part * TILE, (part + 1) * TILE)
                    source = place.memory(memories_gmem, item, rows, column, width)
                    plgpu.copy_gmem_to_smem(source, x_smem.at[slot], x_full.at[slot])

                @pl.loop(0, (block + 1) * p.groups)
                def _(tile):
                    slot = stream.acquire(first + parts + tile)
                    source = place.own_tokens(k_gmem, item, tile)
                    plgpu.copy_gmem_to_smem(source, k_smem.at[slot], k_full.at[slot])
                    source = place.own_tokens(v_gmem, item, tile, column, width)
                    plgpu.copy_gmem_to_smem(source, x_smem.at[slot], x_full.at[slot])

            head.drain(turns)
            stream.drain(parted(turns)[2])

        def compute(group: Array) -> None:
            @pl.loop(0, turns)
            def _(turn):
                item, block, first = parted(turn)
                own = opaque(group)
                position = block * p.groups + own
                plgpu.barrier_wait(head_full.at[0])
                weights = Weights(gates_smem, position, own_columns=False)
                recall = weights.own_row(rows_of.RECALL)

                h = None
                for part in range(parts):
                    slot = stream.slot(first + part)
                    plgpu.barrier_wait(x_full.at[slot])
                    factors = afresh(q_smem, group).at[:, tile_of(part)], x_smem.at[slot]
                    h = product(*factors) if h is None else accumulated(h, *factors)
                    stream.release(first + part)
                h *= over_rows(recall, h)
                carried = [h]
                if p.normalized:
                    carried.append(recall * inner_with_columns(afresh(q_smem, group), n_smem))

                def wait(tile: Array) -> tuple[Array, Array]:
                    step = first + parts + tile
                    slot = stream.slot(step)
                    plgpu.barrier_wait(k_full.at[slot])
                    plgpu.barrier_wait(x_full.at[slot])
                    return step, slot

                def add(tile: Array, carried: list[Array]) -> list[Array]:
                    h, *d = carried
                    step, slot = wait(tile)
                    s = product(afresh(q_smem, group), transposed(k_smem.at[slot]))
                    s *= weights.matrix(tile)
                    d = [x + row_sums([s]) for x in d]
                    h = accumulated(h, s.astype(p.dtype), x_smem.at[slot])
                    stream.release(step)
                    return [h, *d]

                h, *d = lax.fori_loop(0, position + 1, add, carried)

                @pl.loop(position + 1, (block + 1) * p.groups)
                def _(tile):
                    step, _ = wait(tile)
                    stream.release(step)

                divisor = weights.own_row(rows_of.FLOOR)
                if p.normalized:
                    divisor = jnp.maximum(jnp.abs(d[0]), divisor)
                h *= over_rows(1 / divisor, h)
                staging, tiles = _Staging(staged.at[own]), width // TILE
                for i, x in enumerate(tiles_of(h)):
                    target = place.own_tokens(h_gmem, item, position, column * tiles + i)
                    staging.store(x, target, turn * tiles + i)
                plgpu.barrier_arrive(head_free.at[0])

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        warpgroups(p.groups, compute, load)

    scratch = [
        matrices(slots, TILE, width, dtype=p.dtype),
        matrices(slots, TILE, p.q_dim, dtype=p.dtype),
        matrices(p.groups, 2, TILE, TILE, dtype=p.dtype),
        matrices(p.groups, TILE, p.q_dim, dtype=p.dtype),
        vectors(8, p.chunk),
        vectors(p.q_dim),
        full_barriers(1, p.groups + 1 + vector_copies(p.q_dim)),
        free_barriers(1, p.groups),
        full_barriers(slots),
        full_barriers(slots),
        free_barriers(slots, p.groups),
    ]
    out = jax.ShapeDtypeStruct(v.shape, v.dtype)
    grid = {"v_block": p.v_dim // width, **Place.grid(p)}
    run = launch(body, "mlstm_outputs", p.groups, out, scratch, **grid)
    return run(q, k, v, gates, memories, normalizers)


class _Staging:
    """Two tiles [64, 64] of shared memory of a warpgroup, through which results leave."""

    def __init__(self, tiles: Ref):
        self.tiles = tiles

    def store(self, x: Array, target: Ref, turn: Array) -> None:
        """Start storing a tile; `turn` counts them."""
        tile = self.tiles.at[lax.rem(turn, jnp.int32(2))]
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        tile[...] = x.astype(tile.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, target)
