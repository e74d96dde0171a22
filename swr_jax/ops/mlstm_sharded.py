"""An mLSTM over the devices of a mesh: batch and heads apart, the sequence by one state each.

What the devices to its left leave behind is all that a device needs of them. Each sums up its own
tokens, which is one matrix product; one collective shows everybody's sums to everybody, and each
device begins with those on its left, decayed by what lies between.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mlstm.stabilized import finite, sum_after
from swr_jax.ops.mlstm_chunkwise import Options, State
from swr_jax.ops.sharded import SEQUENCE_AXIS, Split

Array = jax.Array
# Takes q, k, v, log_i, log_f and the state before the first token to h and the last state.
Chunkwise = Callable[[Array, Array, Array, Array, Array, State], tuple[Array, State]]


def over_mesh(
    chunkwise: Chunkwise,
    empty: Callable[[Array, Array], State],
    options: Options,
    split: Split,
    q: Array,
    k: Array,
    v: Array,
    log_i: Array,
    log_f: Array,
) -> Array:
    """Return h of a sequence that begins empty, each device computing its own part of it.

    Args:
        chunkwise: the mLSTM of one device.
        empty: takes q and v to the state of a sequence that has not begun.
        options: what it computes.
        split: from `sharded.split_of`, not None.
        q, k, v, log_i, log_f: as `mlstm_chunkwise.chunkwise` takes them, resets in log_f.
    """

    def part(*arrays: Array) -> Array:
        if split.sequence > 1:
            state = _before(options, *arrays[1:], split.sequence)
        else:
            state = empty(arrays[0], arrays[2])
        return chunkwise(*arrays, state)[0]

    return jax.shard_map(part, mesh=split.mesh, in_specs=(split.spec,) * 5, out_specs=split.spec)(
        q, k, v, log_i, log_f
    )


def with_state_over_mesh(chunkwise: Chunkwise, split: Split) -> Chunkwise:
    """Return a matrix memory, from state to state, as one that computes batch and heads apart.

    Args:
        chunkwise: the mLSTM, or the gated delta rule, of one device.
        split: from `sharded.split_of`, the sequence in one part.
    """
    of_state = jax.P(split.batch, split.heads)
    return jax.shard_map(
        chunkwise,
        mesh=split.mesh,
        in_specs=(*(split.spec,) * 5, of_state),
        out_specs=(split.spec, of_state),
    )


def _before(options: Options, k: Array, v: Array, log_i: Array, log_f: Array, parts: int) -> State:
    """Return the state before this device's tokens.

    The stabilizers are constants here: h does not depend on them.
    """
    decay, (memory, normalizer, m) = _sum_up(options, k, v, log_i, log_f)
    message = [memory.reshape(*m.shape, -1), normalizer, decay[..., None], m[..., None]]
    everyone = lax.all_gather(jnp.concatenate(message, axis=-1), SEQUENCE_AXIS)

    index = lax.axis_index(SEQUENCE_AXIS)
    left = (jnp.arange(parts) < index)[:, None, None]
    decays, m = everyone[..., -2], lax.stop_gradient(everyone[..., -1])
    # From each device to this one, that of its own tokens not included.
    between = sum_after(jnp.where(left, decays, 0), axis=0)
    weight = jnp.where(left, between + m, -jnp.inf)
    latest = jnp.zeros_like(m[0])
    if options.stabilized:
        latest = lax.stop_gradient(jnp.max(weight, axis=0))
    weight = jnp.exp(weight - finite(latest))
    state = jnp.einsum("pbh,pbhx->bhx", weight, everyone[..., :-2], precision="highest")
    size = memory.shape[-2] * memory.shape[-1]
    return State(state[..., :size].reshape(memory.shape), state[..., size:], latest)


def _sum_up(
    options: Options, k: Array, v: Array, log_i: Array, log_f: Array
) -> tuple[Array, State]:
    """Return log of the product of all forget gates, and the state that these tokens make alone."""
    reset = jnp.isneginf(log_f)
    resets_after = jnp.flip(jnp.cumsum(jnp.flip(reset, 1), axis=1), 1) - reset
    gates = jnp.where(reset, 0, log_f)
    after = sum_after(gates, axis=1)
    decay = jnp.where(jnp.any(reset, axis=1), -jnp.inf, after[:, 0] + gates[:, 0])

    weight = jnp.where(resets_after == 0, after + log_i, -jnp.inf)
    m = jnp.zeros_like(decay)
    if options.stabilized:
        m = lax.stop_gradient(jnp.max(weight, axis=1))
    weight = jnp.exp(weight - finite(m)[:, None])
    keys = weight[..., None] * k.astype(options.dtype)
    memory = jnp.einsum("bthk,bthv->bhkv", keys, v.astype(options.dtype), precision="highest")
    return decay, State(memory, jnp.sum(keys, axis=1), m)
