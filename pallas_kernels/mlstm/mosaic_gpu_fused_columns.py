"""The columns j of all chunks in one walk back: dk, dv, and their part of the gates' cotangents.

The maths is that of `mosaic_gpu_columns`, in chunks of 64, with the cotangents of the states in
registers. Each warpgroup has all rows of dC and some columns, and those columns of dv; of dk it has
the 64 columns of its number. In

    X = S * dS,   P = A * (dS + dd)
    dv = (S / divisor) dh + a (k dC),   w = a (v dC^T + dn),   dk = P q + w
    dC = c dC' + q^T (g / divisor dh),   dn = c dn' + q^T (g dd)

two warpgroups share the work on S and P, half of the rows i each, and hand over what the other one
needs: those halves, rounded; and of w, a sum over the columns of v, its own terms as two numbers of
16 bits each, a rounded one and the rest. dC is rounded and laid down for the tensor cores a tile at
a time. C, as the walk forward wrote it down where a group of chunks begins, gives its inner product
with dC there. Per token and head the walk reads 2 (Dk + Dv) numbers and writes Dk + Dv; all
warpgroups together multiply 128 Dk + 128 Dv + 3 Dk Dv times, and 8 Dk for dn in each.
"""

from typing import Any

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
    meet,
    warpgroups,
)
from pallas_kernels.hopper.tiles import (
    MATRIX,
    accumulated,
    load_columns,
    load_matrix,
    load_rows,
    matrices,
    opaque,
    over_columns,
    over_rows,
    products,
    row_sums,
    store_directly,
    store_in_two,
    tile_of,
    transposed,
    untyped,
    vectors,
    weighted_sum,
    where,
)
from pallas_kernels.mlstm import gates as rows_of
from pallas_kernels.mlstm.mosaic_gpu_problem import Problem, Walk
from pallas_kernels.mlstm.mosaic_gpu_rows import INVERSE, RATIO, READ
from pallas_kernels.mlstm.mosaic_gpu_weights import Weights
from pallas_kernels.mlstm.tuning import fitting_slots

Array = jax.Array
Ref = jax.Ref

# Rows of what the columns tell the gates, each a sum over the warpgroups.
COLUMN, OWN, KEPT = range(3)

_TOLD = 3  # Rows of what the rows tell that are read here.


def slots(p: Problem) -> int:
    """Slots of `gradient`; 0: shared memory has no room."""
    size, groups = p.dtype.itemsize, p.q_dim // TILE
    fixed = groups * (TILE * TILE * size + 2 * p.q_dim * 4) + TILE * TILE * size
    slot = 2 * (p.q_dim + p.v_dim) * TILE * size + (8 + _TOLD) * TILE * 4
    return fitting_slots(p.config, fixed, slot)


