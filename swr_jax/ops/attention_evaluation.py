"""Validated attention by each of the implementations: XLA, cuDNN, tokamax's and JAX's kernels.

Each attends the last T of S tokens, plain or with a part of the sequence before them that another
device has handed on; see `attention_blocks` for what `start` says of it.
"""

import functools
import importlib.util
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from swr_jax.ops import attention_splash
from swr_jax.ops.attention_blocks import Start, blocks, causal, realigned
from swr_jax.ops.dispatch import target


class LogitOptions(NamedTuple):
    """What becomes of the products of queries and keys before mask and softmax."""

    scale: float | None = None  # They are multiplied by it; None: Dh ** -0.5.
    soft_cap: float | None = None  # Then cap * tanh(logits / cap); None: left alone.


def pick(
    q,
    k,
    v,
    window,
    segment_ids,
    start: Start | None = None,
    options: LogitOptions = LogitOptions(),  # noqa: B008 - a tuple
) -> tuple[str, jax.Array]:
    """Return what the best implementation here computes, and its name."""
    for name in _kernels(q, k, window, segment_ids, start, options):
        try:
            return name, run(q, k, v, window, segment_ids, name, start, options)
        except (RuntimeError, ExceptionGroup):
            # By tokamax where none of its kernels takes these shapes or this mask
            # (NotImplementedError is a RuntimeError), by JAX where the cuDNN library is missing.
            continue
    return "xla", run(q, k, v, window, segment_ids, "xla", start, options)


def run(
    q,
    k,
    v,
    window,
    segment_ids,
    implementation: str,
    start: Start | None = None,
    options: LogitOptions = LogitOptions(),  # noqa: B008 - a tuple
) -> jax.Array:
    """Call one implementation, through its own causal path where it has one for these arguments."""
    if implementation == "splash":
        return attention_splash.attend(q, k, v, window, segment_ids, start, *options)
    if implementation == "cudnn" and options.soft_cap is not None:
        raise NotImplementedError(
            f"logits_soft_cap={options.soft_cap}: cuDNN's attention has no soft cap"
        )
    # On TPU tokamax's kernel knows no window; the blocks below give it one.
    knows_windows = implementation == "cudnn" or (
        implementation == "tokamax" and jax.default_backend() == "gpu"
    )
    plain = {"cudnn": _cudnn, "tokamax": _tokamax}.get(implementation)
    if plain is not None and (window is None or knows_windows):

        def attend_plain(q, k, v):
            return plain(q, k, v, is_causal=True, window=window, options=options)

        if _is_plain(q, k, segment_ids, start):
            return attend_plain(q, k, v)
        if _has_plain_halo(window, segment_ids, start):
            return realigned(q, k, v, start, attend_plain)
    attends = {"cudnn": _attend_cudnn, "tokamax": _attend_tokamax, "xla": attend_xla}
    attend = functools.partial(attends[implementation], options=options)
    arrange = causal if window is None or q.shape[1] <= window else blocks
    start = 0 if start is None else start
    return arrange(q, k, v, window, segment_ids, attend, start)


def may_use_kernels(q, implementation: str | None) -> bool:
    """Whether `pick`, or `run` with a name given, may call a kernel of another library."""
    if implementation is None:
        # Kernels' float32 products are not float32 everywhere.
        elsewhere = jax.default_backend() != "cpu" or _is_for_tpu()
        return elsewhere and q.dtype in (jnp.bfloat16, jnp.float16)
    return implementation != "xla"


def _is_for_tpu() -> bool:
    """Whether the trace is for a TPU, here or described by the mesh in context."""
    return target().platform == "tpu"


def _is_plain(q, k, segment_ids, start) -> bool:
    return segment_ids is None and start is None and q.shape[1] == k.shape[1]


def _has_plain_halo(window, segment_ids, start) -> bool:
    """Whether the keys before a window's queries can be had by `realigned`."""
    return segment_ids is None and start is not None and window is not None


def attend_xla(
    q,
    k,
    v,
    mask,
    options: LogitOptions = LogitOptions(),  # noqa: B008 - a tuple
) -> jax.Array:
    """Attend under a mask [B, 1, T, S] in plain JAX, logits and all: for few queries."""
    dtype = q.dtype
    if dtype == jnp.float16 and jax.default_backend() != "gpu":
        # jax.nn asks for a float16 product accumulated in float32, which only GPUs have.
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    if options.soft_cap is None:
        out = jax.nn.dot_product_attention(
            q, k, v, mask=mask, scale=options.scale, implementation="xla"
        )
    else:
        out = attend_parts(q, (k,), (v,), mask, options)
    return out.astype(dtype)


