"""Causal convolution of every feature by itself over a few tokens, on one device or on a mesh.

Along a split sequence a device needs the inputs of the W - 1 tokens before its own, which its left
neighbour hands on.
"""

import jax
import jax.numpy as jnp

from swr_jax.ops.sharded import split_of, tokens_before

Array = jax.Array


def short_convolution(
    x: Array,
    kernel: Array,
    *,
    before: Array | None = None,
    segment_ids: Array | None = None,
    return_state: bool = False,
) -> Array | tuple[Array, Array]:
    """Return y_t = sum over i < W of kernel[W - 1 - i] * x_{t-i}, inside each document.

    Computed in float32.

    Args:
        x: [B, T, C], any floating dtype.
        kernel: [W, C]; its last row is the token's own.
        before: [B, W - 1, C], the inputs before x, of the first token's document; others 0. None:
            all 0.
        segment_ids: integers [B, T]; where they change from one token to the next a document
            begins, which does not see the one before.
        return_state: also return what `before` is for the next token if that continues the last
            document.

    Returns:
        float32 [B, T, C]; with `return_state`, the pair of it and [B, W - 1, C] in x's dtype.
    """
    size, (batch, time, features) = kernel.shape[0], x.shape
    if before is None and not return_state and (split := split_of(batch, time, features)):

        def part(x: Array, kernel: Array, segment_ids: Array | None) -> Array:
            earlier = jnp.zeros_like(x, shape=(x.shape[0], size - 1, x.shape[2]))
            document = None
            if split.sequence > 1 and size > 1:
                earlier = tokens_before(x, size - 1, split.sequence)
            if segment_ids is not None:
                document = _documents(segment_ids, size - 1, split.sequence)
            return _convolve(jnp.concatenate([earlier, x], axis=1), document, kernel)

        rows = jax.P(*split.spec[:2])
        specs = (split.spec, jax.P(None, split.heads), None if segment_ids is None else rows)
        return jax.shard_map(part, mesh=split.mesh, in_specs=specs, out_specs=split.spec)(
            x, kernel, segment_ids
        )
    if before is None:
        before = jnp.zeros_like(x, shape=(batch, size - 1, features))
    inputs = jnp.concatenate([before.astype(x.dtype), x], axis=1)
    document = None if segment_ids is None else _documents(segment_ids, size - 1, 1)
    y = _convolve(inputs, document, kernel)
    if not return_state:
        return y
    after = inputs[:, time:]
    if document is not None:
        after = jnp.where((document[:, time:] == document[:, -1:])[..., None], after, 0)
    return y, after


def _documents(segment_ids: Array, earlier: int, parts: int) -> Array:
    """Number the documents of a device's tokens and of the `earlier` ones before them, in order."""
    if parts > 1 and earlier:
        segment_ids = jnp.concatenate([tokens_before(segment_ids, earlier, parts), segment_ids], 1)
        earlier = 0
    begins = segment_ids[:, 1:] != segment_ids[:, :-1]
    document = jnp.cumsum(begins, axis=1, dtype=jnp.int32)
    # Tokens from before the call belong to the first document.
    return jnp.pad(document, ((0, 0), (earlier + 1, 0)))


def _convolve(inputs: Array, document: Array | None, kernel: Array) -> Array:
    """Return y [B, T, C] from inputs [B, W - 1 + T, C] and the documents [B, W - 1 + T] of them."""
    size = kernel.shape[0]
    time = inputs.shape[1] - (size - 1)
    kernel = kernel.astype(jnp.float32)
    y = inputs[:, size - 1 :].astype(jnp.float32) * kernel[-1]
    for back in range(1, size):
        part = slice(size - 1 - back, size - 1 - back + time)
        past = inputs[:, part].astype(jnp.float32)
        if document is not None:
            same = document[:, part] == document[:, size - 1 :]
            past = jnp.where(same[..., None], past, 0)
        y = y + past * kernel[-1 - back]
    return y
