"""The gated delta rule over the devices of a mesh: batch and heads apart, the sequence by a map.

What a device's tokens do to the memory before them is H -> P H + E, with P [Dk, Dk] the product of
their transitions alpha (I - beta k k^T) and E the memory that they make of an empty one. Both are
columns of one memory, that of the same rule from (I, 0) for values (0, v). One collective shows
everybody's maps to everybody, and each device applies those on its left, in their order.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from swr_jax.ops.sharded import SEQUENCE_AXIS, Split

Array = jax.Array
# Takes q, k, v, alpha, beta and the memory before the first token to o and the last memory; without
# q there is no o.
Rule = Callable[
    [Array | None, Array, Array, Array, Array, Array],
    tuple[Array | None, Array],
]


def over_mesh(
    rule: Rule,
    split: Split,
    q: Array,
    k: Array,
    v: Array,
    alpha: Array,
    beta: Array,
    *,
    dtype: jnp.dtype,
) -> Array:
    """Return o of a sequence that begins empty, each device computing its own part of it.

    Args:
        rule: the gated delta rule of one device.
        split: from `sharded.split_of`, not None.
        q, k, v, alpha, beta: as `gated_delta_rule` takes them, resets in alpha.
        dtype: dtype of the maths, and of what is gathered.
    """

    def part(q: Array, k: Array, v: Array, alpha: Array, beta: Array) -> Array:
        memory = empty_memory(k, v, alpha + beta, dtype)
        if split.sequence > 1:
            memory = _before(rule, k, v, alpha, beta, memory, split.sequence)
        return rule(q, k, v, alpha, beta, memory)[0]

    return jax.shard_map(part, mesh=split.mesh, in_specs=(split.spec,) * 5, out_specs=split.spec)(
        q, k, v, alpha, beta
    )


def empty_memory(k: Array, v: Array, gates: Array, dtype: jnp.dtype) -> Array:
    """Return zeros [B, H, Dk, Dv], distributed over a mesh as the state of these inputs is."""
    # A product of the inputs: it varies over the mesh axes, and is sharded, as the state is.
    k, v, gates = (jnp.zeros_like(x[:, 0], dtype) for x in (k, v, gates))
    return k[..., None] * v[..., None, :] * gates[..., None, None]


def _before(
    rule: Rule, k: Array, v: Array, alpha: Array, beta: Array, empty: Array, parts: int
) -> Array:
    """Return the memory before this device's tokens."""
    size = k.shape[-1]
    identity = jnp.eye(size, dtype=empty.dtype) + empty[..., :1]
    values = jnp.concatenate([jnp.zeros_like(k, v.dtype), v], axis=-1)
    start = jnp.concatenate([identity, empty], axis=-1)
    everyone = lax.all_gather(rule(None, k, values, alpha, beta, start)[1], SEQUENCE_AXIS)

    left = jnp.arange(parts) < lax.axis_index(SEQUENCE_AXIS)
    # Those of the others change nothing.
    everyone = jnp.where(left[:, None, None, None, None], everyone, start)
    memory = empty
    for i in range(parts - 1):
        transition, made = everyone[i, ..., :size], everyone[i, ..., size:]
        memory = jnp.matmul(transition, memory, precision=lax.Precision.HIGHEST) + made
    return memory
