"""A validated recurrence by each of the implementations: XLA's block form, or a kernel.

Both put the tokens into a frame of whole blocks where an initial state stands in the middle of
one, and both know the state after the last token.
"""

import importlib

import jax
import jax.numpy as jnp

from swr_jax.ops import block_two_pass as xla
from swr_jax.ops.state import RecurrenceState, initial_carriers, state_after

Array = jax.Array
Gates = tuple[Array, Array] | None
State = RecurrenceState | Array | None

# Modules with a kernel `block_two_pass`, imported when first used.
KERNELS = {
    "mosaic_gpu": "pallas_kernels.swr.mosaic_gpu",
    "mosaic_tpu": "pallas_kernels.swr.mosaic_tpu",
}


def evaluate(
    implementation: str,
    a: Array,
    v: Array,
    gates: Gates,
    *,
    block_size: int,
    lookback: int | None,
    initial_state: State,
    return_state: bool,
    dtype: jnp.dtype,
) -> tuple[Array, RecurrenceState | None]:
    """Return the output of a recurrence, and the state after it where that is wanted.

    Args:
        implementation: "xla", or a key of `KERNELS`.
        a, v, gates: validated arrays, resets already in a.
        block_size, lookback, initial_state, return_state: as the operators take them.
        dtype: dtype of the maths.

    Raises:
        NotImplementedError: this implementation does not cover the case.
    """
    window = {"block_size": block_size, "lookback": lookback}
    if implementation == "xla":
        return _by_xla(a, v, gates, initial_state, return_state, dtype, **window)
    if dtype != jnp.float32:
        raise NotImplementedError(f"the maths is in {dtype}: kernels have float32")
    return _by_kernel(KERNELS[implementation], a, v, gates, initial_state, return_state, **window)


def _by_xla(a, v, gates, initial_state, return_state, dtype, *, block_size, lookback):
    batch, time, heads, features = v.shape
    local, previous, position = initial_carriers(initial_state, lookback, dtype)
    # The exact recurrence is one block as long as the sequence: log T levels solve it.
    rows = time if lookback is None else block_size
    blocks = -(-(time + (0 if position is None else rows - 1)) // rows)
    a, v, gates = _frame(a, v, gates, position, blocks * rows)
    groups = heads if gates is None else gates[0].shape[2]

    def unfold_state(x: Array | None) -> Array | None:
        """[B, carriers, H, D] -> [B, carriers, 1, gate head, group, D]."""
        return None if x is None else x.reshape(batch, -1, 1, groups, heads // groups, features)

    out, block_decays, carriers = xla.block_two_pass(
        lookback if lookback is not None else 1,
        dtype,
        xla.fold(a, rows, groups),
        xla.fold(v, rows, groups),
        None if gates is None else tuple(xla.fold(gate, rows, groups) for gate in gates),
        unfold_state(previous),
        unfold_state(local),
    )
    out = _take(out.reshape(batch, blocks * rows, heads, features), position, time)
    if not return_state:
        return out, None
    return out, state_after(
        time,
        block_decays.reshape(batch, blocks, heads),
        carriers.reshape(batch, blocks, heads, features),
        initial_state,
        block_size=block_size,
        lookback=lookback,
    )


def _by_kernel(module, a, v, gates, initial_state, return_state, *, block_size, lookback):
    kernel = importlib.import_module(module).block_two_pass
    batch, time, heads, features = v.shape
    local, previous, position = initial_carriers(initial_state, lookback, jnp.dtype(jnp.float32))
    if lookback is None and previous is not None:
        local, previous = previous, None
    if position is not None:
        length = -(-(time + block_size - 1) // block_size) * block_size
        a, v, gates = _frame(a, v, gates, position, length)
    out, final = kernel(
        a,
        v,
        gates,
        None if local is None else local[:, 0],
        None if previous is None else previous[:, 0],
        block_size=block_size,
        lookback=lookback,
    )
    out = _take(out, position, time)
    if not return_state:
        return out, None
    if lookback is None:
        state = RecurrenceState.zeros(batch, heads, features, block_size=block_size, lookback=None)
        return out, state.replace(local=final)
    return out, _state_from_last_blocks(
        a, v, gates, initial_state, position, time, block_size=block_size, lookback=lookback
    )


def _state_from_last_blocks(
    a, v, gates, initial_state, position, time, *, block_size, lookback
) -> RecurrenceState:
    """Return the state after `time` tokens of a frame, from its last blocks: too few for a kernel.

    The last token lies in one of the last two blocks, so that no more than the last lookback + 2
    matter; where there are others, what came before the first token does not matter either.
    """
    batch, length, heads, features = v.shape
    blocks = -(-length // block_size)
    skipped = max(0, blocks - (lookback + 2)) * block_size
    a, v, gates = jax.tree.map(lambda x: x[:, skipped:], (a, v, gates))
    a, v, gates = _frame(a, v, gates, None, blocks * block_size - skipped)
    factors = (v,) if gates is None else (gates[0], v)
    block_decays, carriers = xla.reduce_block(
        xla.fold(a, block_size, factors[0].shape[2]),
        tuple(xla.fold(factor, block_size, factors[0].shape[2]) for factor in factors),
        dtype=jnp.dtype(jnp.float32),
    )
    if skipped:
        initial_state = RecurrenceState.zeros(
            batch, heads, features, block_size=block_size, lookback=lookback
        )
        if position is not None:
            initial_state = initial_state.replace(position=position)
    return state_after(
        time - skipped,
        block_decays.reshape(batch, -1, heads),
        carriers.reshape(batch, -1, heads, features),
        initial_state,
        block_size=block_size,
        lookback=lookback,
    )


def _frame(
    a: Array, v: Array, gates: Gates, position: Array | None, length: int
) -> tuple[Array, Array, Gates]:
    """Put the tokens at `position` of a `length`-token frame; others have a = 1 and zeros."""
    gates = None if gates is None else tuple(_place(x, position, length, 0.0) for x in gates)
    return _place(a, position, length, 1.0), _place(v, position, length, 0.0), gates


def _place(x: Array, position: Array | None, length: int, fill: float) -> Array:
    """Put x [B, T, ...] at `position` [B] of a `length`-token frame filled with `fill`."""
    if position is None:
        pad = [(0, length - x.shape[1] if axis == 1 else 0) for axis in range(x.ndim)]
        return x if length == x.shape[1] else jnp.pad(x, pad, constant_values=fill)
    index = jnp.arange(length) - position[:, None]
    valid = (index >= 0) & (index < x.shape[1])
    index = jnp.where(valid, index, 0).reshape(*index.shape, *[1] * (x.ndim - 2))
    valid = valid.reshape(index.shape)
    return jnp.where(valid, jnp.take_along_axis(x, index, axis=1), jnp.asarray(fill, x.dtype))


def _take(x: Array, position: Array | None, time: int) -> Array:
    """Undo `_place`: the `time` tokens of x [B, length, H, D] from `position` on."""
    if position is None:
        return x[:, :time]
    index = position[:, None] + jnp.arange(time)
    return jnp.take_along_axis(x, index[..., None, None], axis=1)
