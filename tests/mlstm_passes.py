"""The two passes of an mLSTM kernel in plain JAX, one chunk after the other: what kernels compute.

`forward` and `backward` take and return what `pallas_kernels.mlstm.gradient.differentiable` wants
of a backend. They check what kernels share (gates, documents, gradients of gates) where no kernel
is, and every intermediate result of a kernel.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.mlstm import gates as rows_of

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def forward(options, q, k, v, gates, carry, memory, normalizer):
    """Outputs, and the state after the last chunk."""
    outputs = []
    for chunk in _chunks(q, k, v, gates, carry):
        rows = _read(options, *chunk, memory, normalizer)
        outputs.append(rows["h"])
        memory, normalizer = _advance(*chunk, memory, normalizer)
    h = jnp.moveaxis(jnp.concatenate(outputs, axis=2), 1, 2)
    return h.astype(v.dtype), memory, normalizer


def backward(options, q, k, v, gates, carry, memory, normalizer, dh, dmemory, dnormalizer):
    """Cotangents of everything; of `gates` and `carry` as `gates.gradient` takes them."""
    chunks = _chunks(q, k, v, gates, carry)
    states = [(memory, normalizer)]
    for chunk in chunks:
        states.append(_advance(*chunk, *states[-1]))
    length = gates.shape[-1]
    dh = jnp.moveaxis(dh.astype(jnp.float32), 1, 2)
    found = []
    for index in reversed(range(len(chunks))):
        (q_c, k_c, v_c, g, c), (memory, normalizer) = chunks[index], states[index]
        rows = _read(options, q_c, k_c, v_c, g, c, memory, normalizer)
        d_h = dh[:, :, index * length : (index + 1) * length] / rows["divisor"]
        d_s = _einsum("bhiv,bhjv->bhij", d_h, v_c)
        d_recalled = jnp.sum(d_h * rows["recalled"], axis=-1, keepdims=True)
        x = rows["s"] * d_s
        d_d = jnp.zeros_like(d_recalled)
        if options.normalized:
            d_d = -(jnp.sum(x, axis=-1, keepdims=True) + d_recalled) / rows["divisor"]
            d_d *= jnp.where(jnp.abs(rows["d"]) > rows["floor"], jnp.sign(rows["d"]), 0)
        d_log_a = x + rows["s"] * d_d
        d_log_g = (d_recalled + d_d * rows["recalled_sum"])[..., 0]
        p = rows["a"] * (d_s + d_d)
        recall, kept = g[:, :, rows_of.RECALL, :, None], g[:, :, rows_of.KEPT, :, None]

        dq = _einsum("bhij,bhjk->bhik", p, k_c)
        dq += recall * _einsum("bhiv,bhkv->bhik", d_h, memory)
        dq += recall * d_d * normalizer[:, :, None, :]
        written = _einsum("bhjv,bhkv->bhjk", v_c, dmemory) + dnormalizer[:, :, None, :]
        dk = _einsum("bhij,bhik->bhjk", p, q_c) + kept * written
        dv = _einsum("bhij,bhiv->bhjv", rows["s"], d_h)
        dv += kept * _einsum("bhjk,bhkv->bhjv", k_c, dmemory)

        own = jnp.diagonal(d_log_a, axis1=-2, axis2=-1)
        strict = jnp.tril(d_log_a, -1)
        drows = [strict.sum(-1) + d_log_g, strict.sum(-2), own, (kept * written * k_c).sum(-1)]
        inner = (dmemory * memory).sum((-2, -1)) + (dnormalizer * normalizer).sum(-1)
        found.append((dq, dk, dv, jnp.stack(drows, axis=2), c * inner))

        reads = recall * q_c
        dmemory = c[..., None, None] * dmemory + _einsum("bhik,bhiv->bhkv", reads, d_h)
        dnormalizer = c[..., None] * dnormalizer + (reads * d_d).sum(-2)
    found.reverse()
    dq, dk, dv, drows, dcarry = zip(*found, strict=True)
    dq, dk, dv = (jnp.moveaxis(jnp.concatenate(x, axis=2), 1, 2) for x in (dq, dk, dv))
    return (
        *(dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)),
        *(jnp.stack(drows, axis=2), jnp.stack(dcarry, axis=-1)),
        *(dmemory, dnormalizer),
    )


def _chunks(q, k, v, gates, carry):
    """Per chunk: q, k, v [B, H, L, D] in float32, gates [B, H, 8, L], carry [B, H]."""
    length = gates.shape[-1]
    q, k, v = (jnp.moveaxis(x.astype(jnp.float32), 1, 2) for x in (q, k, v))
    return [
        (
            *(x[:, :, index * length : (index + 1) * length] for x in (q, k, v)),
            gates[:, :, index],
            carry[:, :, index],
        )
        for index in range(gates.shape[2])
    ]


def _read(options, q, k, v, gates, carry, memory, normalizer):
    del carry
    row = {name: gates[:, :, index, :, None] for name, index in _ROWS.items()}
    column = {name: gates[:, :, index, None, :] for name, index in _ROWS.items()}
    exponent = row["ROW_HIGH"] - column["COLUMN_HIGH"]
    exponent += row["ROW_LOW"] - column["COLUMN_LOW"]
    length = q.shape[2]
    seen = jnp.tril(jnp.ones((length, length), bool)) & (row["BEGIN"] <= jnp.arange(length))
    a = jnp.exp(jnp.where(seen, exponent, -jnp.inf))
    s = a * _einsum("bhik,bhjk->bhij", q, k)
    recalled = row["RECALL"] * _einsum("bhik,bhkv->bhiv", q, memory)
    recalled_sum = row["RECALL"] * _einsum("bhik,bhk->bhi", q, normalizer)[..., None]
    d = s.sum(-1, keepdims=True) + recalled_sum
    divisor = jnp.maximum(jnp.abs(d), row["FLOOR"]) if options.normalized else row["FLOOR"]
    return {
        "a": a,
        "s": s,
        "recalled": recalled,
        "recalled_sum": recalled_sum,
        "d": d,
        "floor": row["FLOOR"],
        "divisor": divisor,
        "h": (_einsum("bhij,bhjv->bhiv", s, v) + recalled) / divisor,
    }


def _advance(q, k, v, gates, carry, memory, normalizer):
    del q
    keys = gates[:, :, rows_of.KEPT, :, None] * k
    memory = carry[..., None, None] * memory + _einsum("bhjk,bhjv->bhkv", keys, v)
    return memory, carry[..., None] * normalizer + keys.sum(-2)


_ROWS = {
    name: getattr(rows_of, name)
    for name in (
        *("ROW_HIGH", "ROW_LOW", "COLUMN_HIGH", "COLUMN_LOW"),
        *("BEGIN", "RECALL", "KEPT", "FLOOR"),
    )
}
