"""Attention by JAX's own TPU kernels ("splash"), which know causal windows and documents.

They skip the blocks of keys that no query of a block can see, so a window costs what it holds, and
they compare documents inside the kernel, so that no mask is ever written out.
"""

import jax
import jax.numpy as jnp

from swr_jax.ops.attention_blocks import Start

Array = jax.Array

# Tokens of a tile; queries and keys come in whole lanes.
_LARGEST_TILE = 1024
_LANES = 128
# The backward pass in one kernel saves two of seven products, and writes a gradient of the queries
# for every tile of keys, to be added up. For a window nearly all of these are zeros.
_MOST_TILES_FUSED = 32
_MOST_TILES_FUSED_IN_WINDOWS = 4
_NOBODY = jnp.iinfo(jnp.int32).min  # a document without queries


def attend(
    q: Array,
    k: Array,
    v: Array,
    window: int | None,
    segment_ids: Array | None,
    start: Start | None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Array:
    """Causal softmax attention of the last T of S tokens against all of them, or a window.

    Logits and softmax in float32; products of the operands' dtype accumulated in float32.

    Args:
        q: [B, T, N, Dh], bfloat16.
        k, v: [B, S, Nkv, Dh], S >= T, bfloat16.
        window: number of keys that a query sees, its own included; None: all before it.
        segment_ids: [B, S] integers; None: one document.
        start: place of the first key in the sequence, as `attention_blocks` has it; None: 0.
        scale, soft_cap: of the logits, as `attention_evaluation` has them.

    Raises:
        NotImplementedError: the kernels do not take these dtypes or sizes.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    _check(q)
    k, v, segment_ids = _whole_lanes(k, v, segment_ids, start)
    queries, keys = q.shape[1], k.shape[1]
    offset = keys - queries
    # A query's own place among the keys is `offset` further on.
    if window is None:
        mask = splash.CausalMask((queries, keys), offset=offset)
    else:
        mask = splash.LocalMask((queries, keys), window_size=(window - 1, 0), offset=offset)
    longest = _LARGEST_TILE if window is None else max(window, _LANES)
    block_q, block_kv = _tile(queries, longest), _tile(keys, longest)
    most = _MOST_TILES_FUSED if window is None else _MOST_TILES_FUSED_IN_WINDOWS
    fused = keys // block_kv <= most
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * q.shape[2]),
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_q_dq=None if fused else block_q,
            block_kv_dq=None if fused else block_kv,
            use_fused_bwd_kernel=fused,
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=soft_cap,
    )
    segments = None
    if segment_ids is not None:
        segments = splash.SegmentIds(q=segment_ids[:, offset:], kv=segment_ids)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scaled = (q.astype(jnp.float32) * scale).astype(q.dtype)
    by_heads = (jnp.swapaxes(x, 1, 2) for x in (scaled, k, v))
    out = jax.vmap(kernel, in_axes=(0, 0, 0, None if segments is None else 0))(*by_heads, segments)
    return jnp.swapaxes(out, 1, 2)


def _whole_lanes(
    k: Array, v: Array, segment_ids: Array | None, start: Start | None
) -> tuple[Array, Array, Array | None]:
    """Put keys of nobody's document before the first, and those before place 0 into it."""
    pad = -k.shape[1] % _LANES
    if not pad and start is None:
        return k, v, None if segment_ids is None else segment_ids.astype(jnp.int32)
    if segment_ids is None:
        segment_ids = jnp.zeros(k.shape[:2], jnp.int32)
    segment_ids = segment_ids.astype(jnp.int32)
    if start is not None:
        segment_ids = jnp.where(start + jnp.arange(k.shape[1]) < 0, _NOBODY, segment_ids)
    segment_ids = jnp.pad(segment_ids, ((0, 0), (pad, 0)), constant_values=_NOBODY)
    k, v = (jnp.pad(x, ((0, 0), (pad, 0), (0, 0), (0, 0))) for x in (k, v))
    return k, v, segment_ids


def _check(q: Array) -> None:
    if q.dtype != jnp.bfloat16:
        raise NotImplementedError(f"q.dtype={q.dtype}: the TPU kernels of attention have bfloat16")
    for name, size in (("T", q.shape[1]), ("Dh", q.shape[-1])):
        if size % _LANES:
            raise NotImplementedError(
                f"{name}={size}: the TPU kernels of attention take multiples of {_LANES}"
            )


def _tile(length: int, longest: int) -> int:
    """The largest multiple of a lane that divides the length and is no longer than wished for."""
    sizes = range(_LANES, min(length, longest, _LARGEST_TILE) + 1, _LANES)
    return max(size for size in sizes if length % size == 0)
