"""Hopper kernels of the block two-pass recurrence: three launches, all on the same pipeline.

Notation, after the paper (arXiv 2512.13921):

    B, T, H, F  batch, token, head (row of a tile), feature
    a, u        decay [B, T, H], input [B, T, H, F]; u = b v in the gated form
    x           states [B, T, H, F]; the gated output is x c + v
    E           state of the own block, started from zero (from `local` in the first block)
    P           state of the window, which is what a token sees; P = E where lookback is 0
    mu, s       the same two for the recurrence that runs from right to left over the cotangents
    d...        cotangents

A thread block owns `heads` heads of one batch element and walks through `chunk` tokens in
sub-blocks of 16, each loaded by TMA several sub-blocks ahead. Heads and features lie across the 128
threads, F * heads / 128 neighbouring features to a thread, and the rows of a sub-block are done in
sequence, in registers: two multiply-adds an element, no logarithm, no division, nothing exchanged
between threads but the sum over features that da needs. Outputs are written over inputs in shared
memory and leave from there by TMA, which drops what lies outside the arrays; what it reads there
is zero.

A window reaches at most one block beyond a chunk, so each chunk recomputes that block (the halo).
The exact recurrence takes what enters each chunk from memory instead, where `reduce` prepared it.

Bytes per token and head at F = 16 in 16 bits, gated in brackets: forward reads 32 + 2 [96 + 2] and
writes 32; backward reads 64 + 2 [128 + 2], writes 32 + 2 [96 + 2]; the states that the forward
leaves for the backward, one every 16 tokens, are 4 bytes more on both sides; halos add 16 / chunk.
Operations per element: 2 to 3 multiply-adds forward, about 10 backward.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.swr.tuning import SUBBLOCK, TuningConfig

Array = jax.Array
Ref = jax.Ref
WARPS, LANES = 4, 32

COMPILER_PARAMS = plgpu.CompilerParams(
    lowering_semantics=plgpu.LoweringSemantics.Lane,
    # Each thread reads and overwrites elements of its own only; see `_walk` for the async copies.
    unsafe_no_auto_barriers=True,
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is to be computed, static.

    Attributes:
        batch, time, heads, features: B, T, H, F; F is 8 or 16.
        block_size: tokens in a block, a multiple of 16.
        lookback: 0, 1 or None for the exact recurrence.
        gated: whether there are gates.
        continued: whether the first block's own state is not zero.
        config: how it is cut up.
    """

    batch: int
    time: int
    heads: int
    features: int
    block_size: int
    lookback: int | None
    gated: bool
    continued: bool
    config: TuningConfig

    @property
    def two_states(self) -> bool:
        """Whether E and P differ."""
        return self.lookback == 1

    @property
    def saved_states(self) -> int:
        """States that the forward leaves for the backward, for every sub-block."""
        if not self.two_states:
            return 1
        # A block's own state is zero where it begins.
        return 2 if self.continued or self.block_size > SUBBLOCK else 1

    @property
    def halo(self) -> int:
        """Sub-blocks beyond a chunk that it needs."""
        return self.block_size // SUBBLOCK if self.two_states else 0

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return pl.cdiv(self.time, self.config.chunk)

    @property
    def subblocks(self) -> int:
        """Number of sub-blocks."""
        return pl.cdiv(self.time, SUBBLOCK)

    @property
    def padded_heads(self) -> int:
        """Heads of arrays that are not read or written by TMA, which tolerates any number."""
        return pl.cdiv(self.heads, self.config.heads) * self.config.heads

    @property
    def line(self) -> int:
        """Elements that TMA moves as one: neighbours that rows and tiles are made of."""
        line = max(self.features, min(self.config.line, self.config.heads * self.features))
        while self.heads * self.features % line:
            line //= 2
        return line

    def as_lines(self, x: Array) -> Array:
        """[B, T, H, F] -> [B, T, lines, elements of a line]."""
        return x.reshape(self.batch, self.time, -1, self.line)

    def as_heads(self, x: Array) -> Array:
        """Undo `as_lines`."""
        return x.reshape(self.batch, self.time, self.heads, self.features)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Thread blocks over tiles of heads, chunks and the batch."""
        return (self.padded_heads // self.config.heads, self.chunks, self.batch)


@dataclasses.dataclass(frozen=True)
class _Tile:
    """A sub-block of 16 tokens in shared memory: loads and stores of its rows."""

    problem: Problem
    first_token: Array

    @property
    def shape(self) -> tuple[int, int]:
        return self.problem.config.heads, self.problem.features

    @property
    def layout(self):
        heads, features = self.shape
        vector = heads * features // (WARPS * LANES)
        tiles = ((heads, features), (heads // WARPS, features), (vector,))
        return plgpu.Layout.TILED(plgpu.Tiling(tiles), (-5,), (-3, -2), -1)

    @property
    def decay_layout(self):
        return self.layout.reduce(1)

    def zeros(self) -> Array:
        return plgpu.layout_cast(jnp.zeros(self.shape, jnp.float32), self.layout)

    def load(self, ref: Ref, *index: int) -> Array:
        """Load a row [heads, features], or what else has this shape, as float32."""
        x = plgpu.load(self._row(ref, index), layout=self.layout, optimized=False)
        return x.astype(jnp.float32)

    def store(self, x: Array, ref: Ref, *index: int) -> None:
        """Store a row [heads, features] in the dtype of `ref`."""
        self._row(ref, index)[...] = x.astype(ref.dtype)

    def _row(self, ref: Ref, index: tuple) -> Ref:
        ref = ref.at[index]
        return ref if ref.shape == self.shape else ref.reshape(*self.shape)

    def decay(self, ref: Ref, row: int) -> tuple[Array, Array]:
        """Load a row of decays, as [heads] and spread over the features.

        Tokens behind the end have a decay of 1, so that both directions hand states on unchanged.
        """
        a = plgpu.load(ref.at[row], layout=self.decay_layout, optimized=False)
        a = a.astype(jnp.float32)
        if self.problem.time % SUBBLOCK:
            a = jnp.where(self.first_token + row < self.problem.time, a, jnp.ones_like(a))
        return a, self.spread(a)

    def spread(self, x: Array) -> Array:
        """Repeat [heads] over the features."""
        return plgpu.layout_cast(lax.broadcast_in_dim(x, self.shape, (0,)), self.layout)


def _smem(slots: int, p: Problem, dtype: jnp.dtype) -> plgpu.SMEM:
    lines = p.config.heads * p.features // p.line
    return plgpu.SMEM((slots, SUBBLOCK, lines, p.line), dtype)


def _decay_smem(slots: int, p: Problem, dtype: jnp.dtype) -> plgpu.SMEM:
    return plgpu.SMEM((slots, SUBBLOCK, p.config.heads), dtype)


def _store(ref: Ref, x: Array) -> None:
    """Store straight to global memory: few bytes, whose rows may be narrower than a sector."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, x, optimized=False)
    else:  # JAX 0.11 asks for nothing better.
        ref[...] = x


