"""Attention in float64 with every weight written out, and problems for it."""

import jax.numpy as jnp
import numpy as np


def dense_attention(
    q, k, v, window=None, segment_ids=None, cotangent=None, *, scale=None, soft_cap=None
):
    """Masked softmax attention in float64 NumPy, with every weight written out.

    Returns the output and, with a cotangent, the gradients of (output * cotangent).sum().
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    queries, keys, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k_all, v_all = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    logits = np.einsum("btnd,bsnd->bnts", q, k_all) * scale
    slope = 1.0
    if soft_cap is not None:
        capped = np.tanh(logits / soft_cap)
        logits, slope = soft_cap * capped, 1 - capped**2
    distance = np.arange(keys - queries, keys)[:, None] - np.arange(keys)
    visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    visible = np.broadcast_to(visible, logits.shape)
    if segment_ids is not None:
        segments = np.asarray(segment_ids)
        visible = visible & (
            segments[:, None, keys - queries :, None] == segments[:, None, None, :]
        )
    logits = np.where(visible, logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out = np.einsum("bnts,bsnd->btnd", weights, v_all)
    if cotangent is None:
        return out
    cotangent = np.asarray(cotangent, np.float64)
    d_weights = np.einsum("btnd,bsnd->bnts", cotangent, v_all)
    d_logits = weights * (d_weights - (weights * d_weights).sum(axis=-1, keepdims=True))
    d_logits = d_logits * slope * scale
    d_q = np.einsum("bnts,bsnd->btnd", d_logits, k_all)
    d_k = np.einsum("bnts,btnd->bsnd", d_logits, q)
    d_v = np.einsum("bnts,btnd->bsnd", weights, cotangent)
    ungroup = lambda x: x.reshape(*k.shape[:3], group, k.shape[3]).sum(axis=3)  # noqa: E731
    return out, (d_q, ungroup(d_k), ungroup(d_v))


def inputs(queries, keys=None, *, batch=2, heads=4, kv_heads=2, features=8, dtype="float32"):
    rng = np.random.default_rng(queries)
    keys = queries if keys is None else keys
    shapes = [(queries, heads), (keys, kv_heads), (keys, kv_heads), (queries, heads)]
    return tuple(jnp.asarray(rng.normal(size=(batch, *shape, features)), dtype) for shape in shapes)


def segments(keys, *, batch=2, every=9):
    """Documents of random lengths, different in each row."""
    starts = np.random.default_rng(keys).random((batch, keys)) < 1 / every
    return np.cumsum(starts, axis=1).astype(np.int32)


def relative_error(got, wanted):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    return np.sqrt(np.mean((got - wanted) ** 2) / max(np.mean(wanted**2), 1e-30))
