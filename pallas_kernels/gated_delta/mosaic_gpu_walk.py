"""The walks over the chunks of the gated delta rule on Hopper GPUs, and back.

Notation of a chunk of C = 64 tokens: the state H [Dk, Dv] before it, the inverse X and the scores P
of `mosaic_gpu_triangles`, and for each token what it reads with (g), writes with (beta) and what is
left of it after the chunk (r); g_C is the last g.

    E = beta (V - g K H),   U = X E,   O = g Q H + P U,   H' = g_C H + K^T (r U)

And back, d before what a cotangent is of:

    dU = P^T dO + r K dH',   dE = X^T dU,   dV = beta dE
    dH = g_C dH' + Q^T (g dO) - K^T (g beta dE)

A warpgroup owns 64 features of V: the columns of H, which do not depend on each other, are rows of
registers, so that everything here is the transpose of the above. What comes out of one product goes
into the next as its first factor without leaving the registers, in two numbers of 16 bits; K, Q, V
and dO have no more than that, X and P come in two. The products of what is left of two such
roundings are left out: 2^-16 of the whole.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_delta.mosaic_gpu_gates import LEFT, READ, WRITE, Gates
from pallas_kernels.gated_delta.mosaic_gpu_triangles import Triangles
from pallas_kernels.hopper.chip import SHARED_MEMORY, TILE
from pallas_kernels.hopper.parts import PARTS, product_of_parts, split
from pallas_kernels.hopper.pipeline import (
    Stream,
    free_barriers,
    full_barriers,
    launch,
    warpgroups,
)
from pallas_kernels.hopper.tiles import (
    all_accumulated,
    load_columns,
    load_matrix,
    matrices,
    over_columns,
    products,
    store_directly,
    tile_of,
    transposed,
    untyped,
    vectors,
)

Array = jax.Array
Ref = jax.Ref

CHUNK = TILE
_MOST_SLOTS = 3


class Walk(NamedTuple):
    """What is walked over; all static.

    Attributes:
        batch, chunks, heads, q_dim, v_dim: B, N, H, Dk, Dv; the last two multiples of 64.
        groups: warpgroups of a thread block, each with 64 features of V.
    """

    batch: int
    chunks: int
    heads: int
    q_dim: int
    v_dim: int
    groups: int

    @property
    def slots(self) -> int:
        """Chunks that shared memory holds at a time; 0: there is no room for one."""
        tile = TILE * TILE * 2
        slot = (2 * self.q_dim // TILE + 2 * PARTS + self.groups) * tile + 3 * TILE * 4
        return min(_MOST_SLOTS, (SHARED_MEMORY - self.groups * tile) // slot)


class _Chunk(NamedTuple):
    """A chunk in shared memory: V (or dO) of a warpgroup, and what all of them read."""

    q: Ref
    k: Ref
    own: Ref
    inverse: Ref
    scores: Ref
    numbers: Ref

    def weighted(self, name: int, x: Array) -> Array:
        """A matrix of features and tokens times one number for each token."""
        return over_columns(load_columns(self.numbers.at[name]), x) * x


def forward(
    w: Walk, q, k, v, triangles: Triangles, gates: Gates, state, *, keep: bool
) -> dict[str, Array]:
    """Walk from the first chunk to the last.

    Args:
        w: the walk.
        q, k: [B, T, H, Dk], bfloat16, T = 64 N.
        v: [B, T, H, Dv], bfloat16.
        triangles, gates: of the chunks.
        state: H^T before the first chunk, [B H, Dv, Dk], float32.
        keep: whether to write H^T and U^T of every chunk down, in two parts.

    Returns:
        "tokens", O [B, T, H, Dv] in bfloat16, and "state", H^T after the last chunk; with `keep`
        "states" [B H N, 2, Dv, Dk] and "written" [B H N, 2, Dv, 64], bfloat16.
    """

    def step(chunk: _Chunk, whole: Array, state: tuple[Array, ...], put: _Put):
        if keep:
            put.states(state)
        by_keys, by_queries = _recalled(state, chunk.k, chunk.q)
        errors = load_matrix(transposed(chunk.own)) - chunk.weighted(READ, by_keys)
        written = product_of_parts(chunk.weighted(WRITE, errors), chunk.inverse, transpose=True)
        outputs = chunk.weighted(READ, by_queries)
        put.tokens(outputs + product_of_parts(written, chunk.scores, transpose=True))
        if keep:
            put.written(written)
        return _advanced(whole, state, (chunk.weighted(LEFT, written), chunk.k))

    return _launch(
        w,
        "gated_delta_walk_forward",
        step,
        q,
        k,
        v,
        triangles,
        gates,
        state,
        keep=keep,
        last_first=False,
    )


def backward(w: Walk, q, k, do, triangles: Triangles, gates: Gates, dstate) -> dict[str, Array]:
    """Walk from the last chunk to the first.

    Args:
        w, q, k, triangles, gates: as in `forward`.
        do: dO [B, T, H, Dv], bfloat16.
        dstate: cotangent of H^T after the last chunk, [B H, Dv, Dk], float32.

    Returns:
        "tokens", dV [B, T, H, Dv] in bfloat16, "state", the cotangent of H^T before the first
        chunk, float32, "states", those of H^T after every chunk [B H N, 2, Dv, Dk], and "written",
        dE^T [B H N, 2, Dv, 64], in two parts, bfloat16.
    """

    def step(chunk: _Chunk, whole: Array, state: tuple[Array, ...], put: _Put):
        put.states(state)
        (by_keys,) = _recalled(state, chunk.k)
        cotangent = load_matrix(transposed(chunk.own))
        rounded = cotangent.astype(jnp.bfloat16)
        (written,) = products([(rounded, chunk.scores.at[part]) for part in range(PARTS)])
        errors = product_of_parts(written + chunk.weighted(LEFT, by_keys), chunk.inverse)
        put.written(errors)
        errors = chunk.weighted(WRITE, errors)
        put.tokens(errors)
        asked, errors = chunk.weighted(READ, cotangent), -chunk.weighted(READ, errors)
        return _advanced(whole, state, (asked, chunk.q), (errors, chunk.k))

    return _launch(
        w,
        "gated_delta_walk_backward",
        step,
        q,
        k,
        do,
        triangles,
        gates,
        dstate,
        keep=True,
        last_first=True,
    )


def _recalled(state: tuple[Array, ...], *keys: Ref) -> tuple[Array, ...]:
    """What the state has under keys [64, Dk], by feature and token."""
    totals = ()
    for tile, x in enumerate(state):
        parts = split(x)
        sums = [[(part, transposed(of.at[:, tile_of(tile)])) for part in parts] for of in keys]
        totals = all_accumulated(totals, sums) if totals else products(*sums)
    return totals


def _advanced(
    whole: Array, state: tuple[Array, ...], *added: tuple[Array, Ref]
) -> tuple[Array, ...]:
    """The state times a number, plus products of [64, 64] and [64, Dk]."""
    state = tuple(whole * x for x in state)
    for x, keys in added:
        parts = split(x)
        sums = [[(part, keys.at[:, tile_of(tile)]) for part in parts] for tile in range(len(state))]
        state = all_accumulated(state, sums)
    return state


class _Put(NamedTuple):
    """Where a step's results go, by feature and token, or feature and key."""

    tokens: Callable[[Array], None]
    states: Callable[[tuple[Array, ...]], None]
    written: Callable[[Array], None]


