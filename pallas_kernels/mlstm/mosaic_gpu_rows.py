"""What belongs to the rows i of a chunk in the backward pass: dq, and their part of the gates.

Notation of `gates` and of the chunkwise mLSTM: S = A * (q k^T), d = sum_j S_ij + g (q n), C and n
what the chunk finds, g their weights, floor and divisor as there.

    h = (S v + g (q C)) / divisor
    dS = dh v^T / divisor, R = dh C^T / divisor, X = S * dS, drec = g (q . R)
    dd = -(sum_j X_ij + drec) / divisor * sgn(d) where |d| > floor, else 0
    dq = (A * (dS + dd)) k + g (R + dd n)

A thread block does some chunks of a sequence one after the other, each warpgroup 64 rows of them,
with S, dS and R in registers; v, C and dh come in tiles of 64 columns of v. Per chunk and head it
reads L (2 Dk + 2 Dv) + Dk Dv numbers, writes L Dk, and multiplies L (2 L Dk + L Dv + Dk Dv) times.
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
    WIDEST_PRODUCT,
    afresh,
    inner_with_columns,
    inner_with_rows,
    load_columns,
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
from pallas_kernels.mlstm.mosaic_gpu_weights import Weights
from pallas_kernels.mlstm.tuning import fitting_slots

Array = jax.Array
Ref = jax.Ref

# What the rows tell the columns, by token: 1 / divisor, g / divisor, dd divisor.
INVERSE, READ, RATIO = TOLD = range(3)

# Up to this Dk, R has its place in registers beside S and dS.
_NARROW = 128


def _parts(p: Problem) -> list[slice]:
    """Parts of R that have their place beside dS."""
    return rounds(p, WIDEST_PRODUCT if p.chunk == TILE else _NARROW)


def slope(d: Array, floor: Array, inverse: Array) -> Array:
    """Return -sgn(d) / divisor where |d| > floor, else 0: what dd is multiplied by."""
    x = jnp.where(d > 0, -inverse, inverse)
    return jnp.where(jnp.abs(d) > floor, x, jnp.zeros_like(x))


def gradient_slots(p: Problem) -> int:
    """Slots of `gradient`; 0: shared memory has no room."""
    stage = (2 * p.chunk + _parts(p)[0].stop) * TILE
    return fitting_slots(p.config, _head_bytes(p), stage * p.dtype.itemsize)


def _head_bytes(p: Problem) -> int:
    return 2 * p.chunk * p.q_dim * p.dtype.itemsize + 4 * (8 * p.chunk + p.q_dim)


def _head_scratch(p: Problem) -> list:
    """Shared memory for a chunk's q by warpgroup, k, gates and n, and their barriers."""
    return [
        matrices(p.groups, TILE, p.q_dim, dtype=p.dtype),
        matrices(1, p.chunk, p.q_dim, dtype=p.dtype),
        vectors(8, p.chunk),
        vectors(p.q_dim),
        full_barriers(1, p.groups + 2 + vector_copies(p.q_dim)),
        free_barriers(1, p.groups),
    ]


def _load_head(p: Problem, place: Place, item: Array, sources: list[Ref], head: list[Ref]) -> None:
    q, k, gates, normalizers = sources
    q_smem, k_smem, gates_smem, n_smem, full, free = head
    Stream(1, free).acquire(item)
    barrier = full.at[0]
    load_own(lambda group: place.own_tokens(q, item, group), q_smem, barrier, p.groups)
    plgpu.copy_gmem_to_smem(place.tokens(k, item), k_smem.at[0], barrier)
    plgpu.copy_gmem_to_smem(gates.at[place.index(item)], gates_smem, barrier)
    load_vector(normalizers.at[place.index(item)], n_smem, barrier)


