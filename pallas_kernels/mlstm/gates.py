"""The gates of an mLSTM as its kernels take them: weights of tokens within a chunk and beyond it.

A chunk of L tokens writes columns j and reads rows i. With D_ij = log f_{j+1} + ... + log f_i, the
stabilizer m_i of a row, M the stabilizer of the memory before a chunk and M' of that after it:

    A_ij = exp(D_ij + log i_j - m_i)      weight of column j in row i, j <= i
    g_i  = exp(D_i,start + M - m_i)       weight of the memory before the chunk in row i
    a_j  = exp(D_end,j + log i_j - M')    weight of column j in the memory after the chunk
    c    = exp(D_end,start + M - M')      weight of the memory before the chunk in that after it

All are 0 across a reset (log f = -inf). D_ij is a difference of prefix sums, which would lose what
is left of a long sum: every number is therefore parted into a multiple of 2^-7, whose sums and
differences float32 has without rounding, and a small rest. For that, log f counts as at least
-2^17 / L: a weight of e^-256 or less, which only input gates that far apart could show.

All the maths is in float32 and costs a few passes over arrays [B, T, H].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mlstm.stabilized import finite, last_maximum, lower_bound, shift, sum_after
from pallas_kernels.padding import fill_up

Array = jax.Array

# Rows of `Gates.rows`, by token: of A, as exp((ROW_HIGH_i - COLUMN_HIGH_j) + (ROW_LOW_i -
# COLUMN_LOW_j)) for BEGIN_i <= j <= i; the place of the document's first token in the chunk, 0 if
# that came before; g; a; and what |d| is divided by at least.
ROW_HIGH, ROW_LOW, COLUMN_HIGH, COLUMN_LOW, BEGIN, RECALL, KEPT, FLOOR = range(8)
# Rows of the cotangents that a kernel returns: of log A, summed over the columns before each row
# (with that of log g), and over the rows after each column; of its diagonal; of log a.
D_ROW, D_COLUMN, D_OWN, D_KEPT = range(4)

_PARTS = 2.0**7  # Into how many of them 1 is divided.
_LONGEST_SUM = 2.0**17  # 2^24 of these parts, as many as float32 counts.


class Gates(NamedTuple):
    """What a kernel takes, and what their gradient needs.

    Attributes:
        rows: [B, H, N, 8, L], see above.
        carry: c, [B, H, N].
        stabilizer: after the last chunk, [B, H].
        documents: resets so far in the chunk, [B, H, N, L].
        winner: one-hot [B, H, N, L] of the column that a chunk's stabilizer comes from; zeros: it
            was there before.
    """

    rows: Array
    carry: Array
    stabilizer: Array
    documents: Array
    winner: Array


def prepare(
    log_i: Array,
    log_f: Array,
    stabilizer: Array,
    *,
    chunk: int,
    stabilized: bool,
    normalized: bool,
    q_dim: int,
) -> Gates:
    """Return the weights of a sequence's tokens.

    Args:
        log_i: logarithm of the input gate [B, T, H], float32; T need not be a multiple of `chunk`.
        log_f: logarithm of the forget gate [B, T, H], float32, at most 0; -inf is a reset.
        stabilizer: of the memory before the first token [B, H], float32.
        chunk: L.
        stabilized: whether the stabilizers follow the gates, or stay 0.
        normalized: whether the floor of the denominator is exp(-m), or the whole denominator 1.
        q_dim: Dk, by whose square root the floor is larger so that queries need no factor.
    """
    log_i, log_f = _cut(log_i, chunk, -jnp.inf), _cut(log_f, chunk, 0.0)
    resets = jnp.isneginf(log_f)
    documents = jnp.cumsum(resets, axis=-1)
    first, last = documents == 0, documents == documents[..., -1:]
    log_f = jnp.where(resets, 0, jnp.maximum(log_f, -_LONGEST_SUM / chunk))
    high, low = (jnp.cumsum(x, axis=-1) for x in _part(log_f))
    before = high + low
    after = jnp.where(last, sum_after(log_f), -jnp.inf)
    whole = jnp.where(first[..., -1], before[..., -1], -jnp.inf)
    places = jnp.arange(chunk, dtype=jnp.float32)
    begin = lax.cummax(jnp.where(resets, places, 0), axis=resets.ndim - 1)

    m = jnp.zeros_like(log_i)
    ends = jnp.zeros((*log_i.shape[:2], log_i.shape[2] + 1), log_i.dtype)
    winner = jnp.zeros_like(log_i)
    if stabilized:
        written = after + log_i
        newest = jnp.max(written, axis=-1)
        ends = _stabilizers(stabilizer, whole, newest)
        winner = jnp.where((newest >= whole + ends[..., :-1])[..., None], last_maximum(written), 0)
        m = before + within_documents(jnp.maximum, places - begin, log_i - before)
        m = jnp.maximum(m, jnp.where(first, before + ends[..., :-1, None], -jnp.inf))
        m = jnp.round(finite(m) * _PARTS) / _PARTS
    start, end = ends[..., :-1], finite(ends[..., 1:])

    i_high, i_low = _part(log_i)
    recall = jnp.exp(jnp.where(first, before + (start[..., None] - m), -jnp.inf))
    kept = jnp.exp(after + (log_i - end[..., None]))
    floor = q_dim**0.5 * (lower_bound(m) if normalized else jnp.ones_like(m))
    rows = [high - m, low, high - i_high, low - i_low, begin]
    return Gates(
        jnp.stack([*rows, recall, kept, floor], axis=-2),
        jnp.exp(whole + (start - end)),
        ends[..., -1],
        documents,
        winner,
    )


def gradient(
    gates: Gates, drows: Array, dcarry: Array, dstabilizer: Array, time: int
) -> tuple[Array, Array, Array]:
    """Return the cotangents of log_i, log_f [B, T, H] and of the first stabilizer [B, H].

    Args:
        gates: from `prepare`.
        drows: what a kernel returns, [B, H, N, 4, L].
        dcarry: cotangent of log c, likewise, [B, H, N].
        dstabilizer: cotangent of the last stabilizer [B, H], which is a maximum: what it hands
            down arrives at the gates of the token that won, and of those since.
        time: T.
    """
    inherited = jnp.sum(gates.winner, axis=-1) == 0
    passed = lax.cumprod(inherited.astype(drows.dtype), axis=inherited.ndim - 1, reverse=True)
    dmaximum = dstabilizer[..., None] * shift(passed, -1, fill=1)

    drows = jnp.moveaxis(drows, -2, 0)
    kept = drows[D_KEPT] + gates.winner * dmaximum[..., None]
    dlog_i = drows[D_COLUMN] + drows[D_OWN] + kept
    dlog_f = drows[D_ROW] - drows[D_COLUMN]
    dlog_f = within_documents(jnp.add, _later_in_document(gates.documents), dlog_f, reverse=True)
    dlog_f += jnp.cumsum(kept, axis=-1) - kept
    whole = dcarry + jnp.where(inherited, dmaximum, 0)
    dlog_f += jnp.where(gates.documents == 0, whole[..., None], 0)
    dfirst = dstabilizer * passed[..., 0]
    return _join(dlog_i, time), _join(dlog_f, time), dfirst


def within_documents(operation, reach: Array, x: Array, *, reverse: bool = False) -> Array:
    """Return the running `operation` over the last axis of x, begun anew with every document.

    In steps of 1, 2, 4, ...: each is one pass over whole arrays, where the slices of a scan by
    halves would leave most lanes of a TPU without work.

    Args:
        operation: of two arrays, associative.
        reach: how many numbers before one (after it, in `reverse`) belong to its document.
        x: of the same shape.
        reverse: from the last number to the first.
    """
    step = 1
    while step < x.shape[-1]:
        other = shift(x, -step if reverse else step)
        x = jnp.where(reach >= step, operation(x, other), x)
        step *= 2
    return x


def _later_in_document(documents: Array) -> Array:
    """How many numbers after each are of its document, from the documents' numbers [..., L]."""
    last, size = documents.ndim - 1, documents.shape[-1]
    places = jnp.arange(size)
    ends = documents != shift(documents, -1, fill=-1)
    return lax.cummin(jnp.where(ends, places, size), axis=last, reverse=True) - places


