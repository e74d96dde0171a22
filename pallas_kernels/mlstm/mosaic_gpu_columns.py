"""What belongs to the columns j of a chunk: dk, dv, and their part of the cotangents of the gates.

Notation as in `rows`; here the matrices are transposed, [64 columns j, L rows i], and dC and dn are
the cotangents of what the chunk leaves, a the weights of its columns in that:

    X = S * dS,  P = A * (dS + dd)
    dv = (S / divisor) dh + a (k dC)
    w  = a (v dC^T + dn),  dk = P q + w
    to the gates: sum_i>j of X_ij + S_ij dd_i, the same for i = j, and w_j . k_j

A thread block does some chunks of a sequence one after the other, each warpgroup 64 columns j. Per
chunk and head it reads L (2 Dk + 2 Dv) + Dk Dv numbers, writes L (Dk + Dv), and multiplies
L (2 L Dk + 2 L Dv + 2 Dk Dv) times.
"""

import jax
import jax.numpy as jnp
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
    afresh,
    load_columns,
    load_matrix,
    matrices,
    opaque,
    over_columns,
    over_rows,
    plus,
    product,
    products,
    row_sums,
    store_directly,
    summed_products,
    tile_of,
    tiles_of,
    transposed,
    vectors,
    where,
)
from pallas_kernels.mlstm import gates as rows_of
from pallas_kernels.mlstm.mosaic_gpu_problem import Place, Problem, rounds
from pallas_kernels.mlstm.mosaic_gpu_rows import INVERSE, RATIO, TOLD
from pallas_kernels.mlstm.mosaic_gpu_weights import Weights
from pallas_kernels.mlstm.tuning import fitting_slots

Array = jax.Array
Ref = jax.Ref

# Columns of dk that are in registers at a time.
_WIDTH = 128

# Rows of what the columns tell the gates.
COLUMN, OWN, KEPT = range(3)


def gradient_slots(p: Problem) -> int:
    """Slots of `gradient`; 0: shared memory has no room."""
    size = p.dtype.itemsize
    head = 2 * p.chunk * p.q_dim * size + 4 * ((8 + len(TOLD)) * p.chunk + p.q_dim)
    fixed = head + p.chunk * TILE * size
    return fitting_slots(p.config, fixed, (2 * p.chunk + p.q_dim) * TILE * size)


