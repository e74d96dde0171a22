"""Chunkwise mLSTM in plain JAX (`implementation="xla"`) and its exact gradient.

Notation, after arXiv 2503.14376; the arrays of one chunk have the axes [B, H, L, ...]:

    L           tokens of a chunk; row i reads, column j <= i was written
    q, k, v     query (already scaled by Dk ** -0.5), key, value
    C, n, m     memory, normalizer, stabilizer: the state before the chunk
    D           log f_i + ... + log f_{j+1}, the log decay from column j to row i
    A, g        weight exp(D_ij + log i_j - m_i) of column j in row i, and of C in row i
    a, c        weight of column j, and of C, in the state after the chunk
    S           A * (q k^T), the scores
    d           sum_j S_ij + g_i q_i.n, the denominator; h = (S v + g q C) / max(|d|, exp(-m))
    dX          cotangent of X

log f = -inf is a forget gate of exactly 0: a document's first token. Weights across it are zeros,
and stay zero whatever finite number they meet. (A NaN is not finite: it reaches its neighbours.)

One `lax.scan` over the chunks writes the outputs. The backward pass repeats the states, keeps those
between the chunks, and walks over them from right to left: temporary memory is a state per chunk
and the L x L arrays of one chunk, and nothing is saved but the arguments.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mlstm.stabilized import finite, inner, last_maximum, lower_bound, sum_after

Array = jax.Array

# Full float32 products where a device would otherwise round the factors.
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)

# Sums of log f are gathered in two levels from this many tokens on.
_ROWS = 16


class Options(NamedTuple):
    """What the compiled program depends on.

    Attributes:
        chunk_size: tokens of a chunk.
        stabilized: whether m follows the gates (m_t = max(log f_t + m_{t-1}, log i_t)) or stays 0,
            which needs log i <= 0.
        normalized: whether outputs are divided by max(|d|, exp(-m)).
        dtype: dtype of the maths.
    """

    chunk_size: int
    stabilized: bool
    normalized: bool
    dtype: jnp.dtype


class State(NamedTuple):
    """C [B, H, Dk, Dv], n [B, H, Dk], m [B, H]: what they stand for is e^m C and e^m n."""

    memory: Array
    normalizer: Array
    stabilizer: Array


class _Chunk(NamedTuple):
    q: Array
    k: Array
    v: Array
    log_i: Array
    log_f: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def chunkwise(
    options: Options, q: Array, k: Array, v: Array, log_i: Array, log_f: Array, state: State
) -> tuple[Array, State]:
    """Return the outputs of an mLSTM and its state after the last token.

    Args:
        options: static.
        q, k: [B, T, H, Dk], any floating dtype.
        v: [B, T, H, Dv], any floating dtype.
        log_i: logarithm of the input gate [B, T, H], in the dtype of the maths.
        log_f: logarithm of the forget gate [B, T, H], at most 0, likewise.
        state: before the first token, likewise.

    Returns:
        h [B, T, H, Dv] in v's dtype, and the state in the dtype of the maths.
    """
    chunks = _cut(options, _Chunk(q, k, v, log_i, log_f))

    def body(state, chunk):
        chunk = _widen(options, chunk)
        rows = _read(options, chunk, state)
        outputs = (_einsum("bhij,bhjv->bhiv", rows.s, chunk.v) + rows.recalled) / rows.divisor
        return _advance(options, chunk, state)[0], outputs.astype(v.dtype)

    state, h = lax.scan(body, state, chunks)
    return _join(h, v.shape[1]), state


def _forward(options, q, k, v, log_i, log_f, state):
    arguments = (q, k, v, log_i, log_f, state)
    return chunkwise(options, *arguments), arguments


def _backward(options, arguments, cotangents):
    """Gradient of `chunkwise`: states from left to right, then everything else right to left.

    h does not depend on m, so that m counts as a constant wherever it only keeps numbers in range.
    The returned state depends on it: e^-m is a factor of both C and n, which adds -<dC, C> -
    <dn, n> to dm; and what m_t = max(log f_t + m_{t-1}, log i_t) hands down arrives at the gates of
    the token that won (the newest of equals) and of those since.
    """
    *arrays, state = arguments
    dh, dstate = cotangents
    chunks = _cut(options, _Chunk(*arrays))
    (dh,) = _cut(options, (dh,))

    def states(state, chunk):
        return _advance(options, _widen(options, chunk), state)[0], state

    final, before = lax.scan(states, state, chunks)
    if options.stabilized:
        dstate = dstate._replace(stabilizer=dstate.stabilizer - inner(dstate, final))
    else:
        dstate = dstate._replace(stabilizer=jnp.zeros_like(final.stabilizer))

    def body(dstate, inputs):
        chunk, state, dh = inputs
        wide = _widen(options, chunk)
        dstate, gradient = _chunk_gradient(options, wide, state, dh.astype(options.dtype), dstate)
        return dstate, jax.tree.map(lambda d, x: d.astype(x.dtype), gradient, chunk)

    dstate, gradients = lax.scan(body, dstate, (chunks, before, dh), reverse=True)
    dstate = dstate._replace(stabilizer=dstate.stabilizer + inner(dstate, state))
    time = arrays[0].shape[1]
    return (*(_join(x, time) for x in gradients), dstate)


chunkwise.defvjp(_forward, _backward)


# --- one chunk --------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """How the tokens of a chunk read it and the state before it."""

    a: Array  # A [B, H, L, L]
    g: Array  # [B, H, L, 1]
    scores: Array  # q k^T
    s: Array  # S
    recalled: Array  # g (q C), [B, H, L, Dv]
    recalled_sum: Array  # g (q n), [B, H, L, 1]
    divisor: Array  # max(|d|, exp(-m)), [B, H, L, 1]
    slope: Array  # derivative of the divisor by d: the sign of d above the floor, 0 on it


class _Decays(NamedTuple):
    """Sums of log f over the tokens of a chunk: each of numbers of one sign, so none cancels."""

    between: Array  # D [B, H, L, L]; above the diagonal without meaning
    before: Array  # from the chunk's start to each row, its own included, [B, H, L]
    after: Array  # from each column, its own not included, to the chunk's end, [B, H, L]


def _decays(log_f: Array) -> _Decays:
    return _Decays(span_sums(log_f), jnp.cumsum(log_f, axis=-1), sum_after(log_f))


def _read(options: Options, chunk: _Chunk, state: State) -> _Rows:
    """Return the weights with which each row reads the chunk's columns and the state before it."""
    decays, documents = _split(chunk.log_f)
    length = documents.shape[-1]
    seen = documents[..., :, None] == documents[..., None, :]
    seen &= jnp.tril(jnp.ones((length, length), bool))
    between = jnp.where(seen, decays.between, -jnp.inf)
    before = jnp.where(documents == 0, decays.before, -jnp.inf)

    m = jnp.zeros_like(chunk.log_i)
    if options.stabilized:
        newest = jnp.max(between + chunk.log_i[..., None, :], axis=-1)
        m = finite(jnp.maximum(before + state.stabilizer[..., None], newest))
    a = _exp(between + (chunk.log_i[..., None, :] - m[..., :, None]))
    g = _exp(before + (state.stabilizer[..., None] - m))[..., None]

    scores = _einsum("bhik,bhjk->bhij", chunk.q, chunk.k)
    s = _weigh(a, scores)
    recalled = _weigh(g, _einsum("bhik,bhkv->bhiv", chunk.q, state.memory))
    recalled_sum = _weigh(g, _einsum("bhik,bhk->bhi", chunk.q, state.normalizer)[..., None])
    if options.normalized:
        d = jnp.sum(s, axis=-1, keepdims=True) + recalled_sum
        floor = lower_bound(m)[..., None]
        divisor = jnp.maximum(jnp.abs(d), floor)
        slope = jnp.where(jnp.abs(d) > floor, jnp.sign(d), 0)
    else:
        divisor, slope = jnp.ones_like(g), jnp.zeros_like(g)
    return _Rows(a, g, scores, s, recalled, recalled_sum, divisor, slope)


