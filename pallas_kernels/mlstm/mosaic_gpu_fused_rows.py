"""The rows i of all chunks in one walk: dq, and their part of the cotangents of the gates.

The maths is that of `mosaic_gpu_rows`, in chunks of 64, with C in registers as in
`mosaic_gpu_fused`. Here each warpgroup has 64 rows of C with all columns, and the 64 columns of k
and dq that belong to them, so that

    R = dh C^T,   dq = (A * (dS + dd)) k + g (R + dd n),   C' = c C + (a k)^T v

need nothing of the other one but sums over Dk, q . n and q . R, which they exchange before dd. C is
rounded and laid down for the tensor cores 64 columns at a time. What a chunk finds goes to memory
only where a group of chunks begins. Per token and head the walk reads 2 (Dk + Dv) numbers and
writes Dk; in each warpgroup it multiplies 64 Dk + 3 * 64 Dv + 72 * 64 times.
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
    meet,
    warpgroups,
)
from pallas_kernels.hopper.tiles import (
    MATRIX,
    accumulated,
    inner_with_columns,
    inner_with_rows,
    load_columns,
    load_matrix,
    load_rows,
    matrices,
    opaque,
    over_columns,
    over_rows,
    product,
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
from pallas_kernels.mlstm.mosaic_gpu_rows import INVERSE, RATIO, READ, TOLD, slope
from pallas_kernels.mlstm.mosaic_gpu_weights import Weights
from pallas_kernels.mlstm.tuning import fitting_slots

Array = jax.Array
Ref = jax.Ref

# What the rows tell besides, by token: the cotangent of log g, and D_ROW of `gates`.
RECALLED, ROW = range(len(TOLD), len(TOLD) + 2)

# Sums that a warpgroup keeps in shared memory: over the columns of S and of X, and of their
# diagonals alone; and over its part of Dk, for the other one too.
_S, _S_OWN, _X, _X_OWN, _Q_N, _Q_R = _SUMS = range(6)


def slots(p: Problem) -> int:
    """Slots of `gradient`; 0: shared memory has no room."""
    size, groups = p.dtype.itemsize, p.q_dim // TILE
    fixed = groups * (TILE * TILE * size + (1 + 2 * len(_SUMS)) * TILE * 4)
    return fitting_slots(p.config, fixed, 2 * (p.q_dim + p.v_dim) * TILE * size + 8 * TILE * 4)


def gradient(
    p: Problem, every: int, q, k, v, gates, carry, memory, normalizer, dh
) -> tuple[Array, ...]:
    """Return dq, what the rows tell, and C and n before every group of chunks.

    Args:
        p: the problem, with a chunk of 64 and Dk of 64 or 128.
        every: chunks of a group.
        q, k: [B, T, H, Dk].
        v, dh: [B, T, H, Dv].
        gates: [B H N, 8, 64], float32.
        carry: c, [B H N].
        memory, normalizer: C and n before the first chunk, [B H, Dk, Dv] and [B H, Dk], float32.

    Returns:
        dq [B, T, H, Dk]; [B H N, 5, 64], float32, with the rows of `TOLD` and of this module; with
        G groups of a sequence, C [B H G Dk, Dv] in q's dtype and n [B H G, Dk], float32.
    """
    groups, depth = p.q_dim // TILE, slots(p)
    marks = pl.cdiv(p.chunks, every)

    def body(*refs):
        q_gmem, k_gmem, v_gmem, gates_gmem, carry_gmem, memory_gmem, normalizer_gmem = refs[:7]
        dh_gmem, dq_gmem, told_gmem, memories_gmem, normalizers_gmem = refs[7:12]
        q_smem, k_smem, v_smem, dh_smem, gates_smem, n_smem, staged, sums, full, free, met = refs[
            12:
        ]
        walked = Walk(p)
        head, batch, sequence = walked.head, walked.batch, walked.sequence
        stream = Stream(depth, free)

        def load() -> None:
            @pl.loop(0, p.chunks)
            def _(step):
                slot = stream.acquire(step)
                barrier, tokens = full.at[slot], pl.ds(step * TILE, TILE)
                for part in range(groups):
                    for source, target in ((q_gmem, q_smem), (k_gmem, k_smem)):
                        source = source.at[batch, tokens, head, tile_of(part)]
                        plgpu.copy_gmem_to_smem(source, target.at[slot, part], barrier)
                for source, target in ((v_gmem, v_smem), (dh_gmem, dh_smem)):
                    source = source.at[batch, tokens, head]
                    plgpu.copy_gmem_to_smem(source, target.at[slot], barrier)
                source = gates_gmem.at[walked.index(step)]
                plgpu.copy_gmem_to_smem(source, gates_smem.at[slot], barrier)

            stream.drain(jnp.int32(p.chunks))

        def weights_of(slot: Array) -> Weights:
            return Weights(gates_smem.at[opaque(slot)], jnp.int32(0), own_columns=False)

        def compute(group: Array) -> None:
            own_rows = pl.ds(group * TILE, TILE)
            zeros = plgpu.layout_cast(jnp.zeros((TILE, TILE), jnp.float32), MATRIX)
            state = untyped(load_matrix(memory_gmem.at[sequence, own_rows]))
            store_directly(n_smem.at[group], load_rows(normalizer_gmem.at[sequence, own_rows]))
            plgpu.commit_smem()

            def chunk(step: Array, state: Array) -> Array:
                index = walked.index(step)
                slot, own = opaque(stream.slot(step)), opaque(group)
                odd = lax.rem(step, jnp.int32(2))
                staging, own_n = staged.at[own], n_smem.at[own]
                own_q, own_k = q_smem.at[slot, own], k_smem.at[slot, own]
                own_v, own_dh = v_smem.at[slot], dh_smem.at[slot]
                weights = weights_of(slot)
                place = lax.div(step, jnp.int32(every))
                first, mark = lax.rem(step, jnp.int32(every)) == 0, sequence * marks + place

                def keep(name: int, x: Array) -> None:
                    store_directly(sums.at[odd, own, name], x)

                plgpu.barrier_wait(full.at[slot])
                keep(_Q_N, inner_with_columns(own_q, own_n))
                (s,) = products(
                    [
                        (q_smem.at[slot, part], transposed(k_smem.at[slot, part]))
                        for part in range(groups)
                    ]
                )
                s *= weights.matrix(0)
                keep(_S, row_sums([s]))
                keep(_S_OWN, row_sums([where(weights.diagonal(0), s)]))
                ds = product(own_dh, transposed(own_v))
                s *= ds
                keep(_X, row_sums([s]))
                keep(_X_OWN, row_sums([where(weights.diagonal(0), s)]))

                r = zeros
                for i in range(p.v_tiles):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    staging[...] = state[:, i * TILE : (i + 1) * TILE].astype(p.dtype)
                    plgpu.commit_smem()

                    @pl.when(first)
                    def _(i=i):
                        rows = pl.ds(mark * p.q_dim + group * TILE, TILE)
                        plgpu.copy_smem_to_gmem(staging, memories_gmem.at[rows, tile_of(i)])

                    r = accumulated(r, own_dh.at[:, tile_of(i)], transposed(staging))

                @pl.when(first)
                def _():
                    store_directly(normalizers_gmem.at[mark, own_rows], load_rows(own_n))

                keep(_Q_R, inner_with_rows(own_q, r))
                meet(met)
                # Two numbers of 16 bits each keep R where q was, which all have read, and beside.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                store_in_two(r, own_q, staging)
                q_n, q_r = (
                    sum(load_rows(sums.at[odd, part, name]) for part in range(groups))
                    for name in (_Q_N, _Q_R)
                )
                s_sum, s_own, x_sum, x_own = (
                    load_rows(sums.at[odd, own, name]) for name in (_S, _S_OWN, _X, _X_OWN)
                )

                recall, floor = (weights.own_row(x) for x in (rows_of.RECALL, rows_of.FLOOR))
                recalled_sum = recall * q_n
                divisor = floor
                if p.normalized:
                    d = s_sum + recalled_sum
                    divisor = jnp.maximum(jnp.abs(d), floor)
                inverse = 1 / divisor
                read = recall * inverse
                recalled = read * q_r
                row = (x_sum - x_own) * inverse
                dd = jnp.zeros_like(row)
                if p.normalized:
                    dd = (x_sum * inverse + recalled) * slope(d, floor, inverse)
                    row += dd * (s_sum - s_own)
                    recalled += dd * recalled_sum

                @pl.when(group == 0)
                def _():
                    told = {INVERSE: inverse, READ: read, RATIO: dd * divisor}
                    told |= {RECALLED: recalled, ROW: row + recalled}
                    for name, numbers in told.items():
                        store_directly(told_gmem.at[index, name], numbers)

                weights = weights_of(slot)
                ds = ds * over_rows(inverse, ds) + over_rows(dd, ds)
                ds = (weights.matrix(0) * ds).astype(p.dtype)
                plgpu.commit_smem()
                r = load_matrix(own_q) + load_matrix(staging)
                dq = r * over_rows(read, r)
                if p.normalized:
                    dq += over_columns(load_columns(own_n), r) * over_rows(recall * dd, r)
                dq = accumulated(dq, ds, own_k)
                decay = carry_gmem[index]
                # dq leaves through the place of q, which all have read.
                own_q[...] = dq.astype(p.dtype)
                kept = load_columns(gates_smem.at[slot, rows_of.KEPT])
                staging[...] = over_columns(kept, zeros).astype(p.dtype)
                plgpu.commit_smem()
                tokens = pl.ds(step * TILE, TILE)
                plgpu.copy_smem_to_gmem(own_q, dq_gmem.at[batch, tokens, head, own_rows])
                added = weighted_sum(own_k, staging)
                store_directly(own_n, decay * load_rows(own_n) + added)

                x = load_matrix(own_k)
                own_k[...] = (x * over_rows(weights.own_row(rows_of.KEPT), x)).astype(p.dtype)
                plgpu.commit_smem()
                state = accumulated(decay * state, transposed(own_k), own_v)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                stream.release(step)
                return state

            lax.fori_loop(0, p.chunks, chunk, state)

        warpgroups(groups, compute, load)

    out = [
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((p.sequences * p.chunks, ROW + 1, TILE), jnp.float32),
        jax.ShapeDtypeStruct((p.sequences * marks * p.q_dim, p.v_dim), p.dtype),
        jax.ShapeDtypeStruct((p.sequences * marks, p.q_dim), jnp.float32),
    ]
    scratch = [
        matrices(depth, groups, TILE, TILE, dtype=p.dtype),
        matrices(depth, groups, TILE, TILE, dtype=p.dtype),
        matrices(depth, TILE, p.v_dim, dtype=p.dtype),
        matrices(depth, TILE, p.v_dim, dtype=p.dtype),
        vectors(depth, 8, TILE),
        vectors(groups, TILE),
        matrices(groups, TILE, TILE, dtype=p.dtype),
        vectors(2, groups, len(_SUMS), TILE),
        full_barriers(depth, 2 * groups + 3),
        free_barriers(depth, groups),
        free_barriers(1, groups),
    ]
    run = launch(body, "mlstm_fused_rows", groups, out, scratch, **Walk.grid(p))
    return run(q, k, v, gates, carry, memory, normalizer, dh)
