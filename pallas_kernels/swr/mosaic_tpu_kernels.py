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

from pallas_kernels.swr.mosaic_tpu_tokens import reader, turn, writer

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
        lane_order: whether arrays are [1, tile, features * lanes], not [1, tile, features, lanes].
    """

    time: int
    features: int
    block_size: int
    lookback: int | None
    tile: int
    interval: int
    rows: int
    lane_order: bool

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
        scratch: float32 refs for decays [tile, lanes], states [states, features, lanes], and what
            turns the tokens of v, b, c and x; None for what is not there.
    """
    a, v, b, c, local, previous = inputs
    x, starts, final = outputs
    decay, kept, turned_v, turned_b, turned_c, turned_x = scratch
    tile = pl.program_id(TIME_AXIS)
    whole, ragged = _chunks(plan, tile)
    decay[...] = a[0].astype(jnp.float32)

    @pl.when(tile == 0)
    def _():
        for k, initial in zip(range(plan.states), (local, previous), strict=False):
            kept[k] = jnp.zeros(kept.shape[1:], kept.dtype) if initial is None else initial[0]

    def chunk(count: int, index, states: States) -> States:
        base = _first_token(plan, index)
        for ref, turned in ((v, turned_v), (b, turned_b), (c, turned_c)):
            turn(ref, turned, base, count)
        v_at = reader(v, turned_v, base)
        b_at = reader(b, turned_b, base)
        c_at = reader(c, turned_c, base)
        put_x, finish_x = writer(x, turned_x, base, count)
        for row in range(count):
            value = v_at(row)
            u = value if b is None else b_at(row) * value
            states = _advance(decay, u, base + row, states)
            out = functools.reduce(jnp.add, states)
            if c is not None:
                out = out * c_at(row) + value
            put_x(row, out)
            token = tile * plan.tile + base
            states = _hand_over(states, _inside(plan, row, token))
        finish_x()
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
            [states, features, lanes], states before each token [states, tile, features, lanes],
            the terms of a chunk's da before they are summed over sublanes [9 rows, lanes], and
            what turns the tokens of v, b and dy, chunk by chunk, and those of one chunk of c, dv
            (or dc) and db; None for what is not there.
    """
    a, v, b, c, dy, starts, dfinal = inputs
    da, dv, db, dc, dlocal, dprevious = outputs
    decay, kept, before, terms, turned_v, turned_b, turned_dy, turned_c, turned_dv, turned_db = (
        scratch
    )
    step = pl.program_id(TIME_AXIS)
    tile = plan.tiles - 1 - step
    whole, ragged = _chunks(plan, tile)
    decay[...] = a[0].astype(jnp.float32)

    @pl.when(step == 0)
    def _():
        kept[...] = jnp.zeros_like(kept)
        if dfinal is not None:
            kept[0] = dfinal[0]

    def part(turned, index):
        return None if turned is None else turned.at[index]

    def readers(index, base):
        """Of v, b and dy, which both loops read, and which stay as `recompute` has turned them."""
        pairs = ((v, turned_v), (b, turned_b), (dy, turned_dy))
        return (reader(ref, part(turned, index), base) for ref, turned in pairs)

    def recompute(count: int, index, states: States) -> States:
        """States before each token of a chunk, from left to right."""
        base = _first_token(plan, index)
        v_at, b_at, dy_at = readers(index, base)
        turn(v, part(turned_v, index), base, count)
        turn(b, part(turned_b, index), base, count)
        if c is not None:
            # The gate's gradient needs the state behind the token: here it is.
            turn(dy, part(turned_dy, index), base, count)
            put_dc, finish_dc = writer(dc, turned_dv, base, count)
        for row in range(count):
            i = base + row
            for k, state in enumerate(states):
                before[k, i] = state
            u = v_at(row) if b is None else b_at(row) * v_at(row)
            states = _advance(decay, u, i, states)
            if c is not None:
                put_dc(row, dy_at(row) * functools.reduce(jnp.add, states))
            token = tile * plan.tile + base
            states = _hand_over(states, _inside(plan, row, token))
        if c is not None:
            finish_dc()
        return states

    def pull_back(count: int, index, states: States) -> States:
        """Cotangents of a chunk, from right to left."""
        base = _first_token(plan, index)
        v_at, b_at, dy_at = readers(index, base)
        put_dv, finish_dv = writer(dv, turned_dv, base, count)
        if c is None:
            turn(dy, part(turned_dy, index), base, count)
        else:
            turn(c, turned_c, base, count)
            c_at = reader(c, turned_c, base)
            put_db, finish_db = writer(db, turned_db, base, count)
        for row in reversed(range(count)):
            i = base + row
            token = tile * plan.tile + base
            states = _hand_over(states, _inside(plan, row, token))
            dout = dy_at(row)
            dx = dout if c is None else c_at(row) * dout
            mu = dx + states[0]
            s = mu if len(states) == 1 else mu + states[1]
            products = s * before[0, i]
            if len(states) == 2:
                products = products + mu * before[1, i]
            parts = (products[n : n + SUBLANES] for n in range(0, plan.features, SUBLANES))
            terms[pl.ds(row * TERM_STRIDE, SUBLANES), :] = functools.reduce(jnp.add, parts)
            if b is None:
                put_dv(row, s)
            else:
                put_dv(row, s * b_at(row) + dout)
                put_db(row, s * v_at(row))
            row_decay = decay[pl.ds(i, 1), :]
            states = (row_decay * mu, *(row_decay * q for q in states[1:]))
        finish_dv()
        if c is not None:
            finish_db()
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