class _Update(NamedTuple):
    """How the state after a chunk is made of the one before it and of the chunk's columns."""

    a: Array  # [B, H, L, 1]
    c: Array  # [B, H]
    winner: Array  # one-hot [B, H, L] of the column that m comes from; zeros: m was there before


def _advance(options: Options, chunk: _Chunk, state: State) -> tuple[State, _Update]:
    """Return the state after a chunk."""
    decays, documents = _split(chunk.log_f)
    last = documents[..., -1:]
    after = jnp.where(documents == last, decays.after, -jnp.inf)
    whole = jnp.where(last[..., 0] == 0, decays.before[..., -1], -jnp.inf)

    winner = jnp.zeros_like(chunk.log_i)
    m = safe = jnp.zeros_like(state.stabilizer)
    if options.stabilized:
        written, kept = after + chunk.log_i, whole + state.stabilizer
        newest = jnp.max(written, axis=-1)
        m = jnp.maximum(kept, newest)
        safe = finite(m)
        winner = jnp.where((newest >= kept)[..., None], last_maximum(written), 0)
    a = _exp(after + (chunk.log_i - safe[..., None]))[..., None]
    c = _exp(whole + (state.stabilizer - safe))

    keys = a * chunk.k
    memory = _weigh(c[..., None, None], state.memory)
    memory += _einsum("bhjk,bhjv->bhkv", keys, chunk.v)
    normalizer = _weigh(c[..., None], state.normalizer) + jnp.sum(keys, axis=-2)
    return State(memory, normalizer, m), _Update(a, c, winner)


