"""Bodies of the TPU kernels: block two-pass, heads in lanes, features in sublanes.

    e, g      state before or after a token: what its block has reached by itself, and what is left
              of the carrier of the block before; the token sees e + g
    m, q      the same from right to left: cotangent that reaches a token from its own block, and
              what is left of the right neighbour's
    a, u      decay (one row, spread over sublanes), input (v, or b v where gated)
    dx, du    cotangent of the recurrence's output (dy, or c dy where gated) and of its input

    forward   e_i = a_i e_{i-1} + u_i     g_i = a_i g_{i-1}       x_i = e_i + g_i
              behind a block's last token: g <- e (lookback 1) or 0 (lookback 0); e <- 0
    backward  mu_i = dx_i + m             s_i = mu_i + q          du_i = s_i
              da_i = sum over features of (s_i e_{i-1} + mu_i g_{i-1})
              m <- a_i mu_i               q <- a_i q
              ahead of a block's last token: q <- m (lookback 1) or 0 (lookback 0); m <- 0

With `lookback=None` nothing happens between blocks, so e and m are all there is.

Two numbers, for D = 16 features in bfloat16, per token and head: forward 66 bytes (plain) or 130
(gated), backward 100 or 260; about 5 and 7 operations per feature forward, 12 and 18 backward.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

SUBLANES = 8
# Rows from one token's terms to the next one's: odd, so that strided loads meet eight banks.
TERM_STRIDE = 9
# The grid is (batch, heads, features, time).
TIME_AXIS = 3
States = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a kernel body is specialised for.

    Attributes:
        time: tokens of the sequence.
        features: features of one program, a multiple of 8.
        block_size: tokens per block, a power of two.
        lookback: 0, 1 or None.
        tile: tokens per grid step.
        interval: tokens between two states that the forward pass saves: the backward pass's tile.
        rows: tokens unrolled in a loop's body, a divisor of `interval`.
    """

    time: int
    features: int
    block_size: int
    lookback: int | None
    tile: int
    interval: int
    rows: int

    @property
    def states(self) -> int:
        """Number of states carried: e, or e and g."""
        return 2 if self.lookback == 1 else 1

    @property
    def tiles(self) -> int:
        """Grid steps along time."""
        return pl.cdiv(self.time, self.tile)


def _hand_over(states: States, inside: bool | jax.Array) -> States:
    """Cross a block's edge where `inside` is false."""
    if inside is True:
        return states
    zero = jnp.zeros_like(states[0])
    crossed = (zero, states[0]) if len(states) == 2 else (zero,)
    if inside is False:
        return crossed
    return tuple(jnp.where(inside, x, y) for x, y in zip(states, crossed, strict=True))


def _inside(plan: Plan, row: int, token: jax.Array) -> bool | jax.Array:
    """Whether the edge behind row `row` of the chunk that begins at `token` is inside a block."""
    if plan.lookback is None:
        return True
    if plan.block_size <= plan.rows:
        return (row + 1) % plan.block_size != 0
    if row + 1 < plan.rows:
        return True
    return (token + plan.rows) % plan.block_size != 0


def _chunks(plan: Plan, tile: jax.Array) -> tuple[int | jax.Array, int]:
    """Whole chunks of this tile, and tokens of the ragged one that ends the sequence."""
    whole, ragged = divmod(plan.time, plan.rows)
    per_tile = plan.tile // plan.rows
    if plan.tiles == 1:
        return whole, ragged
    if whole == plan.tiles * per_tile:
        return per_tile, ragged
    return jnp.minimum(per_tile, whole - tile * per_tile), ragged


def _if_last(plan: Plan, tile: jax.Array, states: States, run: Callable) -> States:
    """Apply `run` to the states in the last tile of the sequence only."""
    if plan.tiles == 1:
        return run(states)
    return lax.cond(tile == plan.tiles - 1, run, lambda states: states, states)


def _first_token(plan: Plan, chunk: int | jax.Array) -> int | jax.Array:
    """First token of a chunk, counted from the beginning of the tile."""
    base = chunk * plan.rows
    return base if isinstance(base, int) else pl.multiple_of(base, plan.rows)


def _float32(ref, i) -> jax.Array:
    """Token i of a ref [1, tile, features, lanes]."""
    return ref[0, i].astype(jnp.float32)


def _advance(decay, u: jax.Array, i, states: States) -> States:
    row_decay = decay[pl.ds(i, 1), :]
    e, *g = (row_decay * state for state in states)
    return (e + u, *g)


