"""Softmax attention, causal and windowed, with memory linear in the sequence length.

The attention itself comes from libraries: `jax.nn.dot_product_attention` (XLA, cuDNN) and
`tokamax.dot_product_attention` (Pallas kernels). What is ours is the arrangement around them that
keeps long sequences from ever holding a T x T array, forward or backward:

- a window is cut into query blocks, and every block is attended, as one more batch entry, against
  its own keys and those that precede it within the window;
- full attention walks over chunks of queries, rematerialised in the backward pass.

Symbols: B batch, T queries, S keys, N query heads, Nkv key/value heads, Dh features per head.
"""

import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp

Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]

# Queries attended at once. Larger chunks hold more logits (chunk x keys per head), smaller ones
# make matrices that no longer fill a core.
_QUERY_CHUNK = 512
# Query blocks of a window are no shorter than this: tiny matrices cost more than masked entries.
_SHORTEST_BLOCK = 16
# Full attention splits the queries into this many bands, each seeing only the keys up to its end,
# which saves 3/8 of the arithmetic of a plain masked product at the cost of four traced bodies.
_CAUSAL_BANDS = 4


def sliding_window_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: int | None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Causal softmax attention in which query i sees keys i - window + 1 .. i.

    The queries are the last T of the S tokens that the keys and values describe; T = S is plain
    self-attention, T < S continues a sequence. Logits are scaled by Dh ** -0.5.

    Numerics: logits and softmax in float32, products accumulated in float32, weights cast to the
    dtype of `v` before they multiply it. Memory for logits is O(T * window) for a window and
    O(T) (times a fixed chunk of queries) for full attention, forward and backward.

    Args:
      q: queries [B, T, N, Dh]; float32, bfloat16 or float16.
      k: keys [B, S, Nkv, Dh], S >= T, dtype of `q`. Nkv divides N: each key/value head serves
        N / Nkv consecutive query heads (grouped-query attention, arXiv 2305.13245).
      v: values [B, S, Nkv, Dh], dtype of `q`.
      window: number of keys that a query sees, its own included, at least 1; None: all before it.
      segment_ids: [B, S] integers; tokens of different segments never see each other.
      implementation: None picks one: for bfloat16 and float16 on one GPU or TPU, or inside
        `jax.shard_map` on many, "tokamax" where it is installed and its kernels support the
        arguments, then "cudnn" on an NVIDIA GPU (Ampere or later) where T = S, Dh is a multiple of
        8 up to 128 and there are no segment_ids; else "xla", which the compiler can partition. A
        name is used as it is or fails, never replaced:
        "xla" (`jax.nn`), "cudnn" (`jax.nn` on an NVIDIA GPU), "tokamax" (its kernels on GPU and
        TPU, its chunked XLA path on CPU).

    Returns:
      [B, T, N, Dh], dtype of `q`.

    Raises:
      ValueError: wrong rank, sizes that disagree, a dtype that is not floating or not shared,
        window < 1, or an unknown implementation.
      NotImplementedError, RuntimeError or an ExceptionGroup of them: a named implementation does
        not run on this platform or with these arguments.
    """
    _validate(q, k, v, window, segment_ids, implementation)
    if window is not None and window >= k.shape[1]:
        window = None
    if implementation is not None:
        return _run(q, k, v, window, segment_ids, implementation)
    return _pick(q, k, v, window, segment_ids)[1]


def implementation_of(q: jax.ShapeDtypeStruct, *, window: int | None = None) -> str:
    """Return the implementation that `sliding_window_attention` picks for plain self-attention.

    Args:
      q: shape [B, T, N, Dh] and dtype of queries, keys and values.
      window: as there.
    """
    picked = []

    def run(q: jax.Array) -> jax.Array:
        name, out = _pick(q, q, q, window, None)
        picked.append(name)
        return out

    jax.eval_shape(run, q)
    return picked[0]


def cached_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    query_index: jax.Array,
    key_index: jax.Array,
    query_segment_ids: jax.Array,
    key_segment_ids: jax.Array,
    window: int | None,
) -> jax.Array:
    """Attend new tokens against a cache whose slots hold tokens in any order.

    Query t sees slot s if slot s is filled, is not younger than the query, is younger than
    query_index - window, and belongs to the same segment. Softmax in float32; queries are taken in
    chunks, so memory for logits is O(S) for a long prompt. XLA only: a decoding step is bound by
    reading the cache, which a plain matrix-vector product already does once.

    Args:
      q: queries [B, T, N, Dh].
      k: cached keys [B, S, Nkv, Dh], the queries' own included.
      v: cached values [B, S, Nkv, Dh].
      query_index: [B, T] int32, place of each query in its stream of tokens, from 0.
      key_index: [B, S] int32, place of the token in each slot; negative for an empty slot.
      query_segment_ids: [B, T] int32.
      key_segment_ids: [B, S] int32.
      window: number of keys that a query sees, its own included; None: all before it.

    Returns:
      [B, T, N, Dh], dtype of `q`.
    """
    return _query_chunks(
        q, k, v, query_index, key_index, query_segment_ids, key_segment_ids, window, _attend_xla
    )


def _pick(q, k, v, window, segment_ids) -> tuple[str, jax.Array]:
    """Return what the best implementation here computes, and its name."""
    for name in _kernels(q, k, segment_ids):
        try:
            return name, _run(q, k, v, window, segment_ids, name)
        except (RuntimeError, ExceptionGroup):
            # By tokamax where none of its kernels takes these shapes or this mask
            # (NotImplementedError is a RuntimeError), by JAX where the cuDNN library is missing.
            continue
    return "xla", _run(q, k, v, window, segment_ids, "xla")


def _run(q, k, v, window, segment_ids, implementation: str) -> jax.Array:
    """Call one implementation, through its own causal path where it has one for these arguments."""
    plain = segment_ids is None and q.shape[1] == k.shape[1]
    if implementation == "cudnn":
        if plain:
            size = None if window is None else (window - 1, 0)
            return jax.nn.dot_product_attention(
                q, k, v, is_causal=True, local_window_size=size, implementation="cudnn"
            )
        attend = _attend_cudnn
    elif implementation == "tokamax":
        # On TPU its kernel knows no window; the blocks below give it one.
        if plain and (window is None or jax.default_backend() == "gpu"):
            return _tokamax(q, k, v, is_causal=True, window=window)
        attend = _attend_tokamax
    else:
        attend = _attend_xla
    if window is None or q.shape[1] <= window:
        return _causal(q, k, v, window, segment_ids, attend)
    return _blocks(q, k, v, window, segment_ids, attend)


def _attend_xla(q, k, v, mask) -> jax.Array:
    dtype = q.dtype
    if dtype == jnp.float16 and jax.default_backend() != "gpu":
        # jax.nn asks for a float16 product accumulated in float32, which only GPUs have.
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla").astype(dtype)


def _attend_cudnn(q, k, v, mask) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")


def _attend_tokamax(q, k, v, mask) -> jax.Array:
    return _tokamax(q, k, v, mask=mask)


def _tokamax(q, k, v, *, mask=None, is_causal: bool = False, window: int | None = None):
    import tokamax  # heavy, and of no use to who runs recurrences only

    # Its quadratic "xla" is left out on purpose: ours does the same in linear memory.
    platform = jax.default_backend()
    if platform == "gpu":
        # On other GPUs Mosaic would run forward and then find that it has no backward.
        has_mosaic = jax.devices()[0].compute_capability in ("9.0", "10.0")
        implementation = ("mosaic", "triton") if has_mosaic else ("triton",)
    else:
        implementation = ("mosaic",) if platform == "tpu" else ("xla_chunked",)
    return tokamax.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        is_causal=is_causal,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )


def _kernels(q, k, segment_ids) -> tuple[str, ...]:
    """Name the attention kernels that may be better than XLA for these arguments, here and now."""
    if jax.default_backend() == "cpu" or q.dtype not in (jnp.bfloat16, jnp.float16):
        return ()  # their float32 products are not float32 everywhere
    # The compiler cannot split a kernel: outside shard_map it would gather its operands first.
    mesh = jax.sharding.get_abstract_mesh()
    if jax.device_count() > 1 and (mesh.empty or not mesh.are_all_axes_manual):
        return ()
    names = () if importlib.util.find_spec("tokamax") is None else ("tokamax",)
    # Any other mask than a causal window would have to be written out for cuDNN.
    plain = segment_ids is None and q.shape[1] == k.shape[1]
    features = q.shape[3]
    if plain and features % 8 == 0 and features <= 128 and _has_cudnn_kernels():
        names = (*names, "cudnn")
    return names


def _has_cudnn_kernels() -> bool:
    """Whether cuDNN has attention for the default device: an NVIDIA GPU from Ampere on."""
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", "")
    return (
        device.platform == "gpu"
        and capability.split(".")[0].isdigit()
        and (int(capability.split(".")[0]) >= 8)
    )


def _visible(query_index, key_index, query_segments, key_segments, window) -> jax.Array:
    """Which key each query sees, [B or 1, 1, T, S] bool, from places in the stream."""
    query_index, key_index = query_index[:, None, :, None], key_index[:, None, None, :]
    mask = (key_index >= 0) & (key_index <= query_index)
    if window is not None:
        mask &= key_index > query_index - window
    if query_segments is not None:
        mask &= query_segments[:, None, :, None] == key_segments[:, None, None, :]
    return mask


def _causal(q, k, v, window, segment_ids, attend: Attend) -> jax.Array:
    """Attend the last T of S tokens against all of them that the window can reach."""
    queries, keys = q.shape[1], k.shape[1]
    if window is not None:
        reach = min(keys, queries + window - 1)
        k, v = k[:, keys - reach :], v[:, keys - reach :]
        segment_ids = None if segment_ids is None else segment_ids[:, keys - reach :]
        keys = reach
    before = keys - queries
    bands = _CAUSAL_BANDS if queries >= _CAUSAL_BANDS * _QUERY_CHUNK else 1
    ends = [queries * (band + 1) // bands for band in range(bands)]
    outputs = []
    for start, end in zip([0, *ends], ends, strict=False):
        seen = before + end
        outputs.append(
            _query_chunks(
                q[:, start:end],
                k[:, :seen],
                v[:, :seen],
                jnp.arange(before + start, seen)[None],
                jnp.arange(seen)[None],
                None if segment_ids is None else segment_ids[:, before + start : seen],
                None if segment_ids is None else segment_ids[:, :seen],
                window,
                attend,
            )
        )
    return outputs[0] if bands == 1 else jnp.concatenate(outputs, axis=1)


def _query_chunks(
    q, k, v, query_index, key_index, query_segments, key_segments, window, attend: Attend
) -> jax.Array:
    """Attend chunk after chunk of queries, so that only one chunk's logits exist at a time."""

    def attend_chunk(chunk):
        q, query_index, query_segments = chunk
        mask = _visible(query_index, key_index, query_segments, key_segments, window)
        return attend(q, k, v, mask)

    length = q.shape[1]
    chunks = -(-length // _QUERY_CHUNK)
    if chunks == 1:
        return attend_chunk((q, query_index, query_segments))
    size = -(-length // chunks)

    def split(x):
        x = _pad_time(x, 0, chunks * size - length)
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, size, *x.shape[2:]), 1, 0)

    # Without the checkpoint the loop would save every chunk's weights: T x S after all.
    out = jax.lax.map(
        jax.checkpoint(attend_chunk), jax.tree.map(split, (q, query_index, query_segments))
    )
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], -1, *q.shape[2:])[:, :length]