def _chunk_gradient(
    options: Options, chunk: _Chunk, state: State, dh: Array, dstate: State
) -> tuple[State, _Chunk]:
    """Return the cotangents of the state before a chunk and of the chunk.

    Args:
        options: static.
        chunk: in the dtype of the maths, q scaled.
        state: before the chunk.
        dh: cotangent of its outputs [B, H, L, Dv].
        dstate: cotangent of the state after it, with m as a constant in C and n.
    """
    q, k, v = chunk[:3]
    rows = _read(options, chunk, state)
    update = _advance(options, chunk, state)[1]

    # Through h = (S v + g q C) / max(|d|, floor): to the numerator, and to d.
    dh = dh / rows.divisor
    ds = _einsum("bhiv,bhjv->bhij", dh, v)
    drecalled = jnp.sum(dh * rows.recalled, axis=-1, keepdims=True)
    dlog_a = _weigh(rows.s, ds)
    dd = -(jnp.sum(dlog_a, axis=-1, keepdims=True) + drecalled) / rows.divisor * rows.slope
    # Now the whole cotangents of log A and log g, to which S and the recalled are proportional.
    dlog_a += rows.s * dd
    dlog_g = (drecalled + dd * rows.recalled_sum)[..., 0]

    p = _weigh(rows.a, ds + dd)
    reads = rows.g * q
    dq = _einsum("bhij,bhjk->bhik", p, k)
    dq += _weigh(rows.g, _einsum("bhiv,bhkv->bhik", dh, state.memory))
    dq += _weigh(rows.g, dd * state.normalizer[..., None, :])
    dk = _einsum("bhij,bhik->bhjk", p, q)
    dv = _einsum("bhij,bhiv->bhjv", rows.s, dh)
    dmemory = _weigh(update.c[..., None, None], dstate.memory)
    dmemory += _einsum("bhik,bhiv->bhkv", reads, dh)
    dnormalizer = _weigh(update.c[..., None], dstate.normalizer) + jnp.sum(reads * dd, axis=-2)

    # Through the state after the chunk.
    written = _einsum("bhjv,bhkv->bhjk", v, dstate.memory) + dstate.normalizer[..., None, :]
    written = _weigh(update.a, written)
    dk += written
    dv += _weigh(update.a, _einsum("bhjk,bhkv->bhjv", k, dstate.memory))
    dlog_i = jnp.sum(written * k, axis=-1) + update.winner * dstate.stabilizer[..., None]
    inherited = jnp.sum(update.winner, axis=-1) == 0
    dm = jnp.where(inherited, dstate.stabilizer, 0)
    dlog_c = _weigh(update.c, inner(dstate, state)) + dm

    _, pull = jax.vjp(_decays, _split_log(chunk.log_f)[0])
    is_last = jnp.arange(dlog_g.shape[-1]) == dlog_g.shape[-1] - 1
    dbefore = dlog_g + jnp.where(is_last, dlog_c[..., None], 0)
    (dlog_f,) = pull(_Decays(dlog_a, dbefore, dlog_i))
    dlog_i = dlog_i + jnp.sum(dlog_a, axis=-2)
    gradient = _Chunk(dq * q.shape[-1] ** -0.5, dk, dv, dlog_i, dlog_f)
    return State(dmemory, dnormalizer, dm), gradient


