"""Argument checks of the operators: each error names the argument, its value and the rule."""

import jax
import jax.numpy as jnp

Array = jax.Array


def check_window(block_size: int, lookback: int | None) -> None:
    """Raise ValueError unless block_size is a power of two and lookback None or at least 0."""
    if not is_int(block_size) or block_size < 1 or block_size & (block_size - 1):
        raise ValueError(f"{block_size=}: must be an int, a power of two and at least 1")
    if lookback is not None and (not is_int(lookback) or lookback < 0):
        raise ValueError(f"{lookback=}: must be an int of at least 0, or None for no limit")


def check_inputs(
    a: Array, v: Array, gates: tuple[Array, Array] | None, segment_ids: Array | None
) -> None:
    """Raise ValueError unless the arrays of a recurrence fit together."""
    value = "u" if gates is None else "v"
    check_array("a", a, "[B, T, H]")
    check_array(value, v, "[B, T, H, D]")
    if 0 in v.shape:
        raise ValueError(f"{value}.shape={v.shape}: every axis of [B, T, H, D] needs at least 1")
    if a.shape != v.shape[:3]:
        raise ValueError(
            f"a.shape={a.shape} and {value}.shape={v.shape}: a must be [B, T, H] for "
            f"{value} [B, T, H, D], here {v.shape[:3]}"
        )
    batch, time, heads, features = v.shape
    for name, gate in zip("bc", gates or (), strict=False):
        check_array(name, gate, "[B, T, K, D]")
        if gate.shape[:2] != (batch, time) or gate.shape[3] != features:
            raise ValueError(
                f"{name}.shape={gate.shape}: must be [B, T, K, D] like v, here "
                f"({batch}, {time}, K, {features})"
            )
        if gate.shape[2] == 0 or heads % gate.shape[2]:
            raise ValueError(
                f"{name}.shape={gate.shape}: its number of gate heads, {gate.shape[2]}, must "
                f"divide the number of heads, {heads}"
            )
    if gates is not None and gates[0].shape != gates[1].shape:
        raise ValueError(f"b.shape={gates[0].shape} and c.shape={gates[1].shape}: must be equal")
    if segment_ids is not None:
        check_segment_ids(segment_ids, batch, time)


def check_step(a_t: Array, u_t: Array, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless one token's arrays fit a state of shape (B, H, D)."""
    check_array("a_t", a_t, "[B, H]")
    check_array("u_t", u_t, "[B, H, D]")
    if u_t.shape != shape or a_t.shape != shape[:2]:
        raise ValueError(
            f"a_t.shape={a_t.shape}, u_t.shape={u_t.shape}: the state holds [B, H, D] = {shape}, "
            f"so a_t must be {shape[:2]} and u_t {shape}"
        )


def check_initial_state(
    state: object, shape: tuple[int, int, int], block_size: int, lookback: int | None
) -> None:
    """Raise ValueError unless an initial state belongs to this call's shape and window."""
    if hasattr(state, "lookback"):
        same_blocks = lookback is None or state.block_size == block_size
        if state.lookback != lookback or not same_blocks:
            raise ValueError(
                f"initial_state has block_size={state.block_size}, lookback={state.lookback}, the "
                f"call has {block_size=}, {lookback=}: a state continues only in its own window; "
                "start from RecurrenceState.zeros with the window that you want"
            )
        found = state.local.shape
    else:
        if not hasattr(state, "shape"):
            raise ValueError(
                f"initial_state is a {type(state).__name__}: must be a RecurrenceState or an array"
            )
        check_array("initial_state", state, "[B, H, D]")
        if lookback == 0:
            raise ValueError(
                "initial_state is an array, the carrier of an earlier block, but with lookback=0 "
                "no block sees an earlier one: pass a RecurrenceState, or lookback >= 1"
            )
        found = state.shape
    if found != shape:
        raise ValueError(f"initial_state is for [B, H, D] = {found}, the inputs have {shape}")


def check_segment_ids(segment_ids: Array, batch: int, time: int) -> None:
    """Raise ValueError unless segment_ids are integers [B, T]."""
    if jnp.ndim(segment_ids) != 2 or segment_ids.shape != (batch, time):
        raise ValueError(
            f"segment_ids.shape={jnp.shape(segment_ids)}: must be [B, T], here ({batch}, {time})"
        )
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(f"segment_ids.dtype={segment_ids.dtype}: must be an integer dtype")


def is_int(x: object) -> bool:
    """Whether x is an int, booleans excepted."""
    return isinstance(x, int) and not isinstance(x, bool)


def check_array(name: str, x: Array, axes: str) -> None:
    """Raise ValueError unless x is a floating array of as many axes as "[B, T, H]" names."""
    if not hasattr(x, "dtype") or not hasattr(x, "shape"):
        raise ValueError(f"{name} is a {type(x).__name__}: must be an array {axes}")
    rank = axes.count(",") + 1
    if len(x.shape) != rank:
        raise ValueError(f"{name}.shape={x.shape}: must have {rank} axes, {axes}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name}.dtype={x.dtype}: must be a floating dtype")