def _blocks(q, k, v, window: int, segment_ids, attend: Attend) -> jax.Array:
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
        mask = _visible(query_index, key_index, query_segments, key_segments, window)
        return attend(q, k, v, mask)

    def attend_step(step):
        return attend_block(*step)

    query_segments = key_segments = None
    if segment_ids is not None:
        query_segments, key_segments = (
            query_blocks(segment_ids[:, before:]),
            key_blocks(segment_ids),
        )
    first = before + size * jnp.arange(count).reshape(steps, per_step)
    xs = (first, query_blocks(q), key_blocks(k), key_blocks(v), query_segments, key_segments)
    if steps == 1:
        out = attend_block(*jax.tree.map(lambda x: x[0], xs))[None]
    else:
        # Without the checkpoint the loop would save the weights of every step.
        out = jax.lax.map(jax.checkpoint(attend_step), xs)
    out = jnp.moveaxis(out, 2, 0)  # [B, steps, per_step, size, N, Dh]
    return out.reshape(batch, count * size, *q.shape[2:])[:, :queries]


def _pad_time(x: jax.Array, before: int, after: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (before, after)) + ((0, 0),) * (x.ndim - 2))


def _validate(q, k, v, window, segment_ids, implementation) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(
                f"{name} has shape {x.shape}; it must be [batch, time, heads, features]"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} has dtype {x.dtype}; it must be floating: cast it first")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {x.dtype} and q has {q.dtype}; they must agree")
        if 0 in x.shape:
            raise ValueError(f"{name} has shape {x.shape}; every size must be at least 1")
    if k.shape != v.shape:
        raise ValueError(f"v has shape {v.shape} and k has {k.shape}; they must agree")
    if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(
            f"k has shape {k.shape} and q has {q.shape}; batch and features per head must agree"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"k has {k.shape[2]} heads and q has {q.shape[2]}; "
            "the key/value heads must divide the query heads"
        )
    if q.shape[1] > k.shape[1]:
        raise ValueError(
            f"q has {q.shape[1]} tokens and k has {k.shape[1]}; "
            "the queries must be the last of the tokens that the keys describe"
        )
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(
            f"window={window!r}; it must be an int of at least 1, or None for no window"
        )
    if segment_ids is not None:
        if segment_ids.shape != k.shape[:2]:
            raise ValueError(
                f"segment_ids has shape {segment_ids.shape}; it must be {k.shape[:2]}, "
                "one number per key"
            )
        if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
            raise ValueError(
                f"segment_ids has dtype {segment_ids.dtype}; it must be an integer dtype"
            )
    if implementation not in (None, "xla", "cudnn", "tokamax"):
        raise ValueError(
            f"implementation={implementation!r}; it must be None, 'xla', 'cudnn' or 'tokamax'"
        )