def _split_log(log_f: Array) -> tuple[Array, Array]:
    """Part log f into its finite values (0 at a reset) and the resets so far, both [B, H, L]."""
    reset = jnp.isneginf(log_f)
    return jnp.where(reset, 0, log_f), jnp.cumsum(reset, axis=-1)


def _split(log_f: Array) -> tuple[_Decays, Array]:
    finite, documents = _split_log(log_f)
    return _decays(finite), documents


def span_sums(x: Array) -> Array:
    """Sum x over each span of tokens: [..., L] -> [..., L, L], x_{j+1} + ... + x_i at (i, j).

    Not a difference of prefix sums, which would round what has decayed long ago: every entry is a
    sum of its own terms, in blocks of tokens and blocks of blocks. Entries above the diagonal are
    without meaning.
    """
    length = x.shape[-1]
    if length <= _ROWS:
        token = jnp.arange(length)
        # Axes (row i, token l, column j): j < l <= i.
        inside = (token[:, None] > token)[None] & (token[:, None] >= token)[:, :, None]
        return _einsum("...l,ilj->...ij", x, inside.astype(x.dtype))
    pad = -length % _ROWS
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pad)]).reshape(*x.shape[:-1], -1, _ROWS)
    near = span_sums(x)  # [..., block, row, column]
    before = x[..., :1] + near[..., :, 0]  # from the block's start to a row
    after = near[..., -1, :]  # from a column to its block's end
    between = span_sums(before[..., -1])  # over whole blocks
    blocks = x.shape[-2]
    between = jnp.concatenate([jnp.zeros_like(between[..., :1, :]), between[..., :-1, :]], axis=-2)
    far = before[..., None, None] + between[..., :, None, :, None] + after[..., None, None, :, :]
    own = jnp.eye(blocks, dtype=bool)[:, None, :, None]
    sums = jnp.where(own, near[..., :, :, None, :], far)
    return sums.reshape(*x.shape[:-2], blocks * _ROWS, -1)[..., :length, :length]


# --- helpers ----------------------------------------------------------------------------------


def _exp(x: Array) -> Array:
    """exp of the logarithm of a weight, which only the rounding of enormous gates takes above 0."""
    return jnp.exp(jnp.minimum(x, 0))


def _weigh(weight: Array, x: Array) -> Array:
    """weight * x, where a weight of 0 makes 0 even of an x that overflowed."""
    return jnp.where(weight == 0, 0, weight * x)


def _widen(options: Options, chunk: _Chunk) -> _Chunk:
    """Cast a chunk to the dtype of the maths, and scale its queries."""
    chunk = jax.tree.map(lambda x: x.astype(options.dtype), chunk)
    return chunk._replace(q=chunk.q * chunk.q.shape[-1] ** -0.5)


def _cut(options: Options, arrays):
    """[B, T, H, ...] -> [T / L chunks, B, H, L, ...]; tokens past the end write and decay nothing.

    A sequence shorter than `chunk_size` is one chunk of its own length.
    """
    time = jax.tree.leaves(arrays)[0].shape[1]
    length = min(options.chunk_size, time)

    def cut(x: Array, fill: float = 0.0) -> Array:
        pad = -time % length
        if pad:
            widths = [(0, pad if axis == 1 else 0) for axis in range(x.ndim)]
            x = jnp.pad(x, widths, constant_values=fill)
        x = x.reshape(x.shape[0], -1, length, *x.shape[2:])
        return jnp.moveaxis(x, (1, 3), (0, 2))

    cuts = jax.tree.map(cut, arrays)
    if isinstance(arrays, _Chunk):
        cuts = cuts._replace(log_i=cut(arrays.log_i, -jnp.inf))
    return cuts


def _join(x: Array, time: int) -> Array:
    """Undo `_cut`."""
    x = jnp.moveaxis(x, (0, 2), (1, 3))
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :time]