def gradient(p: Problem, q, k, v, gates, memories, normalizers, dh) -> tuple[Array, Array, Array]:
    """Return dq, what the rows tell the columns, and the first row of the cotangents of the gates.

    Args:
        p: the problem.
        q, k, v, gates, memories, normalizers: as in `outputs`.
        dh: [B, T, H, Dv].

    Returns:
        dq [B, T, H, Dk]; [B H N, 3, L], float32, with the rows of this module; D_ROW of `gates`,
        [B H N, L], float32.
    """
    slots = gradient_slots(p)
    parts = _parts(p)
    width = parts[0].stop
    narrow = p.q_dim <= _NARROW
    # Several parts are computed twice: before dd is known, for drec, and after.
    reads = [] if narrow else parts * (1 if len(parts) == 1 else 2)
    per_item = (1 + len(reads)) * p.v_tiles

    def body(*refs):
        (q_gmem, k_gmem, v_gmem, gates_gmem, memories_gmem, normalizers_gmem, dh_gmem), refs = (
            refs[:7],
            refs[7:],
        )
        (dq_gmem, told_gmem, d_row_gmem), scratch = refs[:3], refs[3:]
        v_smem, c_smem, dh_smem, *head, v_full, c_full, dh_full, free = scratch
        q_smem, k_smem, gates_smem, n_smem, head_full, head_free = head
        place, stream = Place(p), Stream(slots, free)

        def load() -> None:
            @pl.loop(0, place.count)
            def _(item):
                sources = [q_gmem, k_gmem, gates_gmem, normalizers_gmem]
                _load_head(p, place, item, sources, head)

                def load_steps(phase: int, with_v: bool, part: slice | None) -> None:
                    @pl.loop(0, opaque(jnp.int32(p.v_tiles)))
                    def _(tile):
                        slot = stream.acquire(item * per_item + phase * p.v_tiles + tile)
                        load_own(
                            lambda group: place.own_tokens(dh_gmem, item, group, tile),
                            dh_smem.at[slot],
                            dh_full.at[slot],
                            p.groups,
                        )
                        if with_v:
                            source = place.tokens(v_gmem, item, tile)
                            plgpu.copy_gmem_to_smem(source, v_smem.at[slot], v_full.at[slot])
                        if part is not None:
                            target = c_smem.at[slot, pl.ds(0, part.stop - part.start)]
                            source = place.memory(memories_gmem, item, part, tile)
                            plgpu.copy_gmem_to_smem(source, target, c_full.at[slot])

                load_steps(0, True, parts[0] if narrow else None)
                for phase, part in enumerate(reads, 1):
                    load_steps(phase, False, part)

            Stream(1, head_free).drain(place.count)
            stream.drain(place.count * per_item)

        def compute(group: Array) -> None:
            def steps(item: Array, group: Array, phase: int, with_v: bool, part: slice | None):
                """dh v^T, and dh C^T for some rows of C."""

                def step(tile: Array):
                    number = item * per_item + phase * p.v_tiles + tile
                    slot = stream.slot(number)
                    own_dh = dh_smem.at[slot, group]
                    plgpu.barrier_wait(dh_full.at[slot])
                    factors = []
                    if with_v:
                        plgpu.barrier_wait(v_full.at[slot])
                        factors.append((own_dh, transposed(v_smem.at[slot])))
                    if part is not None:
                        plgpu.barrier_wait(c_full.at[slot])
                        c = c_smem.at[slot, pl.ds(0, part.stop - part.start)]
                        factors.append((own_dh, transposed(c)))
                    return factors, lambda: stream.release(number)

                widths = [p.chunk] * with_v
                widths += [] if part is None else [part.stop - part.start]
                return summed_products(p.v_tiles, step, widths)

            @pl.loop(0, place.count)
            def _(item):
                plgpu.barrier_wait(head_full.at[0])
                own = opaque(group)
                weights = Weights(gates_smem, own, own_columns=False)
                s = tiles_of(product(afresh(q_smem, group), transposed(afresh(k_smem))))
                s = [weights.matrix(tile) * x for tile, x in enumerate(s)]
                recall, floor = (weights.own_row(x) for x in (rows_of.RECALL, rows_of.FLOOR))
                divisor = floor
                if p.normalized:
                    s_before = s_own = None
                    for i, x in enumerate(s):
                        s_before = plus(s_before, row_sums([where(weights.seen(i), x)]))
                        s_own = plus(s_own, row_sums([where(weights.diagonal(i), x)]))
                    recalled_sum = recall * inner_with_columns(afresh(q_smem, group), n_smem)
                    d = s_before + s_own + recalled_sum
                    divisor = jnp.maximum(jnp.abs(d), floor)
                inverse = 1 / divisor
                read = recall * inverse

                ds, *found = steps(item, own, 0, True, parts[0] if narrow else None)
                ds = [x * over_rows(inverse, x) for x in tiles_of(ds)]
                x_before = x_own = None
                for i, x in enumerate(ds):
                    x_before = plus(x_before, row_sums([where(weights.seen(i), s[i] * x)]))
                    x_own = plus(x_own, row_sums([where(weights.diagonal(i), s[i] * x)]))

                drecalled = None
                for phase, part in enumerate([parts[0]] if narrow else reads[: len(parts)], 1):
                    if not narrow:
                        found = steps(item, own, phase, False, part)
                    own_part = afresh(q_smem, group).at[
                        :, pl.ds(part.start, part.stop - part.start)
                    ]
                    term = read * inner_with_rows(own_part, found[0])
                    drecalled = plus(drecalled, term)

                d_row = x_before + drecalled
                dd = jnp.zeros_like(d_row)
                if p.normalized:
                    dd = (x_before + x_own + drecalled) * slope(d, floor, inverse)
                    d_row += dd * (s_before + recalled_sum)
                tokens = weights.own
                index = place.index(item)
                store_directly(d_row_gmem.at[index, tokens], d_row)
                told = {INVERSE: inverse, READ: read, RATIO: dd * divisor}
                for row, number in told.items():
                    store_directly(told_gmem.at[index, row, tokens], number)

                weights = Weights(gates_smem, opaque(group), own_columns=False)
                ds = [
                    (weights.matrix(tile) * (x + over_rows(dd, x))).astype(p.dtype)
                    for tile, x in enumerate(ds)
                ]
                own_q = afresh(q_smem, group)
                for i, part in enumerate(parts):
                    if len(parts) > 1:
                        found = steps(item, own, 1 + len(parts) + i, False, part)
                    for tile in range(part.start // TILE, part.stop // TILE):
                        factors = [
                            (x, afresh(k_smem).at[tile_of(i), tile_of(tile)])
                            for i, x in enumerate(ds)
                        ]
                        (dq,) = products(factors)
                        first = tile * TILE - part.start
                        dq += found[0][:, first : first + TILE] * over_rows(read, dq)
                        if p.normalized:
                            n = load_columns(n_smem.at[tile_of(tile)])
                            dq += over_columns(n, dq) * over_rows(recall * dd, dq)
                        # dq leaves through the place of q, which has been read.
                        own_q[:, tile_of(tile)] = dq.astype(p.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(own_q, place.own_tokens(dq_gmem, item, own))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(head_free.at[0])

        warpgroups(p.groups, compute, load)

    chunks = p.sequences * p.chunks
    out = [
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((chunks, len(TOLD), p.chunk), jnp.float32),
        jax.ShapeDtypeStruct((chunks, p.chunk), jnp.float32),
    ]
    scratch = [
        matrices(slots, p.chunk, TILE, dtype=p.dtype),
        matrices(slots, width, TILE, dtype=p.dtype),
        matrices(slots, p.groups, TILE, TILE, dtype=p.dtype),
        *_head_scratch(p),
        full_barriers(slots),
        full_barriers(slots),
        full_barriers(slots, p.groups),
        free_barriers(slots, p.groups),
    ]
    run = launch(body, "mlstm_rows_gradient", p.groups, out, scratch, **Place.grid(p))
    return run(q, k, v, gates, memories, normalizers, dh)
