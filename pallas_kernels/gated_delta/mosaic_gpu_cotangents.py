"""Cotangents of the gated delta rule that sum over features of V, on Hopper GPUs.

With the notation of `mosaic_gpu_walk` and `mosaic_gpu_triangles`, and T_ij = 1 where i > j:

    R = dE H^T,   S = U dH'^T,   A = dO H^T,   dM = -(dE U^T) * T,   dP = lower part of dO U^T

    dQ = g A + (dP * L) K
    dK = r S - beta g R + (dP * L)^T Q + (G + G^T) K,   G = beta dM * L
    dL = beta dM * K K^T + dP * Q K^T
    dg = A . Q - beta R . K,   dr = S . K,   dbeta = dE . V - g R . K + sums of dM * K K^T * L
    dg_C = <H, dH'>

A . Q is the inner product of rows. Every chunk is on its own. A thread block has one, and up to 128
features of Q and K, and walks over the features of V with three warpgroups: one has R and dM, one S
and dg_C, one A and dP.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_delta.mosaic_gpu_gates import LEFT, READ, WRITE, Gates
from pallas_kernels.hopper.chip import TILE
from pallas_kernels.hopper.parts import PARTS, store_parts
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
    ROW,
    all_accumulated,
    load_matrix,
    load_rows,
    matrices,
    opaque,
    over_rows,
    product,
    row_sums,
    store_directly,
    tile_of,
    transposed,
    where,
)

Array = jax.Array
Ref = jax.Ref

_WIDEST = 128  # features of Q and K
_GROUPS = 3
_SLOTS = 2
# What comes part by part of the features of V: by token, by key and, of a chunk, by token again.
_BY_TOKEN, _BY_KEY, _BY_FEATURE = ("v", "do"), ("states", "dstates"), ("written", "derrors")
# Sums of a chunk's rows: of dg, by queries and by keys; of dbeta, by values and by keys; dr.
_READ_BY_QUERIES, _READ_BY_KEYS, _WRITE_BY_VALUES, _WRITE_BY_KEYS, _LEFT_BY_KEYS = range(5)


def cotangents(
    q: Array,
    k: Array,
    v: Array,
    do: Array,
    decay: Array,
    gates: Gates,
    states: Array,
    dstates: Array,
    written: Array,
    derrors: Array,
) -> tuple[Array, ...]:
    """Return the cotangents of Q, K, L, `gates.numbers` and `gates.carry`.

    Args:
        q, k: [B, T, H, Dk], bfloat16, T = 64 N.
        v, do: [B, T, H, Dv], bfloat16.
        decay: L, [B H N, 64, 64], float32.
        gates: of the chunks.
        states, dstates: H^T before every chunk, and its cotangent after, [B H N, 2, Dv, Dk], in two
            parts, bfloat16.
        written, derrors: U^T and dE^T, [B H N, 2, Dv, 64], likewise.
    """
    batch, time, heads, q_dim = q.shape
    chunks, steps = time // TILE, v.shape[-1] // TILE
    width = _WIDEST if q_dim % _WIDEST == 0 else TILE
    blocks = q_dim // width
    given = {"q": q, "k": k, "v": v, "do": do, "decay": decay, "numbers": gates.numbers}
    given |= {"states": states, "dstates": dstates, "written": written, "derrors": derrors}

    def float32(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch * heads * chunks, blocks, *shape), jnp.float32)

    out = {
        "dq": jax.ShapeDtypeStruct(q.shape, q.dtype),
        "dk": jax.ShapeDtypeStruct(k.shape, k.dtype),
        "decays": float32(2, TILE, TILE),
        "sums": float32(5, TILE),
        "carries": float32(width),
    }
    matrix = functools.partial(matrices, _SLOTS, dtype=q.dtype)
    streamed = {key: matrix(TILE, TILE) for key in _BY_TOKEN}
    streamed |= {key: matrix(PARTS, TILE, width) for key in _BY_KEY}
    streamed |= {key: matrix(PARTS, TILE, TILE) for key in _BY_FEATURE}
    scratch = streamed | {
        "full": full_barriers(_SLOTS, len(_BY_TOKEN) + PARTS * len(_BY_KEY + _BY_FEATURE)),
        "free": free_barriers(_SLOTS, _GROUPS),
        "features": full_barriers(1, 2),
        "shared": free_barriers(1, _GROUPS),
    }

    def body(*refs):
        source, refs = dict(zip(given, refs, strict=False)), refs[len(given) :]
        target, refs = dict(zip(out, refs, strict=False)), refs[len(out) :]
        smem = dict(zip(scratch, refs, strict=True))
        axes = ("batch", "head", "chunk", "q_block")
        row, head, chunk, block = (opaque(lax.axis_index(axis)) for axis in axes)
        index = (row * heads + head) * chunks + chunk
        tokens, columns = pl.ds(chunk * TILE, TILE), pl.ds(block * width, width)
        stream, full = Stream(_SLOTS, smem["free"]), smem["full"]
        sums = target["sums"].at[index, block]

        # The last slot is for what has to be shared: keys and queries, and then in parts.
        last = steps % _SLOTS
        own_k, own_q = (smem["states"].at[last, part] for part in range(2))
        asking, between, of_keys = (smem[key].at[last] for key in ("written", "derrors", "dstates"))

        def load() -> None:
            @pl.loop(0, steps)
            def _(step):
                slot, features = stream.acquire(step), pl.ds(step * TILE, TILE)

                def copy(part: Ref, into: Ref) -> None:
                    plgpu.copy_gmem_to_smem(part, into, full.at[slot])

                for key in _BY_TOKEN:
                    copy(source[key].at[row, tokens, head, features], smem[key].at[slot])
                for part in range(PARTS):
                    for key in _BY_KEY:
                        copy(
                            source[key].at[index, part, features, columns], smem[key].at[slot, part]
                        )
                    for key in _BY_FEATURE:
                        copy(source[key].at[index, part, features], smem[key].at[slot, part])

            stream.acquire(jnp.int32(steps))
            for key, into in {"k": own_k, "q": own_q}.items():
                part = source[key].at[row, tokens, head, columns]
                plgpu.copy_gmem_to_smem(part, into, smem["features"].at[0])
            stream.drain(jnp.int32(steps + 1))

        tiles = [tile_of(tile) for tile in range(width // TILE)]
        nothing = plgpu.layout_cast(jnp.zeros((TILE, TILE), jnp.float32), MATRIX)

        def decay_here() -> Array:
            return load_matrix(source["decay"].at[index])

        def number(name: int) -> Array:
            return load_rows(source["numbers"].at[index, name])

        def over_values(step: Callable, *totals: Array) -> tuple[Array, ...]:
            """Add to tiles [64, 64] of the keys' or queries' cotangent, and to other totals.

            `step` takes them, by each part of the features of V, to what they are then.
            """

            def of_part(index: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
                slot = stream.slot(index)
                plgpu.barrier_wait(full.at[slot])
                parts = {key: smem[key].at[slot] for key in streamed}
                totals = step(tiles, parts, list(totals))
                stream.release(index)
                return tuple(totals)

            totals = lax.fori_loop(0, steps, of_part, (*[nothing for _ in tiles], *totals))
            plgpu.barrier_wait(smem["features"].at[0])
            return totals

        def keys() -> None:
            """R and dM."""
            *recalled, lower = over_values(_recall, nothing)
            read, write = number(READ), number(WRITE)
            under = _inner(own_k, recalled)
            store_directly(sums.at[_READ_BY_KEYS], -write * under)
            for tile, x in zip(tiles, recalled, strict=True):
                store_parts(over_rows(-read * write, x) * x, of_keys.at[:, :, tile])

            row_of, column = _places()
            shares = decay_here()
            lower = where(row_of > column, -lower)
            alike = lower * product(own_k, transposed(own_k))
            store_directly(target["decays"].at[index, block, 0], over_rows(write, alike) * alike)
            store_directly(sums.at[_WRITE_BY_KEYS], row_sums([alike * shares]) - read * under)
            store_parts(over_rows(write, lower) * lower * shares, between)
            plgpu.commit_smem()
            meet(smem["shared"].at[0])

        def remembered() -> None:
            """S and the rest of dK, dg_C."""
            no_numbers = plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), ROW)
            found = over_values(_remember, no_numbers, *[no_numbers for _ in tiles])
            dk, values, passed = found[: len(tiles)], found[len(tiles)], found[len(tiles) + 1 :]
            store_directly(sums.at[_WRITE_BY_VALUES], where(block == 0, values))
            for tile, x in zip(tiles, passed, strict=True):
                store_directly(target["carries"].at[index, block, tile], x)
            store_directly(sums.at[_LEFT_BY_KEYS], _inner(own_k, dk))
            left = number(LEFT)
            dk = [over_rows(left, x) * x for x in dk]

            meet(smem["shared"].at[0])
            dk = [
                x + sum(load_matrix(of_keys.at[part, :, tile]) for part in range(PARTS))
                for tile, x in zip(tiles, dk, strict=True)
            ]
            factors = [(between.at[part], own_k) for part in range(PARTS)]
            factors += [(transposed(between.at[part]), own_k) for part in range(PARTS)]
            factors += [(transposed(asking.at[part]), own_q) for part in range(PARTS)]
            put("dk", all_accumulated(dk, [_by_tile(factors, tile) for tile in tiles]))

        def asked() -> None:
            """A and the rest of dQ, dP."""
            *dq, scores = over_values(_ask, nothing)
            store_directly(sums.at[_READ_BY_QUERIES], _inner(own_q, dq))
            read = number(READ)
            dq = [over_rows(read, x) * x for x in dq]
            row_of, column = _places()
            scores = where(row_of >= column, scores)
            by_keys = product(own_q, transposed(own_k))
            store_directly(target["decays"].at[index, block, 1], scores * by_keys)
            store_parts(scores * decay_here(), asking)
            plgpu.commit_smem()
            meet(smem["shared"].at[0])
            factors = [(asking.at[part], own_k) for part in range(PARTS)]
            put("dq", all_accumulated(dq, [_by_tile(factors, tile) for tile in tiles]))

        def put(key: str, cotangent: tuple[Array, ...]) -> None:
            """Write a cotangent's tiles where they belong."""
            for tile, x in enumerate(cotangent):
                features = pl.ds(block * width + tile * TILE, TILE)
                ref = target[key].at[row, tokens, head, features]
                store_directly(ref, x.astype(q.dtype))

        def compute(group: Array) -> None:
            for own, role in enumerate((keys, remembered, asked)):
                pl.when(group == own)(role)
            stream.release(jnp.int32(steps))

        warpgroups(_GROUPS, compute, load)

    grid = {"q_block": blocks, "chunk": chunks, "head": heads, "batch": batch}
    out_types, scratch_types = list(out.values()), list(scratch.values())
    run = launch(body, "gated_delta_cotangents", _GROUPS, out_types, scratch_types, **grid)
    dq, dk, decays, sums, carries = run(*given.values())
    sums = jnp.sum(sums, axis=1)
    dread = sums[:, _READ_BY_QUERIES] + sums[:, _READ_BY_KEYS]
    dwrite = sums[:, _WRITE_BY_VALUES] + sums[:, _WRITE_BY_KEYS]
    dnumbers = jnp.stack([dread, dwrite, sums[:, _LEFT_BY_KEYS]], axis=1)
    ddecay, dcarry = jnp.sum(decays, axis=(1, 2)), jnp.sum(carries, axis=(1, 2))
    return dq, dk, ddecay, dnumbers, dcarry