def gradient(p: Problem, q, k, v, gates, told, dh, dmemories, dnormalizers) -> tuple[Array, ...]:
    """Return dk, dv, and D_COLUMN, D_OWN and D_KEPT of `gates`.

    Args:
        p: the problem.
        q, k: [B, T, H, Dk].
        v: [B, T, H, Dv].
        gates: [B H N, 8, L], float32.
        told: what `rows.gradient` tells, [B H N, 3, L], float32.
        dh: [B, T, H, Dv].
        dmemories: dC of every chunk, [B H N Dk, Dv].
        dnormalizers: dn of every chunk, [B H N, Dk], float32.

    Returns:
        dk [B, T, H, Dk], dv [B, T, H, Dv]; [B H N, 3, L], float32, with the rows of this module.
    """
    slots = gradient_slots(p)
    parts = rounds(p, _WIDTH)
    whole = slice(0, p.q_dim)
    per_item = (2 + len(parts)) * p.v_tiles

    def body(*refs):
        sources, refs = refs[:8], refs[8:]
        q_gmem, k_gmem, v_gmem, gates_gmem, told_gmem, dh_gmem, dc_gmem, dn_gmem = sources
        (dk_gmem, dv_gmem, d_gates_gmem), scratch = refs[:3], refs[3:]
        (
            k_smem,
            q_smem,
            v_smem,
            dh_smem,
            dc_smem,
            tiles,
            gates_smem,
            told_smem,
            dn_smem,
            *barriers,
        ) = scratch
        head_full, head_free, v_full, dh_full, dc_full, free = barriers
        place, heads, stream = Place(p), Stream(1, head_free), Stream(slots, free)

        def load() -> None:
            def load_steps(item: Array, phase: int, v: bool, dh: bool, part: slice | None) -> None:
                @pl.loop(0, opaque(jnp.int32(p.v_tiles)))
                def _(tile):
                    slot = stream.acquire(item * per_item + phase * p.v_tiles + tile)
                    if v:
                        load_own(
                            lambda group: place.own_tokens(v_gmem, item, group, tile),
                            v_smem.at[slot],
                            v_full.at[slot],
                            p.groups,
                        )
                    if dh:
                        source = place.tokens(dh_gmem, item, tile)
                        plgpu.copy_gmem_to_smem(source, dh_smem.at[slot], dh_full.at[slot])
                    if part is not None:
                        target = dc_smem.at[slot, pl.ds(0, part.stop - part.start)]
                        source = place.memory(dc_gmem, item, part, tile)
                        plgpu.copy_gmem_to_smem(source, target, dc_full.at[slot])

            @pl.loop(0, place.count)
            def _(item):
                heads.acquire(item)
                barrier = head_full.at[0]
                load_own(
                    lambda group: place.own_tokens(k_gmem, item, group), k_smem, barrier, p.groups
                )
                plgpu.copy_gmem_to_smem(place.tokens(q_gmem, item), q_smem.at[0], barrier)
                by_chunk = ((gates_gmem, gates_smem), (told_gmem, told_smem))
                load_vector(dn_gmem.at[place.index(item)], dn_smem, barrier)
                for source, target in by_chunk:
                    plgpu.copy_gmem_to_smem(source.at[place.index(item)], target, barrier)
                load_steps(item, 0, True, True, None)
                load_steps(item, 1, False, True, whole)
                for i, part in enumerate(parts):
                    load_steps(item, 2 + i, True, False, part)

            heads.drain(place.count)
            stream.drain(place.count * per_item)

        def compute(group: Array) -> None:
            @pl.loop(0, place.count)
            def _(item):

                def step_of(phase: int, tile: Array) -> tuple[Array, Array]:
                    step = item * per_item + phase * p.v_tiles + tile
                    return step, stream.slot(step)

                plgpu.barrier_wait(head_full.at[0])
                weights = Weights(gates_smem, opaque(group), own_columns=True)
                scores = tiles_of(product(afresh(k_smem, group), transposed(afresh(q_smem))))
                s = [weights.matrix(i) * x for i, x in enumerate(scores)]

                def score_gradient(tile: Array):
                    step, slot = step_of(0, tile)
                    plgpu.barrier_wait(v_full.at[slot])
                    plgpu.barrier_wait(dh_full.at[slot])
                    factors = [(afresh(v_smem.at[slot], group), transposed(dh_smem.at[slot]))]
                    return factors, lambda: stream.release(step)

                (ds,) = summed_products(p.v_tiles, score_gradient, [p.chunk])

                def row(name: int, tile: int) -> Array:
                    return over_columns(load_columns(told_smem.at[name, tile_of(tile)]), s[tile])

                after = own_sum = None
                read, p_16 = [], []
                for i, x in enumerate(tiles_of(ds)):
                    x += row(RATIO, i)
                    reads = s[i] * row(INVERSE, i)
                    read.append(reads.astype(p.dtype))
                    reads *= x
                    after = plus(after, row_sums([where(weights.seen(i), reads)]))
                    own_sum = plus(own_sum, row_sums([where(weights.diagonal(i), reads)]))
                    x *= row(INVERSE, i)
                    # One after the other: there are no registers for both.
                    x, after, own_sum = opaque((x, after, own_sum))
                    p_16.append((weights.matrix(i) * x).astype(p.dtype))
                kept = weights.own_row(rows_of.KEPT)

                def send(x: Array, target: Ref) -> None:
                    staging = afresh(tiles, group)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    staging[...] = x.astype(p.dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(staging, target)

                @pl.loop(0, opaque(jnp.int32(p.v_tiles)))
                def _(tile):
                    step, slot = step_of(1, tile)
                    plgpu.barrier_wait(dh_full.at[slot])
                    plgpu.barrier_wait(dc_full.at[slot])
                    factors = [(x, dh_smem.at[slot, tile_of(i)]) for i, x in enumerate(read)]
                    dv, left = products(factors, [(afresh(k_smem, group), dc_smem.at[slot])])
                    stream.release(step)
                    dv += left * over_rows(kept, left)
                    send(dv, Place(p).own_tokens(dv_gmem, item, opaque(group), tile))

                dkept = None
                for phase, part in enumerate(parts, 2):
                    width = part.stop - part.start

                    def written(tile: Array, phase: int = phase, width: int = width):
                        step, slot = step_of(phase, tile)
                        plgpu.barrier_wait(v_full.at[slot])
                        plgpu.barrier_wait(dc_full.at[slot])
                        dc = dc_smem.at[slot, pl.ds(0, width)]
                        factors = [(afresh(v_smem.at[slot], group), transposed(dc))]
                        return factors, lambda: stream.release(step)

                    (w,) = summed_products(p.v_tiles, written, [width])
                    for i, x in enumerate(tiles_of(w)):
                        tile = part.start // TILE + i
                        x += over_columns(load_columns(dn_smem.at[tile_of(tile)]), x)
                        x *= over_rows(kept, x)
                        term = jnp.sum(
                            x * load_matrix(afresh(k_smem, group).at[:, tile_of(tile)]), axis=1
                        )
                        dkept = plus(dkept, term)
                        factors = [
                            (y, afresh(q_smem).at[tile_of(j), tile_of(tile)])
                            for j, y in enumerate(p_16)
                        ]
                        (dk,) = products(factors)
                        send(dk + x, Place(p).own_tokens(dk_gmem, item, opaque(group), tile))

                for name, x in {COLUMN: after, OWN: own_sum, KEPT: dkept}.items():
                    store_directly(d_gates_gmem.at[Place(p).index(item), name, weights.own], x)
                plgpu.barrier_arrive(head_free.at[0])

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        warpgroups(p.groups, compute, load)

    out = [
        jax.ShapeDtypeStruct(k.shape, k.dtype),
        jax.ShapeDtypeStruct(v.shape, v.dtype),
        jax.ShapeDtypeStruct((p.sequences * p.chunks, 3, p.chunk), jnp.float32),
    ]
    scratch = [
        matrices(p.groups, TILE, p.q_dim, dtype=p.dtype),
        matrices(1, p.chunk, p.q_dim, dtype=p.dtype),
        matrices(slots, p.groups, TILE, TILE, dtype=p.dtype),
        matrices(slots, p.chunk, TILE, dtype=p.dtype),
        matrices(slots, p.q_dim, TILE, dtype=p.dtype),
        matrices(p.groups, TILE, TILE, dtype=p.dtype),
        vectors(8, p.chunk),
        vectors(len(TOLD), p.chunk),
        vectors(p.q_dim),
        full_barriers(1, p.groups + 3 + vector_copies(p.q_dim)),
        free_barriers(1, p.groups),
        full_barriers(slots, p.groups),
        full_barriers(slots),
        full_barriers(slots),
        free_barriers(slots, p.groups),
    ]
    run = launch(body, "mlstm_columns_gradient", p.groups, out, scratch, **Place.grid(p))
    return run(q, k, v, gates, told, dh, dmemories, dnormalizers)