def attend_parts(
    q,
    keys: Sequence[jax.Array],
    values: Sequence[jax.Array],
    mask,
    options: LogitOptions,
) -> jax.Array:
    """Attend keys [B, S', Nkv, Dh] in parts, under a mask [B, 1, T, S] over all; float32 inside."""
    batch, queries, heads, features = q.shape
    scale = features**-0.5 if options.scale is None else options.scale
    grouped = q.reshape(batch, queries, keys[0].shape[2], -1, features)
    ends = np.cumsum([part.shape[1] for part in keys])[:-1]
    masks = jnp.split(mask[:, :, None], ends, axis=-1)
    logits = []
    for part, seen in zip(keys, masks, strict=True):
        found = _products(grouped, part)
        if options.soft_cap is None:
            found *= scale
        else:
            found = options.soft_cap * jnp.tanh(found * (scale / options.soft_cap))
        # Finite: a query that sees nothing is one that is thrown away, but not by way of a NaN.
        logits.append(jnp.where(seen, found, jnp.finfo(jnp.float32).min))
    top = functools.reduce(jnp.maximum, [part.max(axis=-1, keepdims=True) for part in logits])
    weights = [jnp.exp(part - jax.lax.stop_gradient(top)) for part in logits]
    total = sum(part.sum(axis=-1, keepdims=True) for part in weights)
    out = sum(
        _means((part / total).astype(value.dtype), value)
        for part, value in zip(weights, values, strict=True)
    )
    return out.reshape(batch, queries, heads, features).astype(q.dtype)


# A single query's products are bound by reading keys and values, which XLA's CPU backend transposes
# before it multiplies them head by head. As matrices over the features of all heads together, in
# which a head's query is zero outside its own, they are read in order. TPUs and GPUs do without.


def _is_one_matrix(queries: int) -> bool:
    return queries == 1 and target().platform == "cpu"


def _products(q: jax.Array, k: jax.Array) -> jax.Array:
    """Each query [B, T, Nkv, G, Dh] by the keys [B, S, Nkv, Dh] of its head: [B, Nkv, G, T, S]."""
    batch, queries, kv_heads, groups, features = q.shape
    if _is_one_matrix(queries):
        own = jnp.eye(kv_heads, dtype=q.dtype)[:, None, :, None]
        apart = (q[:, 0, :, :, None] * own).reshape(batch, kv_heads * groups, -1)
        rows = k.reshape(batch, -1, kv_heads * features)
        found = jnp.einsum(
            "bsf,bfc->bsc", rows, jnp.swapaxes(apart, 1, 2), preferred_element_type=jnp.float32
        )
        return jnp.moveaxis(found.reshape(batch, -1, kv_heads, groups, 1), 1, -1)
    return jnp.einsum("btngd,bsnd->bngts", q, k, preferred_element_type=jnp.float32)


def _means(weights: jax.Array, v: jax.Array) -> jax.Array:
    """Values [B, S, Nkv, Dh] of a head by its weights [B, Nkv, G, T, S]: [B, T, Nkv, G, Dh]."""
    batch, kv_heads, groups, queries, keys = weights.shape
    if _is_one_matrix(queries):
        rows = v.reshape(batch, keys, -1)
        every = jnp.einsum(
            "bcs,bsf->bcf",
            weights.reshape(batch, -1, keys),
            rows,
            preferred_element_type=jnp.float32,
        ).reshape(batch, 1, kv_heads, groups, kv_heads, -1)
        return jnp.einsum("btngnd->btngd", every)
    return jnp.einsum("bngts,bsnd->btngd", weights, v, preferred_element_type=jnp.float32)


def _attend_cudnn(q, k, v, mask, *, options: LogitOptions) -> jax.Array:
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, scale=options.scale, implementation="cudnn"
    )


def _cudnn(q, k, v, *, is_causal: bool, window: int | None, options: LogitOptions) -> jax.Array:
    size = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=is_causal,
        local_window_size=size,
        scale=options.scale,
        implementation="cudnn",
    )


def _attend_tokamax(q, k, v, mask, *, options: LogitOptions) -> jax.Array:
    return _tokamax(q, k, v, mask=mask, options=options)


def _tokamax(
    q,
    k,
    v,
    *,
    mask=None,
    is_causal: bool = False,
    window: int | None = None,
    options: LogitOptions,
) -> jax.Array:
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
        scale=options.scale,
        logits_soft_cap=options.soft_cap,
        implementation=implementation,
    )


def _kernels(q, k, window, segment_ids, start, options: LogitOptions) -> tuple[str, ...]:
    """Name the attention kernels that may be better than XLA for these arguments, here and now."""
    if not may_use_kernels(q, None):
        return ()
    # The compiler cannot split a kernel: outside shard_map it would gather its operands first.
    mesh = jax.sharding.get_abstract_mesh()
    devices = jax.device_count() if mesh.empty else mesh.size
    if devices > 1 and not mesh.are_all_axes_manual:
        return ()
    if _is_for_tpu():
        return ("splash",)
    names = () if importlib.util.find_spec("tokamax") is None else ("tokamax",)
    # Any other mask than a causal window would have to be written out for cuDNN.
    plain = _is_plain(q, k, segment_ids, start) or _has_plain_halo(window, segment_ids, start)
    plain &= options.soft_cap is None
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