def _recall(tiles: list[Any], parts: dict[str, Ref], totals: list[Array]) -> tuple[Array, ...]:
    keys, tokens = (_pairs(parts["derrors"], parts[key]) for key in ("states", "written"))
    return all_accumulated(totals, [*(_by_tile(keys, tile) for tile in tiles), tokens])


def _remember(tiles: list[Any], parts: dict[str, Ref], totals: list[Array]) -> tuple[Array, ...]:
    remembered, (values, *passed) = totals[: len(tiles)], totals[len(tiles) :]
    values += row_sums([load_matrix(parts["v"]) * _by_row(parts["derrors"])])
    for i, tile in enumerate(tiles):
        before, after = (_by_row(parts[key].at[:, :, tile]) for key in ("states", "dstates"))
        passed[i] += row_sums([before * after])
    plgpu.commit_smem()  # What has been read here may be overwritten by a copy.
    pairs = _pairs(parts["written"], parts["dstates"])
    remembered = all_accumulated(remembered, [_by_tile(pairs, tile) for tile in tiles])
    return *remembered, values, *passed


def _ask(tiles: list[Any], parts: dict[str, Ref], totals: list[Array]) -> tuple[Array, ...]:
    keys, tokens = (
        [(parts["do"], parts[key].at[i]) for i in range(PARTS)] for key in ("states", "written")
    )
    return all_accumulated(totals, [*(_by_tile(keys, tile) for tile in tiles), tokens])


def _pairs(x: Ref, y: Ref) -> list[tuple[Ref, Ref]]:
    """Factors of x^T y, both in two parts, of which the second ones' product is left out."""
    return [(transposed(x.at[i]), y.at[j]) for i, j in ((0, 0), (1, 0), (0, 1))]


def _by_tile(factors: list[tuple[Ref, Ref]], tile: Any) -> list[tuple[Ref, Ref]]:
    """The same with 64 columns of the second factors."""
    return [(x, y.at[:, tile]) for x, y in factors]


def _inner(rows: Ref, tiles: Sequence[Array]) -> Array:
    """Inner product of each of 64 rows in shared memory with the same row of tiles [64, 64]."""
    return row_sums(load_matrix(rows.at[:, tile_of(i)]) * x for i, x in enumerate(tiles))


def _by_row(x: Ref) -> Array:
    """The transpose of what is there in two parts."""
    return load_matrix(transposed(x.at[0])) + load_matrix(transposed(x.at[1]))


def _places() -> tuple[Array, Array]:
    """Row and column of every number of a matrix [64, 64]."""
    row, column = (
        plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), axis, layout=MATRIX) for axis in range(2)
    )
    return row, column