def _start_loads(sources: Sequence[Ref], targets: Sequence[Ref], barrier: Ref) -> None:
    for source, target in zip(sources, targets, strict=True):
        plgpu.copy_gmem_to_smem(source, target, barrier)


def _walk(
    steps: Array,
    slots: int,
    load: Callable[[Array, Array], None],
    compute: Callable[[Array, Array, tuple], tuple],
    store: Callable[[Array, Array], None],
    barriers: Ref,
    state: tuple,
) -> tuple:
    """Run `steps` steps, the loads of the next `slots - 1` in flight while one is computed.

    Args:
        steps: number of steps.
        slots: stages in shared memory; step i uses stage i % slots.
        load: starts the loads (step, slot) of a step.
        compute: takes (step, slot, state) to the next state, and leaves outputs in shared memory.
        store: starts the stores (step, slot) of a step.
        barriers: one for each slot.
        state: first state.
    """
    for step in range(slots - 1):

        @pl.when(step < steps)
        def _(step=step):
            load(jnp.int32(step), jnp.int32(step))

    def body(step: Array, state: tuple) -> tuple:
        slot = lax.rem(step, jnp.int32(slots))
        plgpu.barrier_wait(barriers.at[slot])
        state = compute(step, slot, state)
        # Every thread is done with the slot, and its results are visible to the TMA unit.
        plgpu.commit_smem()
        store(step, slot)
        # The slot of the previous step is free again: no thread reads it any more, and of the
        # stores only those of this step may still be reading shared memory.
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        ahead = step + (slots - 1)

        @pl.when(ahead < steps)
        def _():
            load(ahead, lax.rem(ahead, jnp.int32(slots)))

        return state

    state = lax.fori_loop(0, steps, body, state)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    return state


def _place(p: Problem) -> tuple[Array, Array, Array, Array]:
    """Return batch element, first head, chunk, and number of sub-blocks in it."""
    head = lax.axis_index("head") * p.config.heads
    chunk = lax.axis_index("chunk")
    per_chunk = p.config.chunk // SUBBLOCK
    steps = jnp.minimum(p.subblocks - chunk * per_chunk, per_chunk)
    return lax.axis_index("batch"), head, chunk, steps