def forward_kernel(plan: Plan, inputs: tuple, outputs: tuple, scratch: tuple) -> None:
    """One tile of the forward pass.

    Args:
        plan: what it is specialised for.
        inputs: refs of a, v, b, c, local, previous; None for what is not there.
        outputs: refs of x, starts, final.
        scratch: float32 refs for decays [tile, lanes] and states [states, features, lanes].
    """
    a, v, b, c, local, previous = inputs
    x, starts, final = outputs
    decay, kept = scratch
    tile = pl.program_id(TIME_AXIS)
    whole, ragged = _chunks(plan, tile)
    decay[...] = a[0].astype(jnp.float32)

    @pl.when(tile == 0)
    def _():
        for k, initial in zip(range(plan.states), (local, previous), strict=False):
            kept[k] = jnp.zeros(kept.shape[1:], kept.dtype) if initial is None else initial[0]

    def chunk(count: int, index, states: States) -> States:
        base = _first_token(plan, index)
        for row in range(count):
            i = base + row
            value = _float32(v, i)
            u = value if b is None else _float32(b, i) * value
            states = _advance(decay, u, i, states)
            out = functools.reduce(jnp.add, states)
            if c is not None:
                out = out * _float32(c, i) + value
            x[0, i] = out.astype(x.dtype)
            token = tile * plan.tile + base
            states = _hand_over(states, _inside(plan, row, token))
        return states

    states = tuple(kept[k] for k in range(plan.states))
    if starts is None:
        states = lax.fori_loop(0, whole, functools.partial(chunk, plan.rows), states)
    else:
        per_interval = plan.interval // plan.rows

        def interval(n, states):
            for k, state in enumerate(states):
                starts[0, n, k] = state
            first = n * per_interval
            count = per_interval
            if not isinstance(whole, int) or whole < plan.tile // plan.rows:
                count = jnp.clip(whole - first, 0, per_interval)
            return lax.fori_loop(0, count, lambda n, s: chunk(plan.rows, first + n, s), states)

        states = lax.fori_loop(0, plan.tile // plan.interval, interval, states)
    if ragged:
        states = _if_last(plan, tile, states, functools.partial(chunk, ragged, whole))
    for k, state in enumerate(states):
        kept[k] = state

    if final is not None:

        @pl.when(tile == plan.tiles - 1)
        def _():
            final[0] = kept[0]


def backward_kernel(plan: Plan, inputs: tuple, outputs: tuple, scratch: tuple) -> None:
    """One tile of the backward pass; the grid visits the tiles from the last to the first.

    Args:
        plan: what it is specialised for.
        inputs: refs of a, v, b, c, dy, starts, dfinal; None for what is not there.
        outputs: refs of da, dv, db, dc, dlocal, dprevious.
        scratch: float32 refs for decays [tile, lanes], cotangents on their way to the left
            [states, features, lanes], states before each token [states, tile, features, lanes]
            and the terms of a chunk's da before they are summed over sublanes [9 rows, lanes].
    """
    a, v, b, c, dy, starts, dfinal = inputs
    da, dv, db, dc, dlocal, dprevious = outputs
    decay, kept, before, terms = scratch
    step = pl.program_id(TIME_AXIS)
    tile = plan.tiles - 1 - step
    whole, ragged = _chunks(plan, tile)
    decay[...] = a[0].astype(jnp.float32)

    @pl.when(step == 0)
    def _():
        kept[...] = jnp.zeros_like(kept)
        if dfinal is not None:
            kept[0] = dfinal[0]

    def recompute(count: int, index, states: States) -> States:
        """States before each token of a chunk, from left to right."""
        base = _first_token(plan, index)
        for row in range(count):
            i = base + row
            for k, state in enumerate(states):
                before[k, i] = state
            u = _float32(v, i) if b is None else _float32(b, i) * _float32(v, i)
            states = _advance(decay, u, i, states)
            if c is not None:
                # The gate's gradient needs the state behind the token: here it is.
                dc[0, i] = (_float32(dy, i) * functools.reduce(jnp.add, states)).astype(dc.dtype)
            token = tile * plan.tile + base
            states = _hand_over(states, _inside(plan, row, token))
        return states

    def pull_back(count: int, index, states: States) -> States:
        """Cotangents of a chunk, from right to left."""
        base = _first_token(plan, index)
        for row in reversed(range(count)):
            i = base + row
            token = tile * plan.tile + base
            states = _hand_over(states, _inside(plan, row, token))
            dout = _float32(dy, i)
            dx = dout if c is None else _float32(c, i) * dout
            mu = dx + states[0]
            s = mu if len(states) == 1 else mu + states[1]
            products = s * before[0, i]
            if len(states) == 2:
                products = products + mu * before[1, i]
            parts = (products[n : n + SUBLANES] for n in range(0, plan.features, SUBLANES))
            terms[pl.ds(row * TERM_STRIDE, SUBLANES), :] = functools.reduce(jnp.add, parts)
            if b is None:
                dv[0, i] = s.astype(dv.dtype)
            else:
                dv[0, i] = (s * _float32(b, i) + dout).astype(dv.dtype)
                db[0, i] = (s * _float32(v, i)).astype(db.dtype)
            row_decay = decay[pl.ds(i, 1), :]
            states = (row_decay * mu, *(row_decay * q for q in states[1:]))
        # Sum over sublanes, eight tokens at once: the k-th sublane of each is one strided load.
        sums = []
        for start in range(0, plan.rows * TERM_STRIDE, SUBLANES * TERM_STRIDE):
            loads = (
                terms[pl.ds(start + k, SUBLANES, stride=TERM_STRIDE), :] for k in range(SUBLANES)
            )
            sums.append(functools.reduce(jnp.add, loads))
        da[0, 0, pl.ds(base, plan.rows), :] = jnp.concatenate(sums).astype(da.dtype)
        return states

    states = tuple(starts[0, 0, k] for k in range(plan.states))
    states = lax.fori_loop(0, whole, functools.partial(recompute, plan.rows), states)
    if ragged:
        _if_last(plan, tile, states, functools.partial(recompute, ragged, whole))

    states = tuple(kept[k] for k in range(plan.states))
    if ragged:
        states = _if_last(plan, tile, states, functools.partial(pull_back, ragged, whole))
    states = lax.fori_loop(
        0, whole, lambda n, states: pull_back(plan.rows, whole - 1 - n, states), states
    )
    for k, state in enumerate(states):
        kept[k] = state

    @pl.when(tile == 0)
    def _():
        if dlocal is not None:
            dlocal[0] = functools.reduce(jnp.add, [kept[k] for k in range(plan.states)])
        if dprevious is not None:
            dprevious[0] = kept[0]
