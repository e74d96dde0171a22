"""A recurrence over the devices of a mesh: batch and heads apart, the sequence by one carrier.

Where the mesh in context (`jax.set_mesh`) has automatic axes with the names below, every device
works on its own part, and the compiler has nothing to guess. Along the sequence a token sees at
most `lookback` blocks back, so a device needs from its left neighbour what few tokens before the
cut make: it is reduced to one array, which one `ppermute` hands on (and one hands its gradient
back). The exact recurrence gathers one product of decays and one state of every device instead.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType

from swr_jax.ops.block_two_pass import fold, reduce_block
from swr_jax.ops.state import RecurrenceState

Array = jax.Array
Gates = tuple[Array, Array] | None
# Takes decays, inputs, gates and an initial state to the output.
Recurrence = Callable[[Array, Array, Gates, RecurrenceState | Array | None], Array]

BATCH_AXES = ("data", "fsdp")
HEAD_AXES = ("tensor",)
SEQUENCE_AXIS = "sequence"


class Split(NamedTuple):
    """Mesh axes over which a call's arrays are split, and the parts of the sequence."""

    mesh: AbstractMesh
    batch: tuple[str, ...]
    heads: tuple[str, ...]
    sequence: int

    @property
    def spec(self) -> jax.P:
        """Of arrays [B, T, heads, ...]."""
        return jax.P(self.batch, SEQUENCE_AXIS if self.sequence > 1 else None, self.heads)


