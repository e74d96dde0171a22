"""Softmax attention, causal and windowed, with memory linear in the sequence length.

The attention itself comes from libraries: `jax.nn.dot_product_attention` (XLA, cuDNN),
`tokamax.dot_product_attention` and JAX's splash attention (Pallas kernels). What is ours is the
arrangement around them that keeps long sequences from ever holding a T x T array, forward or
backward (`attention_blocks`), and the distribution over a mesh (`attention_sharded`).

Symbols: B batch, T queries, S keys, N query heads, Nkv key/value heads, Dh features per head.
"""

import functools

import jax
import jax.numpy as jnp

from swr_jax.ops.attention_blocks import query_chunks
from swr_jax.ops.attention_evaluation import (
    LogitOptions,
    attend_parts,
    may_use_kernels,
    pick,
    run,
)
from swr_jax.ops.attention_sharded import over_mesh, split_of_attention
from swr_jax.ops.attention_validation import check_inputs, check_options


def sliding_window_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: int | None,
    segment_ids: jax.Array | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Causal softmax attention in which query i sees keys i - window + 1 .. i.

    The queries are the last T of the S tokens that the keys and values describe; T = S is plain
    self-attention, T < S continues a sequence. Logits are q · k * scale.

    Numerics: logits and softmax in float32, products accumulated in float32, weights cast to the
    dtype of `v` before they multiply it. Memory for logits is O(T * window) for a window and
    O(T) (times a fixed chunk of queries) for full attention, forward and backward.

    Under a mesh in context whose axes the compiler shards, batch and heads are computed apart, and
    so is the sequence where T = S: a window needs the window - 1 keys and values before a device's
    queries, handed on by its left neighbours; full attention shows all of them to every device.

    Args:
      q: queries [B, T, N, Dh]; float32, bfloat16 or float16.
      k: keys [B, S, Nkv, Dh], S >= T, dtype of `q`. Nkv divides N: each key/value head serves
        N / Nkv consecutive query heads (grouped-query attention, arXiv 2305.13245).
      v: values [B, S, Nkv, Dh], dtype of `q`.
      window: number of keys that a query sees, its own included, at least 1; None: all before it.
      segment_ids: [B, S] integers; tokens of different segments never see each other.
      scale: what logits are multiplied by; None: Dh ** -0.5.
      logits_soft_cap: logits become cap * tanh(logits / cap) before the mask and the softmax (Gemma
        2, arXiv 2408.00118); None: left alone.
      implementation: None picks one: for bfloat16 and float16 on one GPU or TPU, on many under a
        mesh in context or inside `jax.shard_map(..., check_vma=False)`: on TPUs "splash", for
        bfloat16 where T and Dh are multiples of 128; elsewhere "tokamax" where it is installed and
        its kernels support the arguments, then "cudnn" on an NVIDIA GPU (Ampere or later) where
        T = S, Dh is a multiple of 8 up to 128, and there are neither segment_ids nor a soft cap nor
        a full attention over a split sequence; else "xla". A name is used as it is or fails, never
        replaced:
        "xla" (`jax.nn`), "cudnn" (`jax.nn` on an NVIDIA GPU), "splash" (JAX's TPU kernels),
        "tokamax" (its kernels on GPU and TPU, its chunked XLA path on CPU).

    Returns:
      [B, T, N, Dh], dtype of `q`.

    Raises:
      ValueError: wrong rank, sizes that disagree, a dtype that is not floating or not shared,
        window < 1, a scale or a soft cap that is not above 0, or an unknown implementation.
      NotImplementedError, RuntimeError or an ExceptionGroup of them: a named implementation does
        not run on this platform or with these arguments.
    """
    options = LogitOptions(scale, logits_soft_cap)
    check_inputs(q, k, v, window, segment_ids, implementation, options)
    if window is not None and window >= k.shape[1]:
        window = None

    def evaluated(q, k, v, segment_ids, start=None):
        if implementation is not None:
            return run(q, k, v, window, segment_ids, implementation, start, options)
        return pick(q, k, v, window, segment_ids, start, options)[1]

    if split := split_of_attention(q, k):
        checked = not may_use_kernels(q, implementation)
        return over_mesh(evaluated, split, q, k, v, segment_ids, window, checked=checked)
    return evaluated(q, k, v, segment_ids)


def implementation_of(q: jax.ShapeDtypeStruct, *, window: int | None = None) -> str:
    """Return the implementation that `sliding_window_attention` picks for plain self-attention.

    Args:
      q: shape [B, T, N, Dh] and dtype of queries, keys and values.
      window: as there.
    """
    picked = []

    def run(q: jax.Array) -> jax.Array:
        name, out = pick(q, q, q, window, None)
        picked.append(name)
        return out

    jax.eval_shape(run, q)
    return picked[0]


def cached_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cached_k: jax.Array,
    cached_v: jax.Array,
    *,
    query_index: jax.Array,
    cached_index: jax.Array,
    segment_ids: jax.Array,
    cached_segment_ids: jax.Array,
    window: int | None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
) -> jax.Array:
    """Attend new tokens against each other and a cache whose slots hold earlier ones in any order.

    Query t sees a key if that is not younger than itself, is younger than query_index - window, and
    belongs to the same segment. The cache is read where it lies: nothing is copied behind it or
    written into it. Logits and softmax in float32; queries are taken in chunks, so memory for
    logits is O(S) for a long prompt. XLA only: a decoding step is bound by reading the cache, which
    a plain matrix-vector product already does once.

    Args:
      q: queries [B, T, N, Dh].
      k: their own keys [B, T, Nkv, Dh].
      v: their own values [B, T, Nkv, Dh].
      cached_k: cached keys [B, S, Nkv, Dh].
      cached_v: cached values [B, S, Nkv, Dh].
      query_index: [B, T] int32, place of each query in its stream of tokens, from 0.
      cached_index: [B, S] int32, place of the token in each slot; negative for an empty slot.
      segment_ids: [B, T] int32.
      cached_segment_ids: [B, S] int32.
      window: number of keys that a query sees, its own included; None: all before it.
      scale, logits_soft_cap: as `sliding_window_attention` takes them.

    Returns:
      [B, T, N, Dh], dtype of `q`.

    Raises:
      ValueError: a scale or a soft cap that is not above 0.
    """
    options = LogitOptions(scale, logits_soft_cap)
    check_options(options)
    attend = functools.partial(attend_parts, options=options)
    return query_chunks(
        q,
        (cached_k, k),
        (cached_v, v),
        query_index,
        jnp.concatenate([cached_index, query_index], axis=1),
        segment_ids,
        jnp.concatenate([cached_segment_ids, segment_ids], axis=1),
        window,
        attend,
    )