def _part(p: Problem, ref: Ref, batch: Array, index: Array) -> Ref:
    """Return the tile of a sub-block: of decays [B, T, H'], or of lines [B, T, lines, line]."""
    tokens = pl.ds(index * SUBBLOCK, SUBBLOCK)
    size = p.config.heads
    if len(ref.shape) == 4:
        size = size * p.features // p.line
    return ref.at[batch, tokens, pl.ds(lax.axis_index("head") * size, size)]


def _launch(p: Problem, body: Callable, name: str, out_type, scratch_types) -> Callable:
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=p.grid,
        grid_names=("head", "chunk", "batch"),
        compiler_params=COMPILER_PARAMS,
        kernel_name=name,
    )


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
        batch, head, chunk, steps = _place(p)
        heads = pl.ds(head, p.config.heads)
        halo = jnp.where(chunk == 0, 0, p.halo)
        first = chunk * (p.config.chunk // SUBBLOCK) - halo

        def part(ref: Ref, step: Array) -> Ref:
            return _part(p, ref, batch, first + step)

        def load(step: Array, slot: Array) -> None:
            sources = [part(ref, step) for ref in (a_gmem, *wide_gmem)]
            targets = [ref.at[slot] for ref in (a_smem, *wide_smem)]
            _start_loads(sources, targets, barriers.at[slot])

        def compute(step: Array, slot: Array, state: tuple) -> tuple:
            index = first + step
            tile = _Tile(p, index * SUBBLOCK)
            own, window = state
            if not exact:
                own, window = _enter_block(p, tile, index, own, window)
            if save:

                @pl.when(step >= halo)
                def _():
                    saved = (window, own)[: p.saved_states]
                    for i, x in enumerate(saved):
                        _store(states_gmem.at[batch, index, i, heads], x)

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

        tile = _Tile(p, jnp.int32(0))
        state = (tile.zeros(), tile.zeros())
        if entering is not None:
            state = _load_entering(p, tile, arguments[-1], batch, chunk, heads)
        _, window = _walk(steps + halo, slots, load, compute, store, barriers, state)
        if exact:

            @pl.when(chunk == p.chunks - 1)
            def _():
                _store(results[-1].at[batch, heads], window)

    scratch = [
        plgpu.Barrier(num_arrivals=1 + len(wide), num_barriers=slots),
        _decay_smem(slots, p, a.dtype),
        *(_smem(slots, p, x.dtype) for x in wide),
    ]
    out, *rest = _launch(p, body, "swr_forward", outputs, scratch)(*inputs)
    states = rest.pop(0) if save else None
    return p.as_heads(out), states, rest.pop(0) if exact else None


def _enter_block(p: Problem, tile: _Tile, index: Array, own: Array, window: Array):
    """States at the start of a sub-block: where a block begins, the window moves on."""

    def moved() -> tuple[Array, Array]:
        return tile.zeros(), own if p.two_states else tile.zeros()

    if p.block_size == SUBBLOCK:
        begins = index > 0
    else:
        per_block = jnp.int32(p.block_size // SUBBLOCK)
        begins = (index > 0) & (lax.rem(index, per_block) == 0)
    next_own, next_window = moved()
    return jnp.where(begins, next_own, own), jnp.where(begins, next_window, window)


def _load_entering(
    p: Problem, tile: _Tile, ref: Ref, batch: Array, chunk: Array, heads
) -> tuple[Array, Array]:
    """Load the states (E, P) that enter a chunk."""
    if p.lookback is None:
        state = tile.load(ref, batch, chunk, 0, heads)
        return state, state
    is_first = chunk == 0
    states = (tile.load(ref, batch, 0, i, heads) for i in range(2))
    own, window = (jnp.where(is_first, state, tile.zeros()) for state in states)
    return own, window


def backward(
    p: Problem,
    a: Array,
    v: Array,
    gates: tuple[Array, Array] | None,
    states: Array,
    dout: Array,
    entering: Array | None,
    *,
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
        initial: whether the gradient of the states before the first token is wanted.

    Returns:
        da [B, T, H'], dv, (db, dc) or None, and [B, 2, H'', F], float32, the gradients of the first
        block's own state and of the carrier that it gets ([B, 1, H'', F], of its own state, where
        no carrier is handed on), or None.
    """
    two = p.two_states
    wide = tuple(map(p.as_lines, (v, dout) if gates is None else (v, dout, *gates)))
    inputs = [a, *wide, states] + ([] if entering is None else [entering])
    gradients_of = (a, wide[0], *wide[2:])
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in gradients_of]
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
        batch, head, chunk, steps = _place(p)
        heads = pl.ds(head, p.config.heads)
        end = chunk * (p.config.chunk // SUBBLOCK) + steps
        halo = jnp.minimum(p.subblocks - end, p.halo)
        last = end + halo - 1

        def part(ref: Ref, step: Array) -> Ref:
            return _part(p, ref, batch, last - step)

        def load(step: Array, slot: Array) -> None:
            sources = [part(ref, step) for ref in (arguments[0], *wide_gmem)]
            sources.append(states_gmem.at[batch, last - step, :, heads])
            targets = [ref.at[slot] for ref in (a_smem, *wide_smem, states_smem)]
            _start_loads(sources, targets, barriers.at[slot])

        def compute(step: Array, slot: Array, state: tuple) -> tuple:
            tile = _Tile(p, (last - step) * SUBBLOCK)
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
                da_smem[lax.rem(step, jnp.int32(2)), row] = da.astype(a.dtype)
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

        tile = _Tile(p, jnp.int32(0))
        state = (tile.zeros(), tile.zeros())
        if entering is not None:
            right = tile.load(arguments[-1], batch, chunk, 0, heads)
            state = (right, right)
        state = _walk(steps + halo, slots, load, compute, store, barriers, state)
        if initial:

            @pl.when(chunk == 0)
            def _():
                for i, x in enumerate(state if two else state[:1]):
                    _store(results[-1].at[batch, i, heads], x)

    scratch = [
        plgpu.Barrier(num_arrivals=2 + len(wide), num_barriers=slots),
        _decay_smem(slots, p, a.dtype),
        *(_smem(slots, p, x.dtype) for x in wide),
        plgpu.SMEM((slots, saved, p.config.heads, p.features), jnp.float32),
        _decay_smem(2, p, a.dtype),
    ]
    da, dv, *rest = _launch(p, body, "swr_backward", outputs, scratch)(*inputs)
    dgates = None if gates is None else (p.as_heads(rest.pop(0)), p.as_heads(rest.pop(0)))
    return da, p.as_heads(dv), dgates, rest.pop(0) if initial else None


def _leave_block(p: Problem, tile: _Tile, index: Array, s: Array, mu: Array):
    """Cotangent states at the end of a sub-block: where a block ends, the window moves on."""
    if p.lookback is None:
        return s, mu
    per_block = jnp.int32(p.block_size // SUBBLOCK)
    ends = lax.rem(index + 1, per_block) == 0
    return (
        jnp.where(ends, mu if p.two_states else tile.zeros(), s),
        jnp.where(ends, tile.zeros(), mu),
    )


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
        batch, head, chunk, steps = _place(p)
        heads = pl.ds(head, p.config.heads)
        first = chunk * (p.config.chunk // SUBBLOCK)

        def index(step: Array) -> Array:
            return first + (steps - 1 - step if reverse else step)

        def load(step: Array, slot: Array) -> None:
            sources = [_part(p, ref, batch, index(step)) for ref in (a_gmem, *factors_gmem)]
            targets = [ref.at[slot] for ref in (a_smem, *factors_smem)]
            _start_loads(sources, targets, barriers.at[slot])

        def compute(step: Array, slot: Array, state: tuple) -> tuple:
            tile = _Tile(p, index(step) * SUBBLOCK)
            product, x = state
            for row in reversed(range(SUBBLOCK)) if reverse else range(SUBBLOCK):
                decay, spread = tile.decay(a_smem.at[slot], row)
                u = tile.load(factors_smem[0], slot, row)
                if len(factors) == 2:
                    u = u * tile.load(factors_smem[1], slot, row)
                x = spread * (x + u) if reverse else spread * x + u
                product = product * decay
            return product, x

        tile = _Tile(p, jnp.int32(0))
        ones = plgpu.layout_cast(jnp.ones((p.config.heads,), jnp.float32), tile.decay_layout)
        product, x = _walk(
            steps, slots, load, compute, lambda *_: None, barriers, (ones, tile.zeros())
        )
        _store(products_gmem.at[batch, chunk, heads], product)
        _store(states_gmem.at[batch, chunk, heads], x)

    outputs = [
        jax.ShapeDtypeStruct((p.batch, p.chunks, p.padded_heads), jnp.float32),
        jax.ShapeDtypeStruct((p.batch, p.chunks, p.padded_heads, p.features), jnp.float32),
    ]
    scratch = [
        plgpu.Barrier(num_arrivals=1 + len(factors), num_barriers=slots),
        _decay_smem(slots, p, a.dtype),
        *(_smem(slots, p, x.dtype) for x in factors),
    ]
    products, states = _launch(p, body, "swr_reduce", outputs, scratch)(a, *factors)
    return products, states
