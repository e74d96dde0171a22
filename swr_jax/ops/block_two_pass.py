"""Block two-pass evaluation of windowed linear recurrences in plain JAX (`implementation="xla"`).

Notation, after the paper (arXiv 2512.13921); every array has the axes [B, n, R, K, G, D]:

    B, n, R     batch, block, row (token) within its block
    K, G, D     gate head, head within the gate head's group (K * G = H), feature
    a           decay, D = 1
    f           input; given as a tuple of *factors* whose product it is (b and v, say), so that no
                product is ever written to memory
    p           carry-in of a block: the state before its first row
    C, V        product of a block's decays, and the last state reached from p = 0, the *carrier*
    q           the carry-in of the reversed recurrence that the gradient is

The two primitives are `reduce_block` (C and V of each block) and `exclusive_states` (the state
*before* each row). Both unroll 8 rows in such a way that XLA makes of each one loop which reads
its inputs once and keeps every intermediate in registers: 8 multiply-adds an element, which is
less than the memory traffic costs. What such a loop returns goes through `materialised`, or XLA
would fuse it, and do it again, in each element of whatever reads it. Longer blocks are cut into
sub-blocks of 8 whose carriers are solved by the same functions, so the exact recurrence over T
tokens is log8(T) levels.

Nothing here takes a logarithm or divides: a = 0 is exact. What lies outside the window never enters
the arithmetic of a token, not even as NaN; another segment inside the window enters as 0 times a
finite number.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
Factors = tuple[Array, ...]

# Rows that one fused loop solves. Work per element grows with it, passes over memory shrink.
ROWS = 8
# Features (a power of two) that one fused loop sums: XLA's own reduction is slower for so few.
_FEW_FEATURES = 32


def fold(x: Array, rows: int, groups: int) -> Array:
    """[B, T, heads (, D)] -> [B, T / rows blocks, rows, groups, heads / groups, D or 1]."""
    return x.reshape(x.shape[0], -1, rows, groups, x.shape[2] // groups, *(x.shape[3:] or (1,)))


def materialised(x):
    """Return x (any pytree) such that XLA computes it once and keeps it."""
    return lax.optimization_barrier(x)


def _row(x: Array, j: int, dtype: jnp.dtype) -> Array:
    return lax.index_in_dim(x, j, axis=2, keepdims=True).astype(dtype)


def _block_decay(a: Array, dtype: jnp.dtype) -> Array:
    """Return C. Neighbours first: products of decays close to 1 so drop least in rounding."""
    rows = [_row(a, j, dtype) for j in range(a.shape[2])]
    while len(rows) > 1:
        pairs = len(rows) // 2
        products = [rows[2 * i] * rows[2 * i + 1] for i in range(pairs)]
        rows = products + rows[2 * pairs :]
    return rows[0]


def _advance(a: Array, factors: Factors, h: Array, j: int) -> Array:
    """Return the state after row j, given h, the state before it: a_j h + f_j."""
    h = _row(a, j, h.dtype) * h
    if factors:
        h = h + functools.reduce(jnp.multiply, (_row(f, j, h.dtype) for f in factors))
    return h


def _order(rows: int, reverse: bool) -> range:
    return range(rows - 1, -1, -1) if reverse else range(rows)


def _split(x: Array, rows: int, pad_value: float) -> Array:
    """Cut blocks [B, n, R, ...] into sub-blocks [B, n * m, rows, ...], padding each block's end."""
    pad = -x.shape[2] % rows
    if pad:
        x = lax.pad(
            x,
            jnp.asarray(pad_value, x.dtype),
            [(0, pad if i == 2 else 0, 0) for i in range(x.ndim)],
        )
    return x.reshape(x.shape[0], -1, rows, *x.shape[3:])


def _split_block(a: Array, factors: Factors) -> tuple[Array, Factors]:
    # Padding rows have a = 1, f = 0: they hand every state on unchanged, in either direction.
    return _split(a, ROWS, 1.0), tuple(_split(f, ROWS, 0.0) for f in factors)


def reduce_block(a: Array, factors: Factors, *, dtype: jnp.dtype, reverse: bool = False):
    """Return C and V of every block.

    Args:
        a: decays [B, n, R, K, G, 1].
        factors: arrays that broadcast to [B, n, R, K, G, D]; their product is the input.
        dtype: dtype of the maths and of the results.
        reverse: run from the last row to the first.

    Returns:
        C [B, n, 1, K, G, 1] and V [B, n, 1, K, G, D].
    """
    blocks, rows = a.shape[1], a.shape[2]
    if rows > ROWS:
        sub_a, sub_factors = _split_block(a, factors)
        c, v = reduce_block(sub_a, sub_factors, dtype=dtype, reverse=reverse)
        c, v = (x.reshape(x.shape[0], blocks, -1, *x.shape[3:]) for x in (c, v))
        return reduce_block(c, (v,), dtype=dtype, reverse=reverse)
    order = _order(rows, reverse)
    c = _block_decay(a, dtype)
    first = functools.reduce(jnp.multiply, (_row(f, order[0], dtype) for f in factors))
    v = functools.reduce(lambda h, j: _advance(a, factors, h, j), order[1:], first)
    return materialised((c, v))