def split_of(batch: int, time: int, heads: int, *, reach: int = 1) -> Split | None:
    """Return how the mesh in context splits a call, or None where it does not.

    `heads` counts what may be split: gate heads, where heads share gates. An axis that does not
    divide what it would split is left out. So is the sequence's where a part would be shorter than
    `reach`, the tokens that a device must know of its left neighbour's.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return None

    def dividing(names: tuple[str, ...], size: int) -> tuple[str, ...]:
        found: tuple[str, ...] = ()
        for name in names:
            parts = math.prod(mesh.shape[other] for other in (*found, name) if other in mesh.shape)
            if name in mesh.shape and size % parts == 0:
                found = (*found, name)
        return found

    parts = mesh.shape.get(SEQUENCE_AXIS, 1)
    if time % parts or time // parts < reach:
        parts = 1
    split = Split(mesh, dividing(BATCH_AXES, batch), dividing(HEAD_AXES, heads), parts)
    sizes = (mesh.shape[name] for name in (*split.batch, *split.heads))
    return split if math.prod(sizes) * parts > 1 else None


def reach_of(block_size: int, lookback: int | None) -> int:
    """Return how many of a device's last tokens its right neighbour's may see."""
    return 1 if lookback is None else (lookback + 1) * block_size


def varying_alike(*arguments):
    """Let all arrays vary over every manual mesh axis that one of them varies over.

    Inside `jax.shard_map` a scan needs it of what it carries, and a custom gradient of its
    cotangents; the conversion itself sums the cotangents of what did not vary.
    """
    leaves = jax.tree.leaves(arguments)
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in leaves))

    def vary(x: Array) -> Array:
        missing = tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, arguments)


def tokens_before(x: Array, count: int, parts: int) -> Array:
    """Return the `count` tokens before this device's [B, t, ...], zeros where there are none.

    One `ppermute` for each device that they come from: for each of t tokens.
    """
    time = x.shape[1]
    found = []
    for hop in range(1, -(-count // time) + 1):
        last = x[:, max(0, hop * time - count) :]
        found.append(lax.ppermute(last, SEQUENCE_AXIS, [(i, i + hop) for i in range(parts - hop)]))
    return jnp.concatenate(found[::-1], axis=1)


def over_mesh(
    recurrence: Recurrence,
    split: Split,
    a: Array,
    v: Array,
    gates: Gates,
    *,
    block_size: int,
    lookback: int | None,
    dtype: jnp.dtype,
    by_heads: Callable[[Array, int], Array] | None = None,
) -> Array:
    """Return recurrence(a, v, gates, None), each device computing its own part of it.

    Args:
        recurrence: what to compute.
        split: from `split_of`, not None.
        a, v, gates: as the operators take them, resets already in a.
        block_size, lookback: the window.
        dtype: dtype of the maths, and of what is handed on.
        by_heads: where v and the gates are in another layout, what brings some of their tokens to
            [B, t, heads, D], given these and the number of heads.
    """

    def part(a: Array, v: Array, gates: Gates) -> Array:
        state = None
        if split.sequence > 1:
            # Of a window, no more than the last tokens matter.
            last = slice(None if lookback is None else -reach_of(block_size, lookback), None)
            inputs = (v,) if gates is None else (gates[0], v)
            factors = tuple(x[:, last] for x in inputs)
            if by_heads is not None:
                factors = tuple(by_heads(x, a.shape[2]) for x in factors)
            if lookback is None:
                state = _before_exact(a, factors, split.sequence, dtype)
            else:
                time, window = v.shape[1], (block_size, lookback)
                state = _before_window(a[:, last], factors, time, split.sequence, *window, dtype)
        return recurrence(a, v, gates, state)

    specs = _specs(split, gates)
    return jax.shard_map(part, mesh=split.mesh, in_specs=specs, out_specs=split.spec)(a, v, gates)


def with_state_over_mesh(
    recurrence: Callable[..., tuple[Array, RecurrenceState | None]],
    split: Split,
    return_state: bool,
    *,
    block_size: int,
    lookback: int | None,
) -> Callable[..., tuple[Array, RecurrenceState | None]]:
    """Return a recurrence that reads or returns a state as one that computes batch and heads apart.

    Args:
        recurrence: takes decays, inputs, gates and an initial state to the output and the state
            after it.
        split: from `split_of`, the sequence in one part.
        return_state: whether there is a state after it.
        block_size, lookback: the window.
    """
    of_state = RecurrenceState(
        local=jax.P(split.batch, split.heads),
        carriers=jax.P(split.batch, None, split.heads),
        decays=jax.P(split.batch, None, split.heads),
        position=jax.P(split.batch),
        block_size=block_size,
        lookback=lookback,
    )

    def call(a: Array, v: Array, gates: Gates, initial_state: RecurrenceState | Array | None):
        before = of_state if isinstance(initial_state, RecurrenceState) else of_state.local
        return jax.shard_map(
            recurrence,
            mesh=split.mesh,
            in_specs=(*_specs(split, gates), None if initial_state is None else before),
            out_specs=(split.spec, of_state if return_state else None),
        )(a, v, gates, initial_state)

    return call


def _specs(split: Split, gates: Gates) -> tuple:
    """Of decays, inputs and gates."""
    return split.spec, split.spec, None if gates is None else (split.spec, split.spec)


def _before_window(a, factors, time, parts, block_size, lookback, dtype):
    """Return the state that this device's part starts from: None, carriers, or mid-block.

    The decays and the factors of the input are those of the last of its `time` tokens.

    What the neighbour hands on is, for the block that is under way at the cut and for each of the
    `lookback` before it, the state that its tokens have made, decayed up to the cut.
    """
    *b, v = factors
    batch, reach, heads, features = v.shape
    aligned = time % block_size == 0
    if aligned and lookback == 0:
        return None
    position = (lax.axis_index(SEQUENCE_AXIS) * time) % block_size
    end = (position + time) % block_size
    block = (end + jnp.arange(reach)) // block_size  # of the last tokens; the last is under way
    v = v.astype(dtype)
    if b:
        v = jnp.repeat(b[0], heads // b[0].shape[2], axis=2).astype(dtype) * v
    # In the order of `RecurrenceState`: the block under way, then the carriers, newest first.
    ages = range(1 if aligned else 0, lookback + 1)
    message = [
        reduce_block(
            fold(a, reach, heads),
            (fold(jnp.where((block == lookback + 1 - age)[:, None, None], v, 0), reach, heads),),
            dtype=dtype,
        )[1]
        for age in ages
    ]
    message = jnp.concatenate(message, axis=1).reshape(batch, -1, heads, features)
    message = lax.ppermute(message, SEQUENCE_AXIS, [(i, i + 1) for i in range(parts - 1)])
    if aligned and lookback == 1:
        return message[:, 0]
    zeros = RecurrenceState.zeros(
        batch, heads, features, block_size=block_size, lookback=lookback, dtype=dtype
    )
    if aligned:
        return zeros.replace(carriers=message)
    return zeros.replace(
        local=message[:, 0],
        carriers=message[:, 1:],
        position=jnp.broadcast_to(position, (batch,)).astype(jnp.int32),
    )


def _before_exact(a, factors, parts, dtype):
    """Return the exact recurrence's state before this device's part, [B, H, D]."""
    batch, time, heads = a.shape
    groups = factors[0].shape[2]
    product, end = reduce_block(
        fold(a, time, groups), tuple(fold(x, time, groups) for x in factors), dtype=dtype
    )
    message = jnp.concatenate([product, end], axis=-1).reshape(batch, heads, -1)
    everyone = lax.all_gather(message, SEQUENCE_AXIS)
    index = lax.axis_index(SEQUENCE_AXIS)
    state = jnp.zeros_like(message[..., 1:])
    for i in range(parts - 1):
        product, end = everyone[i, ..., :1], everyone[i, ..., 1:]
        state = jnp.where(i < index, product * state + end, state)
    return state