def gradient(
    p: Problem, every: int, q, k, v, gates, carry, memories, told, dh, dmemory, dnormalizer
) -> tuple[Array, ...]:
    """Return dk, dv, what the columns tell, and the cotangents of the states.

    Args:
        p: the problem, with a chunk of 64 and Dk of 64 or 128.
        every: chunks of a group.
        q, k: [B, T, H, Dk].
        v, dh: [B, T, H, Dv].
        gates: [B H N, 8, 64], float32.
        carry: c, [B H N].
        memories: C before every group, [B H G Dk, Dv].
        told: what the rows tell, [B H N, 5, 64], float32.
        dmemory, dnormalizer: cotangents of the last C [B H, Dk, Dv] and n [B H, Dk], float32, or
            of those of every piece.

    Returns:
        dk [B, T, H, Dk], dv [B, T, H, Dv]; [B H N, 3, Dk / 64, 64], float32, with the rows of this
        module, by warpgroup; dC and dn before the first chunk; and for the first chunk of every
        group, with the cotangents of what it leaves, partial sums of the inner product of dC with
        its C, [B H G, Dk / 64, 64], and dn [B H G, Dk].
    """
    groups, depth = p.q_dim // TILE, slots(p)
    width = p.v_dim // groups
    tiles, half = width // TILE, TILE // groups
    parts = range(groups)
    marks = pl.cdiv(p.chunks, every)

    def body(*refs):
        q_gmem, k_gmem, v_gmem, gates_gmem, carry_gmem, memories_gmem, told_gmem = refs[:7]
        dh_gmem, dmemory_gmem, dnormalizer_gmem = refs[7:10]
        dk_gmem, dv_gmem, d_gates_gmem, first_memory, first_normalizer = refs[10:15]
        inner_gmem, dn_gmem = refs[15:17]
        q_smem, k_smem, v_smem, dh_smem, gates_smem, told_smem, n_smem, staged, one_smem = refs[
            17:26
        ]
        halves, full, free, met = refs[26:]
        read_by_all, has_read, handed_over, has_seen = (met.at[i] for i in range(4))
        walked = Walk(p)
        head, batch, sequence = walked.head, walked.batch, walked.sequence
        stream = Stream(depth, free)

        def both_halves() -> Array:
            return jnp.concatenate(
                [plgpu.load(halves.at[part], layout=MATRIX, optimized=False) for part in parts],
                axis=1,
            )

        def columns(group: Array | int, tile: int = 0, size: int = width) -> Any:
            return pl.ds(group * width + tile * TILE, size)

        def load() -> None:
            @pl.loop(0, p.chunks)
            def _(step):
                slot = stream.acquire(step)
                chunk = p.chunks - 1 - step
                barrier, tokens = full.at[slot], pl.ds(chunk * TILE, TILE)
                for part in parts:
                    for source, target in ((q_gmem, q_smem), (k_gmem, k_smem)):
                        source = source.at[batch, tokens, head, tile_of(part)]
                        plgpu.copy_gmem_to_smem(source, target.at[slot, part], barrier)
                    for source, target in ((v_gmem, v_smem), (dh_gmem, dh_smem)):
                        source = source.at[batch, tokens, head, columns(part)]
                        plgpu.copy_gmem_to_smem(source, target.at[slot, part], barrier)
                index = walked.index(chunk)
                plgpu.copy_gmem_to_smem(gates_gmem.at[index], gates_smem.at[slot], barrier)
                source = told_gmem.at[index, pl.ds(0, _TOLD)]
                plgpu.copy_gmem_to_smem(source, told_smem.at[slot], barrier)

            stream.drain(jnp.int32(p.chunks))

        def compute(group: Array) -> None:
            zeros = plgpu.layout_cast(jnp.zeros((TILE, TILE), jnp.float32), MATRIX)
            state = tuple(
                untyped(load_matrix(dmemory_gmem.at[sequence, tile_of(part), columns(group)]))
                for part in parts
            )
            for part in parts:
                n = load_rows(dnormalizer_gmem.at[sequence, tile_of(part)])
                store_directly(n_smem.at[0, group, part], n)
            plgpu.commit_smem()

            one_smem[group] = jnp.float32(1)
            plgpu.barrier_arrive(has_seen)  # There is nothing to see yet.

            def of_chunk(turn: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
                step = opaque(turn)
                odd = lax.rem(step, jnp.int32(2))
                chunk = p.chunks - 1 - step
                index = walked.index(chunk)
                decay = carry_gmem[index]

                def here() -> tuple[Array, Array, list[Ref]]:
                    """The slot, the warpgroup and what is its own: anew, to free registers."""
                    slot, own = opaque(stream.slot(step)), opaque(group)
                    refs = [x.at[slot, own] for x in (k_smem, v_smem, dh_smem)]
                    return slot, own, [*refs, n_smem.at[odd, own], staged.at[own]]

                slot, own, (*_, own_n, _) = here()
                weights = Weights(gates_smem.at[slot], jnp.int32(0), own_columns=True, width=half)

                def tile_of_state(part: int, i: int) -> Array:
                    return state[part][:, i * TILE : (i + 1) * TILE]

                @pl.when(lax.rem(chunk, jnp.int32(every)) == 0)
                def _():
                    mark = sequence * marks + lax.div(chunk, jnp.int32(every))
                    terms = zeros
                    for part in parts:
                        rows = pl.ds(mark * p.q_dim + part * TILE, TILE)
                        for i in range(tiles):
                            c = load_matrix(memories_gmem.at[rows, columns(own, i, TILE)])
                            terms += tile_of_state(part, i) * c
                    store_directly(inner_gmem.at[mark, own], jnp.sum(terms, axis=1))

                    @pl.when(own == 0)
                    def _():
                        for part in parts:
                            n = load_rows(own_n.at[part])
                            store_directly(dn_gmem.at[mark, tile_of(part)], n)

                plgpu.barrier_wait(full.at[slot])

                def row(name: int, tile: Array | int, width: int) -> Array:
                    numbers = load_columns(told_smem.at[slot, name, pl.ds(tile * width, width)])
                    return over_columns(numbers, jnp.zeros((TILE, width), jnp.float32))

                def tell(name: int, x: Array) -> None:
                    place = opaque(index), opaque(jnp.int32(name)), own
                    store_directly(d_gates_gmem.at[place], x)

                own_half = pl.ds(own * half, half)
                (s,) = products(
                    [
                        (k_smem.at[slot, part], transposed(q_smem.at[slot, part, own_half]))
                        for part in parts
                    ]
                )
                (x,) = products(
                    [
                        (v_smem.at[slot, part], transposed(dh_smem.at[slot, part, own_half]))
                        for part in parts
                    ]
                )
                a = weights.matrix(own) * row(INVERSE, own, half)

                plgpu.barrier_wait(has_seen)
                halves[own] = (a * s).astype(p.dtype)
                a *= x + row(RATIO, own, half)
                seen = a.astype(p.dtype)
                a *= s
                own_sum = row_sums([where(weights.diagonal(own), a)])
                tell(OWN, own_sum)
                tell(COLUMN, row_sums([a]) - own_sum)
                plgpu.commit_smem()
                meet(read_by_all)
                read = both_halves()
                meet(has_read)
                halves[own] = seen
                kept = weights.own_row(rows_of.KEPT)
                slot, own, (_, own_v, own_dh, own_n, staging) = here()
                next_n = n_smem.at[1 - odd, own]
                tokens = pl.ds(chunk * TILE, TILE)

                def lay_down(x: Array) -> Ref:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    staging[...] = x.astype(p.dtype)
                    plgpu.commit_smem()
                    return staging

                for i in range(tiles):
                    dv = zeros
                    for part in parts:
                        dc = lay_down(tile_of_state(part, i))
                        dv = accumulated(dv, k_smem.at[slot, part], dc)
                    dv = accumulated(dv * over_rows(kept, dv), read, own_dh.at[:, tile_of(i)])
                    target = dv_gmem.at[batch, tokens, head, columns(own, i, TILE)]
                    plgpu.copy_smem_to_gmem(lay_down(dv), target)

                weights_of_n = lay_down(row(READ, 0, TILE) * row(RATIO, 0, TILE))
                for part in parts:
                    added = weighted_sum(q_smem.at[slot, part], weights_of_n)
                    store_directly(next_n.at[part], decay * load_rows(own_n.at[part]) + added)

                # The compiler, which does not know the factor, rounds anew what it would else keep.
                one = one_smem[own]
                written = []
                for part in parts:
                    w = zeros
                    for i in range(tiles):
                        dc = lay_down(tile_of_state(part, i) * one)
                        w = accumulated(w, own_v.at[:, tile_of(i)], transposed(dc))
                    written.append(w)

                w = written[0]
                if groups == 2:
                    theirs = jnp.where(own == 0, written[1], written[0])
                    w = jnp.where(own == 0, written[0], written[1])
                    store_in_two(theirs, own_v.at[:, tile_of(0)], staging)
                plgpu.commit_smem()
                meet(handed_over)
                slot, own, (own_k, _, own_dh, own_n, _) = here()
                seen = both_halves()
                plgpu.barrier_arrive(has_seen)
                if groups == 2:
                    other = 1 - own
                    w += load_matrix(v_smem.at[slot, other].at[:, tile_of(0)])
                    w += load_matrix(staged.at[other])
                w += over_columns(load_columns(own_n.at[own]), w)
                w *= over_rows(kept, w)
                tell(KEPT, row_sums([w * load_matrix(own_k)]))
                dk = accumulated(w, seen, q_smem.at[slot, own])
                # dk leaves through the place of k, which all have read.
                own_k[...] = dk.astype(p.dtype)
                recall = load_rows(told_smem.at[slot, READ])
                for i in range(tiles):
                    x = load_matrix(own_dh.at[:, tile_of(i)])
                    own_dh[:, tile_of(i)] = (x * over_rows(recall, x)).astype(p.dtype)
                plgpu.commit_smem()
                target = dk_gmem.at[batch, tokens, head, pl.ds(own * TILE, TILE)]
                plgpu.copy_smem_to_gmem(own_k, target)
                state = tuple(
                    accumulated(decay * x, transposed(q_smem.at[slot, part]), own_dh)
                    for part, x in zip(parts, state, strict=True)
                )
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                stream.release(step)
                return state

            state = lax.fori_loop(0, p.chunks, of_chunk, state)
            plgpu.barrier_wait(has_seen)

            @pl.when(walked.is_first)
            def _():
                for part, x in zip(parts, state, strict=True):
                    store_directly(first_memory.at[walked.whole, tile_of(part), columns(group)], x)

                @pl.when(group == 0)
                def _():
                    for part in parts:
                        n = load_rows(n_smem.at[p.chunks % 2, group, part])
                        store_directly(first_normalizer.at[walked.whole, tile_of(part)], n)

        warpgroups(groups, compute, load)

    def numbers(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    out = [
        jax.ShapeDtypeStruct(k.shape, k.dtype),
        jax.ShapeDtypeStruct(v.shape, v.dtype),
        numbers(p.sequences * p.chunks, 3, groups, TILE),
        numbers(p.batch * p.heads, p.q_dim, p.v_dim),
        numbers(p.batch * p.heads, p.q_dim),
        numbers(p.sequences * marks, groups, TILE),
        numbers(p.sequences * marks, p.q_dim),
    ]
    scratch = [
        matrices(depth, groups, TILE, TILE, dtype=p.dtype),
        matrices(depth, groups, TILE, TILE, dtype=p.dtype),
        matrices(depth, groups, TILE, width, dtype=p.dtype),
        matrices(depth, groups, TILE, width, dtype=p.dtype),
        vectors(depth, 8, TILE),
        vectors(depth, _TOLD, TILE),
        vectors(2, groups, groups, TILE),
        matrices(groups, TILE, TILE, dtype=p.dtype),
        vectors(groups),
        matrices(groups, TILE, half, dtype=p.dtype),
        full_barriers(depth, 4 * groups + 2),
        free_barriers(depth, groups),
        free_barriers(4, groups),
    ]
    run = launch(body, "mlstm_fused_columns", groups, out, scratch, **Walk.grid(p))
    return run(q, k, v, gates, carry, memories, told, dh, dmemory, dnormalizer)
