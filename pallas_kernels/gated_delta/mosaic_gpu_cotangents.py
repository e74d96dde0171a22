"""Cotangents of the gated delta rule that sum over features of V, on Hopper GPUs.

With the notation of `mosaic_gpu_walk` and `mosaic_gpu_triangles`, dE' = X^T dU, and T_ij = 1 where
i > j:

    R = dE' H^T,   S = U dH'^T,   A = dO H^T,   dM = -(dE' U^T) * T,   dP = lower part of dO U^T

    dQ = g A + (dP * L) K
    dK = r S - beta g R + (dP * L)^T Q + (G + G^T) K,   G = beta dM * L
    dL = beta dM * K K^T + dP * Q K^T
    dg = A . Q - beta R . K,   dr = S . K,   dbeta = dE' . V - g R . K + sums of dM * K K^T * L
    dg_C = <H, dH'>

A . Q is the inner product of rows. Every chunk is on its own. A thread block has one, and up to 128
features of Q and K, and walks over the features of V with three warpgroups: one has R and dM, one S
and dg_C, one A and dP.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_delta.mosaic_gpu_gates import LEFT, READ, WRITE, Gates
from pallas_kernels.gated_delta.mosaic_gpu_parts import PARTS, store_parts
from pallas_kernels.mlstm.mosaic_gpu_pipeline import (
    Stream,
    free_barriers,
    full_barriers,
    launch,
    meet,
    warpgroups,
)
from pallas_kernels.mlstm.mosaic_gpu_tiles import (
    MATRIX,
    ROW,
    all_accumulated,
    inner_with_rows,
    load_matrix,
    load_rows,
    matrices,
    over_rows,
    product,
    row_sums,
    store_directly,
    transposed,
    where,
)
from pallas_kernels.mlstm.tuning import TILE

Array = jax.Array
Ref = jax.Ref

_WIDEST = 128  # features of Q and K
_GROUPS = 3
_SLOTS = 2
# What comes part by part of the features of V: by token, by key and, of a chunk, by token again.
_BY_TOKEN, _BY_KEY, _BY_FEATURE = ("v", "do"), ("states", "dstates"), ("written", "derrors")
# Sums of a chunk's rows: of dg, by queries and by keys; of dbeta, by values and by keys; dr.
READ_BY_QUERIES, READ_BY_KEYS, WRITE_BY_VALUES, WRITE_BY_KEYS, LEFT_BY_KEYS = range(5)


def cotangents(
    q: Array,
    k: Array,
    v: Array,
    do: Array,
    gates: Gates,
    states: Array,
    dstates: Array,
    written: Array,
    derrors: Array,
) -> tuple[Array, Array, Gates]:
    """Return the cotangents of Q, K [B, T, H, Dk] in their dtype, and of the gates.

    Args:
        q, k: [B, T, H, Dk], bfloat16, T = 64 N.
        v, do: [B, T, H, Dv], bfloat16.
        gates: flat, [B H N, ...].
        states, dstates: H^T before every chunk, and its cotangent after, [B H N, 2, Dv, Dk], in two
            parts, bfloat16.
        written, derrors: U^T and dE'^T, [B H N, 2, Dv, 64], likewise.
    """
    batch, time, heads, q_dim = q.shape
    chunks, steps = time // TILE, v.shape[-1] // TILE
    width = _WIDEST if q_dim % _WIDEST == 0 else TILE
    blocks = q_dim // width
    given = {"q": q, "k": k, "v": v, "do": do, "decay": gates.decay, "numbers": gates.numbers}
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
        row, head, chunk, block = map(lax.axis_index, ("batch", "head", "chunk", "q_block"))
        index = (row * heads + head) * chunks + chunk
        tokens, columns = pl.ds(chunk * TILE, TILE), pl.ds(block * width, width)
        stream, full = Stream(_SLOTS, smem["free"]), smem["full"]
        ours = _Chunk(source["decay"].at[index], source["numbers"].at[index])
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

        def over_values(step: Callable, *totals: Array) -> tuple[Array, ...]:
            """Add to totals what `step` does with each part of the features of V."""

            def of_part(index: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
                slot = stream.slot(index)
                plgpu.barrier_wait(full.at[slot])
                totals = step({key: smem[key].at[slot] for key in streamed}, *totals)
                stream.release(index)
                return totals

            totals = lax.fori_loop(0, steps, of_part, totals)
            plgpu.barrier_wait(smem["features"].at[0])
            return totals

        def keys() -> None:
            """R and dM."""
            recalled, lower = over_values(_recall, _zeros(width), _zeros(TILE))
            read, write, decay = ours.number(READ), ours.number(WRITE), ours.decay()
            under = inner_with_rows(own_k, recalled)
            store_directly(sums.at[READ_BY_KEYS], -write * under)
            recalled *= over_rows(-read * write, recalled)
            store_parts(recalled, of_keys)

            column, row_of = _triangle()
            lower = where(row_of > column, -lower)
            alike = lower * product(own_k, transposed(own_k))
            store_directly(target["decays"].at[index, block, 0], over_rows(write, alike) * alike)
            store_directly(sums.at[WRITE_BY_KEYS], row_sums([alike * decay]) - read * under)
            store_parts(over_rows(write, lower) * lower * decay, between)
            plgpu.commit_smem()
            meet(smem["shared"].at[0])

        def remembered() -> None:
            """S and the rest of dK, dg_C."""
            totals = _zeros(width), _no_numbers(TILE), _no_numbers(width)
            dk, values, passed = over_values(_remember, *totals)
            store_directly(sums.at[WRITE_BY_VALUES], where(block == 0, values))
            store_directly(target["carries"].at[index, block], passed)
            store_directly(sums.at[LEFT_BY_KEYS], inner_with_rows(own_k, dk))
            dk *= over_rows(ours.number(LEFT), dk)

            meet(smem["shared"].at[0])
            dk += load_matrix(of_keys.at[0]) + load_matrix(of_keys.at[1])
            terms = [(between.at[part], own_k) for part in range(PARTS)]
            terms += [(transposed(between.at[part]), own_k) for part in range(PARTS)]
            terms += [(transposed(asking.at[part]), own_q) for part in range(PARTS)]
            (dk,) = all_accumulated([dk], [terms])
            store_directly(target["dk"].at[row, tokens, head, columns], dk.astype(k.dtype))

        def asked() -> None:
            """A and the rest of dQ, dP."""
            dq, scores = over_values(_ask, _zeros(width), _zeros(TILE))
            store_directly(sums.at[READ_BY_QUERIES], inner_with_rows(own_q, dq))
            dq *= over_rows(ours.number(READ), dq)
            column, row_of = _triangle()
            scores = where(row_of >= column, scores)
            by_keys = product(own_q, transposed(own_k))
            store_directly(target["decays"].at[index, block, 1], scores * by_keys)
            store_parts(scores * ours.decay(), asking)
            plgpu.commit_smem()
            meet(smem["shared"].at[0])
            (dq,) = all_accumulated([dq], [[(asking.at[part], own_k) for part in range(PARTS)]])
            store_directly(target["dq"].at[row, tokens, head, columns], dq.astype(q.dtype))

        def compute(group: Array) -> None:
            for number, role in enumerate((keys, remembered, asked)):
                pl.when(group == number)(role)
            stream.release(jnp.int32(steps))

        warpgroups(_GROUPS, compute, load)

    grid = {"q_block": blocks, "chunk": chunks, "head": heads, "batch": batch}
    out_types, scratch_types = list(out.values()), list(scratch.values())
    run = launch(body, "gated_delta_cotangents", _GROUPS, out_types, scratch_types, **grid)
    dq, dk, decays, sums, carries = run(*given.values())
    sums = jnp.sum(sums, axis=1)
    dnumbers = {
        READ: sums[:, READ_BY_QUERIES] + sums[:, READ_BY_KEYS],
        WRITE: sums[:, WRITE_BY_VALUES] + sums[:, WRITE_BY_KEYS],
        LEFT: sums[:, LEFT_BY_KEYS],
    }
    dnumbers = jnp.stack([dnumbers[name] for name in sorted(dnumbers)], axis=1)
    ddecay, dcarry = jnp.sum(decays, axis=(1, 2)), jnp.sum(carries, axis=(1, 2))
    return dq, dk, Gates(ddecay, dnumbers, dcarry)


class _Chunk(NamedTuple):
    """What is known of a chunk without V, in global memory."""

    decays: Ref
    numbers: Ref

    def decay(self) -> Array:
        """L."""
        return load_matrix(self.decays)

    def number(self, name: int) -> Array:
        """A number for each token."""
        return load_rows(self.numbers.at[name])


def _recall(parts: dict[str, Ref], recalled: Array, lower: Array) -> tuple[Array, Array]:
    errors = parts["derrors"]
    return all_accumulated(
        [recalled, lower], [_pairs(errors, parts["states"]), _pairs(errors, parts["written"])]
    )


def _remember(
    parts: dict[str, Ref], remembered: Array, values: Array, passed: Array
) -> tuple[Array, Array, Array]:
    values += row_sums([load_matrix(parts["v"]) * _by_row(parts["derrors"])])
    passed += row_sums([_by_row(parts["states"]) * _by_row(parts["dstates"])])
    plgpu.commit_smem()  # What has been read here may be overwritten by a copy.
    pairs = _pairs(parts["written"], parts["dstates"])
    (remembered,) = all_accumulated([remembered], [pairs])
    return remembered, values, passed


def _ask(parts: dict[str, Ref], asked: Array, scores: Array) -> tuple[Array, Array]:
    sums = [
        [(parts["do"], parts[key].at[i]) for i in range(PARTS)] for key in ("states", "written")
    ]
    return all_accumulated([asked, scores], sums)


def _pairs(x: Ref, y: Ref) -> list[tuple[Ref, Ref]]:
    """Factors of x^T y, both in two parts, of which the second ones' product is left out."""
    return [(transposed(x.at[i]), y.at[j]) for i, j in ((0, 0), (1, 0), (0, 1))]


def _by_row(x: Ref) -> Array:
    """The transpose of what is there in two parts."""
    return load_matrix(transposed(x.at[0])) + load_matrix(transposed(x.at[1]))


def _triangle() -> tuple[Array, Array]:
    """Column and row of every number of a matrix [64, 64]."""
    column, row = (
        plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), axis, layout=MATRIX) for axis in (1, 0)
    )
    return column, row


def _zeros(columns: int) -> Array:
    return plgpu.layout_cast(jnp.zeros((TILE, columns), jnp.float32), MATRIX)


def _no_numbers(rows: int) -> Array:
    return plgpu.layout_cast(jnp.zeros((rows,), jnp.float32), ROW)
