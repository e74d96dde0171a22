"""Attention whose memory is linear in the sequence length, forward and backward.

Whatever attends a few queries against a few keys under a mask, it is given here as `attend`, never
sees a T x T array:

- a window is cut into query blocks, and every block is attended, as one more batch entry, against
  its own keys and those that precede it within the window;
- full attention walks over chunks of queries, rematerialised in the backward pass.

The queries are the last T of the S keys' tokens. `start` is the place of the first key in the
sequence, which may be known to the device alone: keys before place 0 are seen by no query.

Symbols: B batch, T queries, S keys, N query heads, Nkv key/value heads, Dh features per head.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
Start = int | jax.Array

# Queries attended at once. Larger chunks hold more logits (chunk x keys per head), smaller ones
# make matrices that no longer fill a core.
_QUERY_CHUNK = 512
# Where most keys lie before the queries, chunks are shorter in proportion, so that the part of a
# sequence needs its part of the memory; but no shorter than this.
_SHORTEST_CHUNK = 128
# Query blocks of a window are no shorter than this: tiny matrices cost more than masked entries.
_SHORTEST_BLOCK = 16
# Full attention splits the queries into this many bands, each seeing only the keys up to its end,
# which saves 3/8 of the arithmetic of a plain masked product at the cost of four traced bodies.
_CAUSAL_BANDS = 4


def causal(q, k, v, window, segment_ids, attend: Attend, start: Start = 0) -> jax.Array:
    """Attend the last T of S tokens against all of them that the window can reach."""
    queries, keys = q.shape[1], k.shape[1]
    if window is not None:
        reach = min(keys, queries + window - 1)
        k, v = k[:, keys - reach :], v[:, keys - reach :]
        segment_ids = None if segment_ids is None else segment_ids[:, keys - reach :]
        start, keys = start + keys - reach, reach
    before = keys - queries
    # Bands save part of a square, which is little of what the queries see of keys before it.
    bands = _CAUSAL_BANDS if queries >= max(_CAUSAL_BANDS * _QUERY_CHUNK, before) else 1
    chunk = max(_SHORTEST_CHUNK, min(_QUERY_CHUNK, 2 * queries * _QUERY_CHUNK // keys))
    ends = [queries * (band + 1) // bands for band in range(bands)]
    outputs = []
    for begin, end in zip([0, *ends], ends, strict=False):
        seen = before + end
        outputs.append(
            query_chunks(
                q[:, begin:end],
                k[:, :seen],
                v[:, :seen],
                start + jnp.arange(before + begin, seen)[None],
                start + jnp.arange(seen)[None],
                None if segment_ids is None else segment_ids[:, before + begin : seen],
                None if segment_ids is None else segment_ids[:, :seen],
                window,
                attend,
                chunk,
            )
        )
    return outputs[0] if bands == 1 else jnp.concatenate(outputs, axis=1)


def blocks(q, k, v, window: int, segment_ids, attend: Attend, start: Start = 0) -> jax.Array:
    """Fold blocks of queries into the batch, each with the keys that its window reaches."""
    batch, queries = q.shape[:2]
    before = k.shape[1] - queries
    # Blocks of half a window meet 1.5 windows of keys, where whole ones would meet 2; still smaller
    # ones would save little more and copy every key more often.
    size = min(max(window // 2, _SHORTEST_BLOCK), _QUERY_CHUNK)
    previous = -(-window // size)  # blocks of keys before a query's own
    per_step = max(1, _QUERY_CHUNK // size)  # blocks attended at once
    steps = -(-queries // (size * per_step))
    per_step = -(-queries // (size * steps))  # the same number of steps with the least padding
    count = steps * per_step
    lead, tail = previous * size - before, count * size - queries

    def query_blocks(x):
        x = _pad_time(x, 0, tail)
        x = x.reshape(batch, steps, per_step, size, *x.shape[2:])
        return jnp.moveaxis(x, 0, 2)

    def key_blocks(x):
        # Tokens older than the first query's reach are dropped, missing ones filled in.
        x = _pad_time(x, lead, tail) if lead >= 0 else _pad_time(x[:, -lead:], 0, tail)
        x = x.reshape(batch, count + previous, size, *x.shape[2:])
        x = jnp.concatenate([x[:, i : i + count] for i in range(previous + 1)], axis=2)
        return jnp.moveaxis(x.reshape(batch, steps, per_step, *x.shape[2:]), 0, 2)

    @jax.vmap
    def attend_block(first, q, k, v, query_segments, key_segments):
        query_index = (first + jnp.arange(size))[None]
        key_index = (first + jnp.arange(-previous * size, size))[None]
        mask = visible(query_index, key_index, query_segments, key_segments, window)
        return attend(q, k, v, mask)

    def attend_step(step):
        return attend_block(*step)

    query_segments = key_segments = None
    if segment_ids is not None:
        query_segments, key_segments = (
            query_blocks(segment_ids[:, before:]),
            key_blocks(segment_ids),
        )
    first = start + before + size * jnp.arange(count).reshape(steps, per_step)
    xs = (first, query_blocks(q), key_blocks(k), key_blocks(v), query_segments, key_segments)
    if steps == 1:
        out = attend_block(*jax.tree.map(lambda x: x[0], xs))[None]
    else:
        # Without the checkpoint the loop would save the weights of every step.
        out = jax.lax.map(jax.checkpoint(attend_step), xs)
    out = jnp.moveaxis(out, 2, 0)  # [B, steps, per_step, size, N, Dh]
    return out.reshape(batch, count * size, *q.shape[2:])[:, :queries]


def realigned(q, k, v, start: Start, attend: Callable[..., jax.Array]) -> jax.Array:
    """Attend as plain causal attention of S queries to S keys, for kernels that know no other.

    Keys before place 0 change places with the tokens, so that these see nothing else than before;
    S - T queries are made up, and what they see is thrown away.
    """
    queries, keys = q.shape[1], k.shape[1]
    missing = jnp.clip(-start, 0, keys - queries)
    first = keys - queries - missing  # place of the first query among the keys

    def earlier(x: jax.Array, lead: int) -> jax.Array:
        x = _pad_time(x, lead, keys - queries)
        return jax.lax.dynamic_slice_in_dim(x, missing, keys, axis=1)

    out = attend(earlier(q, keys - queries), earlier(k, 0), earlier(v, 0))
    return jax.lax.dynamic_slice_in_dim(out, first, queries, axis=1)


def query_chunks(
    q,
    k,
    v,
    query_index,
    key_index,
    query_segments,
    key_segments,
    window,
    attend: Attend,
    chunk: int = _QUERY_CHUNK,
) -> jax.Array:
    """Attend chunk after chunk of queries, so that only one chunk's logits exist at a time.

    Keys and values are given to `attend` as they are: they may be in parts, whose places and
    segments follow one another.
    """

    def attend_chunk(part):
        q, query_index, query_segments = part
        mask = visible(query_index, key_index, query_segments, key_segments, window)
        return attend(q, k, v, mask)

    length = q.shape[1]
    chunks = -(-length // chunk)
    # Without the checkpoint the backward pass would find every chunk's weights: T x S after all.
    if chunks > 1 or key_index.shape[1] > 2 * _QUERY_CHUNK:
        attend_chunk = jax.checkpoint(attend_chunk)
    if chunks == 1:
        return attend_chunk((q, query_index, query_segments))
    size = -(-length // chunks)

    def split(x):
        x = _pad_time(x, 0, chunks * size - length)
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, size, *x.shape[2:]), 1, 0)

    out = jax.lax.map(attend_chunk, jax.tree.map(split, (q, query_index, query_segments)))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], -1, *q.shape[2:])[:, :length]


def visible(query_index, key_index, query_segments, key_segments, window) -> jax.Array:
    """Which key each query sees, [B or 1, 1, T, S] bool, from places in the stream."""
    query_index, key_index = query_index[:, None, :, None], key_index[:, None, None, :]
    mask = (key_index >= 0) & (key_index <= query_index)
    if window is not None:
        mask &= key_index > query_index - window
    if query_segments is not None:
        mask &= query_segments[:, None, :, None] == key_segments[:, None, None, :]
    return mask


def _pad_time(x: jax.Array, before: int, after: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (before, after)) + ((0, 0),) * (x.ndim - 2))