def exclusive_states(a: Array, factors: Factors, carry: Array, *, reverse: bool = False) -> Array:
    """Return the state before each row, starting every block from its carry-in.

    Args:
        a: decays [B, n, R, K, G, 1].
        factors: arrays that broadcast to [B, n, R, K, G, D]; their product is the input, and no
            factor at all means an input of zero.
        carry: carry-in [B, n, 1, K, G, D]; its dtype is that of the maths.
        reverse: run from the last row to the first; the state before a row is then the one that
            comes from its right.

    Returns:
        States [B, n, R, K, G, D], dtype of `carry`.
    """
    rows = a.shape[2]
    if rows > ROWS:
        blocks = a.shape[1]
        sub_a, sub_factors = _split_block(a, factors)
        if factors:
            c, v = reduce_block(sub_a, sub_factors, dtype=carry.dtype, reverse=reverse)
            v = (v.reshape(v.shape[0], blocks, -1, *v.shape[3:]),)
        else:
            c, v = materialised(_block_decay(sub_a, carry.dtype)), ()
        c = c.reshape(c.shape[0], blocks, -1, *c.shape[3:])
        carries = materialised(exclusive_states(c, v, carry, reverse=reverse))
        carries = carries.reshape(carries.shape[0], -1, 1, *carries.shape[3:])
        states = exclusive_states(sub_a, sub_factors, carries, reverse=reverse)
        states = states.reshape(states.shape[0], blocks, -1, *states.shape[3:])
        return states[:, :, :rows]
    row = lax.broadcasted_iota(jnp.int32, (1, 1, rows, 1, 1, 1), 2)
    # Every row runs over all the rows of its block and keeps what it has once its turn is past.
    states = jnp.broadcast_to(carry, (*a.shape[:2], rows, *carry.shape[3:]))
    for j in _order(rows, reverse):
        keep = (row < j) if reverse else (row > j)
        states = jnp.where(keep, _advance(a, factors, states, j), states)
    return states


def carry_in(
    c: Array, v: Array, previous: Array | None, local: Array | None, *, lookback: int
) -> Array | None:
    """Return what enters each block: the carriers of the `lookback` blocks before it, decayed.

    It is the first `lookback` terms of the Neumann series of the carrier system (maths: p_t =
    V_{t-1} + C_{t-1} V_{t-2} + C_{t-1} C_{t-2} V_{t-3} + ...), evaluated in Horner's way.

    Args:
        c, v: C [B, n, 1, K, G, 1] and V [B, n, 1, K, G, D] of every block.
        previous: carriers [B, lookback, 1, K, G, D] of the blocks before the first one, the most
            recent last, each decayed up to the first row; None for zero.
        local: state [B, 1, 1, K, G, D] that the first block has reached already; None for zero.
        lookback: how many previous blocks a block sees.

    Returns:
        [B, n, 1, K, G, D], or None where it is zero throughout.
    """
    blocks = v.shape[1]
    carry = None
    if local is not None:
        v = _add_to_first(v, c[:, :1] * local)
    if lookback and (blocks > 1 or previous is not None):
        if previous is None:
            previous = jnp.zeros_like(v[:, :1])
        before = previous.shape[1]
        v = jnp.concatenate([previous, v], axis=1)[:, :-1]
        c = jnp.concatenate([jnp.ones_like(c[:, :1])] * before + [c], axis=1)[:, :-1]

        def shift(x: Array) -> Array:
            return jnp.concatenate([jnp.zeros_like(x[:, :1]), x[:, :-1]], axis=1)

        # carry[t] is what enters the block after entry t.
        carry = lax.fori_loop(1, min(lookback, v.shape[1]), lambda _, p: v + c * shift(p), v)
        carry = carry[:, before - 1 :]
    if local is not None:
        if carry is None:
            carry = jnp.zeros_like(v)
        carry = _add_to_first(carry, local)
    return carry


def _add_to_first(x: Array, first: Array) -> Array:
    # Not a scatter: with a single block, jaxlib 0.11.2 cannot compile that under shard_map.
    return jnp.concatenate([x[:, :1] + first, x[:, 1:]], axis=1)


def _sum_to(x: Array, like: Array) -> Array:
    """Sum x over the axes that `like` was broadcast along, and cast to its dtype."""
    axes = [i for i in range(x.ndim) if like.shape[i] == 1 and x.shape[i] != 1]
    return jnp.sum(x, axis=axes, keepdims=True).astype(like.dtype)