def _stabilizers(first: Array, whole: Array, newest: Array) -> Array:
    """M_k = max(whole_k + M_{k-1}, newest_k) from M_0 = first [B, H], all of them [B, H, N + 1]."""

    def combine(left, right):
        return left[0] + right[0], jnp.maximum(right[0] + left[1], right[1])

    decay, maximum = lax.associative_scan(combine, (whole, newest), axis=whole.ndim - 1)
    first = first[..., None]
    return jnp.concatenate([first, jnp.maximum(decay + first, maximum)], axis=-1)


def _part(x: Array) -> tuple[Array, Array]:
    """Return the nearest multiple of 2^-7, and the rest; of what no weight can show, no rest."""
    shown = jnp.where(jnp.abs(x) < 2.0**23, x, 0)
    high = jnp.round(shown * _PARTS) / _PARTS
    return jnp.where(shown == x, high, x), shown - high


def _cut(x: Array, chunk: int, fill: float) -> Array:
    """[B, T, H] -> [B, H, N, L]."""
    x = fill_up(x, {1: chunk}, fill)
    return jnp.moveaxis(x, 1, 2).reshape(x.shape[0], x.shape[2], -1, chunk)


def _join(x: Array, time: int) -> Array:
    """Undo `_cut`."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], -1), 1, 2)[:, :time]