def _launch(
    w: Walk,
    name: str,
    step: Callable,
    q,
    k,
    x,
    triangles: Triangles,
    gates: Gates,
    state,
    *,
    keep: bool,
    last_first: bool,
) -> dict[str, Array]:
    """Run the walk: `step` takes each chunk's state to the next one's."""
    groups, slots, time = w.groups, w.slots, w.chunks * CHUNK
    parts = [tile_of(part) for part in range(w.q_dim // TILE)]

    def float32(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    by_chunk = w.batch * w.heads * w.chunks
    out = {
        "tokens": jax.ShapeDtypeStruct((w.batch, time, w.heads, w.v_dim), x.dtype),
        "state": float32(w.batch * w.heads, w.v_dim, w.q_dim),
    }
    if keep:
        for key, size in {"states": w.q_dim, "written": CHUNK}.items():
            out[key] = jax.ShapeDtypeStruct((by_chunk, PARTS, w.v_dim, size), q.dtype)
    scratch = {
        "q": matrices(slots, TILE, w.q_dim, dtype=q.dtype),
        "k": matrices(slots, TILE, w.q_dim, dtype=q.dtype),
        "own": matrices(slots, groups, TILE, TILE, dtype=q.dtype),
        "inverse": matrices(slots, PARTS, TILE, TILE, dtype=q.dtype),
        "scores": matrices(slots, PARTS, TILE, TILE, dtype=q.dtype),
        "numbers": vectors(slots, 3, TILE),
        "staged": matrices(groups, TILE, TILE, dtype=q.dtype),
        "full": full_barriers(slots, 5 + groups),
        "free": free_barriers(slots, groups),
    }
    given = {"q": q, "k": k, "own": x}
    given |= {"inverse": triangles.inverse, "scores": triangles.scores}
    given |= {"numbers": gates.numbers, "carry": gates.carry, "state": state}

    def body(*refs):
        source, refs = dict(zip(given, refs, strict=False)), refs[len(given) :]
        target, refs = dict(zip(out, refs, strict=False)), refs[len(out) :]
        smem = dict(zip(scratch, refs, strict=True))
        batch, head, v_block = (lax.axis_index(axis) for axis in ("batch", "head", "v_block"))
        sequence, stream, full = batch * w.heads + head, Stream(slots, smem["free"]), smem["full"]

        def place(step: Array) -> tuple[Array, Any]:
            """Where a step's chunk is among all of them, and its tokens."""
            chunk = w.chunks - 1 - step if last_first else step
            return sequence * w.chunks + chunk, pl.ds(chunk * CHUNK, CHUNK)

        def features(group: Array | int) -> Any:
            return pl.ds((v_block * groups + group) * TILE, TILE)

        def load() -> None:
            @pl.loop(0, w.chunks)
            def _(step):
                slot = stream.acquire(step)
                barrier, (index, tokens) = full.at[slot], place(step)

                def copy(part: Ref, into: Ref) -> None:
                    plgpu.copy_gmem_to_smem(part, into, barrier)

                for key in ("q", "k"):
                    copy(source[key].at[batch, tokens, head], smem[key].at[slot])
                for key in ("inverse", "scores", "numbers"):
                    copy(source[key].at[index], smem[key].at[slot])
                for group in range(groups):
                    part = source["own"].at[batch, tokens, head, features(group)]
                    copy(part, smem["own"].at[slot, group])

            stream.drain(jnp.int32(w.chunks))

        def compute(group: Array) -> None:
            own, staged = features(group), smem["staged"].at[group]
            state = tuple(
                untyped(load_matrix(source["state"].at[sequence, own, part])) for part in parts
            )

            def of_chunk(index: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
                slot, (where, tokens) = stream.slot(index), place(index)
                whole = source["carry"][where]

                def put_tokens(x: Array) -> None:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    transposed(staged)[...] = x.astype(staged.dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(staged, target["tokens"].at[batch, tokens, head, own])

                def put_states(state: tuple[Array, ...]) -> None:
                    for part, x in zip(parts, state, strict=True):
                        put_parts(target["states"].at[where, :, own, part], x)

                def put_written(x: Array) -> None:
                    put_parts(target["written"].at[where, :, own], x)

                def put_parts(ref: Ref, x: Array) -> None:
                    for i, part in enumerate(split(x)):
                        store_directly(ref.at[i], part)

                plgpu.barrier_wait(full.at[slot])
                chunk = _Chunk(
                    *(smem[key].at[slot] for key in ("q", "k")),
                    smem["own"].at[slot, group],
                    *(smem[key].at[slot] for key in ("inverse", "scores", "numbers")),
                )
                state = step(chunk, whole, state, _Put(put_tokens, put_states, put_written))
                stream.release(index)
                return state

            state = lax.fori_loop(0, w.chunks, of_chunk, state)
            for part, x in zip(parts, state, strict=True):
                store_directly(target["state"].at[sequence, own, part], x)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        warpgroups(groups, compute, load)

    grid = {"v_block": w.v_dim // TILE // groups, "head": w.heads, "batch": w.batch}
    run = launch(body, name, groups, list(out.values()), list(scratch.values()), **grid)
    return dict(zip(out, run(*given.values()), strict=True))
