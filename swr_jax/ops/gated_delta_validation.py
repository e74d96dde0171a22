"""Argument checks of the gated delta rule, each with the argument, its value and the rule."""

import jax

from swr_jax.ops.validation import check_array, check_segment_ids, is_int

Array = jax.Array


def check_inputs(
    q: Array,
    k: Array,
    v: Array,
    alpha: Array,
    beta: Array,
    *,
    chunk_size: int,
    initial_state: object,
    segment_ids: Array | None,
) -> None:
    """Raise ValueError unless the arguments of a gated delta rule fit together."""
    if not is_int(chunk_size) or chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"{chunk_size=}: must be an int, a power of two and at least 1")
    check_array("q", q, "[B, T, H, Dk]")
    check_array("k", k, "[B, T, H, Dk]")
    check_array("v", v, "[B, T, H, Dv]")
    check_array("alpha", alpha, "[B, T, H]")
    check_array("beta", beta, "[B, T, H]")
    _check_sizes("", "[B, T, H]", q, k, v, alpha, beta)
    if segment_ids is not None:
        check_segment_ids(segment_ids, *v.shape[:2])
    if initial_state is not None:
        shape = (v.shape[0], *k.shape[2:], v.shape[3])
        _check_state("initial_state", initial_state, shape)


def check_step(
    state: object, q_t: Array, k_t: Array, v_t: Array, alpha_t: Array, beta_t: Array
) -> None:
    """Raise ValueError unless one token's arrays fit each other and the state."""
    check_array("q_t", q_t, "[B, H, Dk]")
    check_array("k_t", k_t, "[B, H, Dk]")
    check_array("v_t", v_t, "[B, H, Dv]")
    check_array("alpha_t", alpha_t, "[B, H]")
    check_array("beta_t", beta_t, "[B, H]")
    _check_sizes("_t", "[B, H]", q_t, k_t, v_t, alpha_t, beta_t)
    _check_state("state", state, (*k_t.shape, v_t.shape[2]))


def _check_sizes(
    suffix: str, axes: str, q: Array, k: Array, v: Array, alpha: Array, beta: Array
) -> None:
    for name, x in {"k": k, "v": v}.items():
        if 0 in x.shape:
            raise ValueError(f"{name}{suffix}.shape={x.shape}: every axis needs at least 1")
    if q.shape != k.shape:
        raise ValueError(f"q{suffix}.shape={q.shape} and k{suffix}.shape={k.shape}: must be equal")
    shared = k.shape[:-1]
    for name, x in {"v": v, "alpha": alpha, "beta": beta}.items():
        if x.shape[: len(shared)] != shared:
            raise ValueError(
                f"{name}{suffix}.shape={x.shape} and k{suffix}.shape={k.shape}: must agree in "
                f"{axes}, here {shared}"
            )


def _check_state(name: str, state: object, shape: tuple[int, ...]) -> None:
    if not hasattr(state, "memory"):
        raise ValueError(
            f"{name} is a {type(state).__name__}: must be a GatedDeltaState; start from "
            "GatedDeltaState.zeros"
        )
    if state.memory.shape != shape:
        raise ValueError(
            f"{name} is for [B, H, Dk, Dv] = {state.memory.shape}, the inputs have {shape}"
        )