def _sum_features(x: Array) -> Array:
    """Sum an array that is kept over its last axis, which stays."""
    features = x.shape[-1]
    if features > _FEW_FEATURES or features & (features - 1):
        return jnp.sum(x, axis=-1, keepdims=True)
    while x.shape[-1] > 1:
        left, right = jnp.split(x, 2, axis=-1)
        x = left + right
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def block_two_pass(
    lookback: int,
    dtype: jnp.dtype,
    a: Array,
    v: Array,
    gates: tuple[Array, Array] | None,
    previous: Array | None,
    local: Array | None,
) -> tuple[Array, Array, Array]:
    """Return the recurrence's output and every block's C and V.

    Args:
        lookback: previous blocks that a block sees.
        dtype: dtype of the maths.
        a: decays [B, n, R, K, G, 1].
        v: inputs [B, n, R, K, G, D].
        gates: None for the plain recurrence, x = SWR(a, v); or (b, c), each [B, n, R, K, 1, D],
            for the gated one, x = SWR(a, b v) c + v.
        previous, local: initial state, as `carry_in` takes it.

    Returns:
        x [B, n, R, K, G, D] in v's dtype; C [B, n, 1, K, G, 1] and V [B, n, 1, K, G, D] in
        `dtype`.
    """
    return _forward(lookback, dtype, a, v, gates, previous, local)[0]


def _forward(lookback, dtype, a, v, gates, previous, local):
    factors = (v,) if gates is None else (gates[0], v)
    block_c, block_v = reduce_block(a, factors, dtype=dtype)
    carry = carry_in(block_c, block_v, previous, local, lookback=lookback)
    carry = jnp.zeros_like(block_v) if carry is None else materialised(carry)
    x = a.astype(dtype) * exclusive_states(a, factors, carry)
    x = x + functools.reduce(jnp.multiply, (f.astype(dtype) for f in factors))
    if gates is not None:
        x = x * gates[1].astype(dtype) + v.astype(dtype)
    # With blocks of 16 the carriers are a sixteenth of x: worth keeping, to save a pass over it.
    residuals = (a, v, gates, previous, local, block_c, block_v)
    return (x.astype(v.dtype), block_c, block_v), residuals


def _backward(lookback, dtype, residuals, cotangents):
    """Gradient of `block_two_pass`: the same recurrence from right to left.

    With dx the cotangent of x, s_i what reaches row i from its right, h_i the state after row i and
    p, q a block's carry-in from the left and from the right (the cotangent of its carrier V):

        s_{i-1} = a_i (s_i + dx_i),   s_last = q,   df_i = s_i + dx_i
        dp      = s before the first row, for q = 0;   (dC, dV) from dp through `carry_in`
        da_i    = sum_d df_i h_{i-1}  +  (product of the block's other decays) (dC - sum_d q p)

    What passes the whole block, p to q, is in df_i h_{i-1}, but in no window, unless dC says so.
    """
    a, v, gates, previous, local, block_c, block_v = residuals
    dout, dc_outside, dv_outside = cotangents
    b, c = (None, None) if gates is None else gates
    factors = (v,) if gates is None else (b, v)
    dx = (dout,) if gates is None else (dout, c)

    carry, pull = jax.vjp(
        functools.partial(carry_in, lookback=lookback), block_c, block_v, previous, local
    )
    if carry is None:
        carry = jnp.zeros_like(block_v)
        dc, q, dprevious, dlocal = dc_outside, dv_outside, None, None
    else:
        carry = materialised(carry)
        _, dcarry = reduce_block(a, (*dx, a), dtype=dtype, reverse=True)
        dc, q, dprevious, dlocal = pull(dcarry)
        dc, q = materialised((dc + dc_outside, q + dv_outside))

    def whole(fs: Factors) -> Array:
        return functools.reduce(jnp.multiply, (f.astype(dtype) for f in fs))

    df = exclusive_states(a, (*dx, a), q, reverse=True) + whole(dx)
    before = exclusive_states(a, factors, carry)
    if gates is None:
        df = materialised(df)
        da = _sum_features(materialised(df * before))
    else:
        df, before = materialised((df, before))
        da = jnp.sum(df * before, axis=-1, keepdims=True)
    others = dc - jnp.sum(q * carry, axis=-1, keepdims=True)
    others = exclusive_states(a, (), others, reverse=True)
    others = materialised(others * exclusive_states(a, (), jnp.ones_like(block_c)))
    da = da + others

    if gates is None:
        return da.astype(a.dtype), df.astype(v.dtype), None, dprevious, dlocal
    dout = dout.astype(dtype)
    dv = df * b.astype(dtype) + dout
    db = _sum_to(df * v.astype(dtype), b)
    dgate = _sum_to(dout * (a.astype(dtype) * before + whole(factors)), c)
    return da.astype(a.dtype), dv.astype(v.dtype), (db, dgate), dprevious, dlocal


block_two_pass.defvjp(_forward, _backward)
