"""Attention over the devices of a mesh: batch and heads apart, the sequence by keys and values.

Queries stay where they are. With a window a device needs the keys and values of the window - 1
tokens before its own: its left neighbours hand these on, one collective for each neighbour that the
window reaches. Without one it needs all that came before, and one collective shows all to all.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from swr_jax.ops.attention_blocks import Start
from swr_jax.ops.sharded import SEQUENCE_AXIS, Split, split_of, tokens_before

Array = jax.Array
# Takes q, k, v, segment_ids and the place of the first key, or None, to the output.
Attention = Callable[[Array, Array, Array, Array | None, Start | None], Array]


def split_of_attention(q: Array, k: Array) -> Split | None:
    """Return how the mesh in context splits a call, or None where it does not."""
    batch, queries, heads, _ = q.shape
    # Queries that continue a sequence lie on the devices that hold its last tokens.
    time = queries if queries == k.shape[1] else 1
    return split_of(batch, time, heads)


def over_mesh(
    attention: Attention,
    split: Split,
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None,
    window: int | None,
    *,
    checked: bool,
) -> Array:
    """Return what attention(q, k, v, segment_ids, None) does, each device for its own queries.

    Args:
        attention: that of one device.
        split: from `split_of_attention`, not None.
        q, k, v, segment_ids, window: as `sliding_window_attention` takes them.
        checked: whether `attention` says what its results vary over. Kernels of other libraries do
            not, which costs gradients a sum over mesh axes that split nothing.
    """
    parts = math.prod(split.mesh.shape[name] for name in split.heads)
    copies = parts // math.gcd(parts, k.shape[2])
    if copies > 1:  # Fewer key/value heads than devices: several have the same one.
        k, v = (jnp.repeat(x, copies, axis=2) for x in (k, v))

    def part(q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
        if split.sequence == 1 or window == 1:
            return attention(q, k, v, segment_ids, None)
        time = q.shape[1]
        count = time * (split.sequence - 1)
        if window is None:
            before = _everything_before
        else:
            count = min(count, window - 1)
            before = tokens_before
        keys = k.shape[-1]
        both = jnp.concatenate([k, v], axis=-1)
        both = jnp.concatenate([before(both, count, split.sequence), both], axis=1)
        if segment_ids is not None:
            earlier = before(segment_ids, count, split.sequence)
            segment_ids = jnp.concatenate([earlier, segment_ids], axis=1)
        start = lax.axis_index(SEQUENCE_AXIS) * time - count
        return attention(q, both[..., :keys], both[..., keys:], segment_ids, start)

    documents = None if segment_ids is None else jax.P(*split.spec[:2])
    return jax.shard_map(
        part,
        mesh=split.mesh,
        in_specs=(split.spec,) * 3 + (documents,),
        out_specs=split.spec,
        check_vma=checked,
    )(q, k, v, segment_ids)


def _everything_before(x: Array, count: int, parts: int) -> Array:
    """Return as many tokens as there are before the last device's, this device's last."""
    everyone = lax.all_gather(x, SEQUENCE_AXIS)
    # In a circle: what follows this device's own stands for what is not there, before the first.
    everyone = jnp.roll(everyone, -1 - lax.axis_index(SEQUENCE_AXIS), axis=0)[: parts - 1]
    return jnp.moveaxis(everyone, 0, 1).reshape(x.shape[0], count, *x.shape[2:])
