"""Hopper kernels of the block two-pass recurrence: three launches, all on the same pipeline.

Notation, after the paper (arXiv 2512.13921):

    B, T, H, F  batch, token, head (row of a tile), feature
    a, u        decay [B, T, H], input [B, T, H, F]; u = b v in the gated form
    x           states [B, T, H, F]; the gated output is x c + v
    E           state of the own block, started from zero (from `local` in the first block)
    P           state of the window, which is what a token sees; P = E where lookback is 0
    mu, s       the same two for the recurrence that runs from right to left over the cotangents
    d...        cotangents

A thread block walks through its chunk of tokens in sub-blocks of 16. The rows of a sub-block are
done in sequence, in registers: two multiply-adds an element, no logarithm, no division, nothing
exchanged between threads but the sum over features that da needs. (The block's operator as a matrix
on the tensor cores is the other way to do it. It was built, compiled and left: in every case its
predicted issue time is longer, and no saving there would shorten what memory takes. The figures are
in experiments/results/h100_tensor_core_form.json.)

A window reaches at most one block beyond a chunk, so each chunk recomputes that block (the halo).
The exact recurrence takes what enters each chunk from memory instead, where `reduce` prepared it.

Bytes per token and head at F = 16 in 16 bits, gated in brackets: forward reads 32 + 2 [96 + 2] and
writes 32; backward reads 64 + 2 [128 + 2], writes 32 + 2 [96 + 2]; the states that the forward
leaves for the backward, one every 16 tokens, are 4 bytes more on both sides; what is read grows by
block_size / chunk for the halos.
Instructions per element: 6 forward, 15 backward, loads and conversions included.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.swr.mosaic_gpu_pipeline import (
    Problem,
    Tile,
    decay_scratch,
    launch,
    part_of,
    place,
    start_loads,
    store_directly,
    walk,
    wide_scratch,
)
from pallas_kernels.swr.tuning import SUBBLOCK

Array = jax.Array
Ref = jax.Ref


def forward(
    p: Problem,
    a: Array,
    v: Array,
    gates: tuple[Array, Array] | None,
    entering: Array | None,
    *,
    save: bool,
) -> tuple[Array, Array | None, Array | None]:
    """Return the output, the states that the backward needs, and the last state.

    Args:
        p: the problem.
        a: decays [B, T, H'], H' >= H.
        v: inputs [B, T, H, F].
        gates: None, or (b, c), both like v.
        entering: for the exact recurrence the state that enters each chunk, [B, chunks, 1, H'', F];
            else E and P before the first token, [B, 1, 2, H'', F]; float32, H'' = p.padded_heads.
            None for zero.
        save: whether the backward will follow.

    Returns:
        Output [B, T, H, F]; saved states, [B, sub-blocks, 1 or 2, H'', F], P first, or None; state
        after the last token [B, H'', F] for the exact recurrence, else None. States are float32.
    """
    exact = p.lookback is None
    wide = tuple(map(p.as_lines, (v,) if gates is None else (v, *gates)))
    inputs = [a, *wide] + ([] if entering is None else [entering])
    states_shape = (p.batch, p.subblocks, p.saved_states, p.padded_heads, p.features)
    outputs = [jax.ShapeDtypeStruct(wide[0].shape, v.dtype)]
    if save:
        outputs.append(jax.ShapeDtypeStruct(states_shape, jnp.float32))
    if exact:
        shape = (p.batch, p.padded_heads, p.features)
        outputs.append(jax.ShapeDtypeStruct(shape, jnp.float32))
    slots = p.config.forward_slots

    def body(*refs):
        arguments, refs = refs[: len(inputs)], refs[len(inputs) :]
        results, (barriers, a_smem, *wide_smem) = refs[: len(outputs)], refs[len(outputs) :]
        a_gmem, *wide_gmem = arguments[: 1 + len(wide)]
        states_gmem = results[1] if save else None
        batch, heads, chunk, steps = place(p)
        halo = jnp.where(chunk == 0, 0, p.halo)
        first = chunk * (p.config.chunk // SUBBLOCK) - halo

        def part(ref: Ref, step: Array) -> Ref:
            return part_of(p, ref, batch, first + step)

        def load(step: Array, slot: Array) -> None:
            sources = [part(ref, step) for ref in (a_gmem, *wide_gmem)]
            targets = [ref.at[slot] for ref in (a_smem, *wide_smem)]
            start_loads(sources, targets, barriers.at[slot])

        def compute(step: Array, slot: Array, state: tuple) -> tuple:
            index = first + step
            tile = Tile(p, index * SUBBLOCK)
            own, window = _enter_block(p, tile, index, *state)
            if save:

                @pl.when(step >= halo)
                def _():
                    saved = (window, own)[: p.saved_states]
                    for i, x in enumerate(saved):
                        store_directly(states_gmem.at[batch, index, i, heads], x)

            for row in range(SUBBLOCK):
                _, decay = tile.decay(a_smem.at[slot], row)
                value = tile.load(wide_smem[0], slot, row)
                u = value if gates is None else tile.load(wide_smem[1], slot, row) * value
                window = decay * window + u
                if p.two_states:
                    own = decay * own + u
                out = window
                if gates is not None:
                    out = out * tile.load(wide_smem[2], slot, row) + value
                tile.store(out, wide_smem[0], slot, row)
            return (own if p.two_states else window), window

        def store(step: Array, slot: Array) -> None:
            @pl.when(step >= halo)
            def _():
                plgpu.copy_smem_to_gmem(wide_smem[0].at[slot], part(results[0], step))

        tile = Tile(p, jnp.int32(0))
        state = (tile.zeros(), tile.zeros())
        if entering is not None:
            state = _load_entering(p, tile, arguments[-1], batch, chunk, heads)
        _, window = walk(steps + halo, slots, load, compute, store, barriers, state)
        if exact:

            @pl.when(chunk == p.chunks - 1)
            def _():
                store_directly(results[-1].at[batch, heads], window)

    scratch = [
        plgpu.Barrier(num_arrivals=1 + len(wide), num_barriers=slots),
        decay_scratch(slots, p, a.dtype),
        *(wide_scratch(slots, p, x.dtype) for x in wide),
    ]
    out, *rest = launch(p, body, "swr_forward", outputs, scratch)(*inputs)
    states = rest.pop(0) if save else None
    return p.as_heads(out), states, rest.pop(0) if exact else None


def _enter_block(p: Problem, tile: Tile, index: Array, own: Array, window: Array):
    """States at the start of a sub-block: where a block begins, the window moves on."""
    if p.lookback is None:
        return own, window
    per_block = jnp.int32(p.block_size // SUBBLOCK)
    begins = (index > 0) & (lax.rem(index, per_block) == 0)
    return (
        jnp.where(begins, tile.zeros(), own),
        jnp.where(begins, own if p.two_states else tile.zeros(), window),
    )


def _leave_block(p: Problem, tile: Tile, index: Array, s: Array, mu: Array):
    """Cotangent states at the end of a sub-block: where a block ends, the window moves on."""
    if p.lookback is None:
        return s, mu
    per_block = jnp.int32(p.block_size // SUBBLOCK)
    ends = lax.rem(index + 1, per_block) == 0
    return (
        jnp.where(ends, mu if p.two_states else tile.zeros(), s),
        jnp.where(ends, tile.zeros(), mu),
    )


def _load_entering(
    p: Problem, tile: Tile, ref: Ref, batch: Array, chunk: Array, heads
) -> tuple[Array, Array]:
    """Load the states (E, P) that enter a chunk."""
    if p.lookback is None:
        state = _untyped(tile.load(ref, batch, chunk, 0, heads))
        return state, state
    is_first = chunk == 0
    states = (tile.load(ref, batch, 0, i, heads) for i in range(2))
    own, window = (jnp.where(is_first, state, tile.zeros()) for state in states)
    return own, window


def _untyped(x: Array) -> Array:
    """Return x with the type of what is computed here.

    Under `shard_map` what is loaded from an argument varies over the mesh, by its type, but what is
    computed from it inside a kernel does not; and a loop's state must keep its type.
    """
    return x * jnp.float32(1)


def backward(
    p: Problem,
    a: Array,
    v: Array,
    gates: tuple[Array, Array] | None,
    states: Array,
    dout: Array,
    entering: Array | None,
    *,
    da_dtype: jnp.dtype,
    initial: bool,
) -> tuple[Array, Array, tuple[Array, Array] | None, Array | None]:
    """Return the gradients of a, v, the gates, and of the states before the first token.

    Args:
        p: the problem.
        a, v, gates: as the forward had them.
        states: what the forward saved.
        dout: cotangent of the output, dtype of v.
        entering: for the exact recurrence, the cotangent state that enters each chunk from its
            right, [B, chunks, 1, H'', F], float32; None for zero.
        da_dtype: dtype of da.
        initial: whether the gradient of the states before the first token is wanted.

    Returns:
        da [B, T, H'], dv, (db, dc) or None, and [B, 2, H'', F], float32, the gradients of the first
        block's own state and of the carrier that it gets ([B, 1, H'', F], of its own state, where
        no carrier is handed on), or None.
    """
    two = p.two_states
    wide = tuple(map(p.as_lines, (v, dout) if gates is None else (v, dout, *gates)))
    inputs = [a, *wide, states] + ([] if entering is None else [entering])
    outputs = [jax.ShapeDtypeStruct(a.shape, da_dtype)]
    outputs += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (wide[0], *wide[2:])]
    if initial:
        shape = (p.batch, 2 if two else 1, p.padded_heads, p.features)
        outputs.append(jax.ShapeDtypeStruct(shape, jnp.float32))
    slots = p.config.backward_slots
    saved = p.saved_states

    def body(*refs):
        arguments, refs = refs[: len(inputs)], refs[len(inputs) :]
        results, scratch = refs[: len(outputs)], refs[len(outputs) :]
        barriers, a_smem, *wide_smem, states_smem, da_smem = scratch
        wide_gmem, states_gmem = arguments[1 : 1 + len(wide)], arguments[1 + len(wide)]
        v_smem, dout_smem, *gates_smem = wide_smem
        batch, heads, chunk, steps = place(p)
        end = chunk * (p.config.chunk // SUBBLOCK) + steps
        halo = jnp.minimum(p.subblocks - end, p.halo)
        last = end + halo - 1

        def part(ref: Ref, step: Array) -> Ref:
            return part_of(p, ref, batch, last - step)

        def load(step: Array, slot: Array) -> None:
            sources = [part(ref, step) for ref in (arguments[0], *wide_gmem)]
            sources.append(states_gmem.at[batch, last - step, :, heads])
            targets = [ref.at[slot] for ref in (a_smem, *wide_smem, states_smem)]
            start_loads(sources, targets, barriers.at[slot])

        def compute(step: Array, slot: Array, state: tuple) -> tuple:
            tile = Tile(p, (last - step) * SUBBLOCK)
            s, mu = _leave_block(p, tile, last - step, *state)

            # From left to right: the state before each row, and what the carry-in has decayed by.
            window = tile.load(states_smem, slot, 0)
            own = tile.load(states_smem, slot, 1) if saved == 2 else tile.zeros()
            carry = window - own
            state_before = own if two else window
            decayed = jnp.ones((p.config.heads,), jnp.float32)
            before, decays_before = [], []
            for row in range(SUBBLOCK):
                before.append(state_before)
                decays_before.append(decayed)
                decay, spread = tile.decay(a_smem.at[slot], row)
                u = tile.load(v_smem, slot, row)
                if gates is not None:
                    u = tile.load(gates_smem[0], slot, row) * u
                state_before = spread * state_before + u
                if two:
                    decayed = decay if row == 0 else decayed * decay

            # From right to left.
            for row in reversed(range(SUBBLOCK)):
                _, decay = tile.decay(a_smem.at[slot], row)
                do = tile.load(dout_smem, slot, row)
                dx = do if gates is None else do * tile.load(gates_smem[1], slot, row)
                s = s + dx
                terms = s * before[row]
                seen = before[row]
                if two:
                    mu = mu + dx
                    left = carry if row == 0 else tile.spread(decays_before[row]) * carry
                    terms = terms + mu * left
                    seen = seen + left
                da = jnp.sum(terms, axis=1)
                da_smem[lax.rem(step, jnp.int32(2)), row] = da.astype(da_dtype)
                dv = s
                if gates is not None:
                    value = tile.load(v_smem, slot, row)
                    b = tile.load(gates_smem[0], slot, row)
                    tile.store(do * (decay * seen + b * value), gates_smem[1], slot, row)
                    tile.store(s * value, gates_smem[0], slot, row)
                    dv = s * b + do
                tile.store(dv, v_smem, slot, row)
                s = decay * s
                if two:
                    mu = decay * mu
            return s, mu if two else s

        def store(step: Array, slot: Array) -> None:
            @pl.when(step >= halo)
            def _():
                sources = [da_smem.at[lax.rem(step, jnp.int32(2))], v_smem.at[slot]]
                sources += [ref.at[slot] for ref in gates_smem]
                for source, target in zip(sources, results[: len(sources)], strict=True):
                    plgpu.copy_smem_to_gmem(source, part(target, step), commit_group=False)
                plgpu.commit_smem_to_gmem_group()

        tile = Tile(p, jnp.int32(0))
        state = (tile.zeros(), tile.zeros())
        if entering is not None:
            right = _untyped(tile.load(arguments[-1], batch, chunk, 0, heads))
            state = (right, right)
        state = walk(steps + halo, slots, load, compute, store, barriers, state)
        if initial:

            @pl.when(chunk == 0)
            def _():
                for i, x in enumerate(state if two else state[:1]):
                    store_directly(results[-1].at[batch, i, heads], x)

    scratch = [
        plgpu.Barrier(num_arrivals=2 + len(wide), num_barriers=slots),
        decay_scratch(slots, p, a.dtype),
        *(wide_scratch(slots, p, x.dtype) for x in wide),
        plgpu.SMEM((slots, saved, p.config.heads, p.features), jnp.float32),
        decay_scratch(2, p, da_dtype),
    ]
    da, dv, *rest = launch(p, body, "swr_backward", outputs, scratch)(*inputs)
    dgates = None if gates is None else (p.as_heads(rest.pop(0)), p.as_heads(rest.pop(0)))
    return da, p.as_heads(dv), dgates, rest.pop(0) if initial else None


def reduce(p: Problem, a: Array, factors: Sequence[Array], *, reverse: bool) -> tuple[Array, Array]:
    """Return, for each chunk, the product of its decays and the state that it ends with.

    Args:
        p: the problem.
        a: decays [B, T, H'].
        factors: one or two arrays [B, T, H, F], whose product is the input.
        reverse: run from right to left as the backward does: state = a (state + input).

    Returns:
        Products [B, chunks, H''] and states, started from zero, [B, chunks, H'', F], float32.
    """
    slots = p.config.forward_slots
    factors = tuple(map(p.as_lines, factors))

    def body(a_gmem, *refs):
        factors_gmem, refs = refs[: len(factors)], refs[len(factors) :]
        products_gmem, states_gmem, barriers, a_smem, *factors_smem = refs
        batch, heads, chunk, steps = place(p)
        first = chunk * (p.config.chunk // SUBBLOCK)

        def index(step: Array) -> Array:
            return first + (steps - 1 - step if reverse else step)

        def load(step: Array, slot: Array) -> None:
            sources = [part_of(p, ref, batch, index(step)) for ref in (a_gmem, *factors_gmem)]
            targets = [ref.at[slot] for ref in (a_smem, *factors_smem)]
            start_loads(sources, targets, barriers.at[slot])

        def compute(step: Array, slot: Array, state: tuple) -> tuple:
            tile = Tile(p, index(step) * SUBBLOCK)
            product, x = state
            for row in reversed(range(SUBBLOCK)) if reverse else range(SUBBLOCK):
                decay, spread = tile.decay(a_smem.at[slot], row)
                u = tile.load(factors_smem[0], slot, row)
                if len(factors) == 2:
                    u = u * tile.load(factors_smem[1], slot, row)
                x = spread * (x + u) if reverse else spread * x + u
                product = product * decay
            return product, x

        tile = Tile(p, jnp.int32(0))
        ones = plgpu.layout_cast(jnp.ones((p.config.heads,), jnp.float32), tile.decay_layout)
        product, x = walk(
            steps, slots, load, compute, lambda *_: None, barriers, (ones, tile.zeros())
        )
        store_directly(products_gmem.at[batch, chunk, heads], product)
        store_directly(states_gmem.at[batch, chunk, heads], x)

    outputs = [
        jax.ShapeDtypeStruct((p.batch, p.chunks, p.padded_heads), jnp.float32),
        jax.ShapeDtypeStruct((p.batch, p.chunks, p.padded_heads, p.features), jnp.float32),
    ]
    scratch = [
        plgpu.Barrier(num_arrivals=1 + len(factors), num_barriers=slots),
        decay_scratch(slots, p, a.dtype),
        *(wide_scratch(slots, p, x.dtype) for x in factors),
    ]
    products, states = launch(p, body, "swr_reduce", outputs, scratch)(a, *factors)
    return products, states
