"""The mLSTM's streaming state, and the checks of its operators' arguments."""

import dataclasses

import jax
import jax.numpy as jnp

from swr_jax.ops.validation import check_array, check_segment_ids, is_int

Array = jax.Array

INPUT_GATES = ("exp", "sigmoid")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MLSTMState:
    """What an mLSTM remembers between calls: e^stabilizer * memory and e^stabilizer * normalizer.

    With the exponential input gate the stabilizer is m_t = max(log f_t + m_{t-1}, i_t), which keeps
    the other two in range, and -inf before the first token: whatever stands in the fields then
    counts for nothing. With the sigmoid gate, which needs no stabilizer, it comes out as 0; the
    state still means the same, so that a state may pass from one gate to the other.

    Attributes:
        memory: C, [B, H, Dk, Dv]: sums of outer products of key and value.
        normalizer: n, [B, H, Dk]: sums of keys.
        stabilizer: m, [B, H]; at least float32.
    """

    memory: Array
    normalizer: Array
    stabilizer: Array

    @classmethod
    def zeros(
        cls,
        batch: int,
        num_heads: int,
        qk_dim: int,
        v_dim: int,
        dtype: jnp.dtype = jnp.float32,
    ) -> "MLSTMState":
        """Return the state of a sequence that has not begun."""
        gates = jnp.promote_types(dtype, jnp.float32)
        return cls(
            memory=jnp.zeros((batch, num_heads, qk_dim, v_dim), dtype),
            normalizer=jnp.zeros((batch, num_heads, qk_dim), dtype),
            stabilizer=jnp.full((batch, num_heads), -jnp.inf, gates),
        )

    def replace(self, **changes) -> "MLSTMState":
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def check_options(chunk_size: int, input_gate: str, normalize: bool) -> None:
    """Raise ValueError for an option that is not one."""
    if not is_int(chunk_size) or chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"{chunk_size=}: must be an int, a power of two and at least 1")
    if input_gate not in INPUT_GATES:
        raise ValueError(f"{input_gate=}: unknown; must be one of {list(INPUT_GATES)}")
    if not normalize and input_gate == "exp":
        raise ValueError(
            f"{normalize=} with input_gate='exp': the exponential gate is unbounded without its "
            "normalizer; pass input_gate='sigmoid', or leave normalize=True"
        )


def check_inputs(
    q: Array, k: Array, v: Array, i: Array, f: Array, segment_ids: Array | None
) -> None:
    """Raise ValueError unless the arrays of an mLSTM fit together."""
    for name, x, axes in (
        ("q", q, "[B, T, H, Dk]"),
        ("k", k, "[B, T, H, Dk]"),
        ("v", v, "[B, T, H, Dv]"),
        ("i", i, "[B, T, H]"),
        ("f", f, "[B, T, H]"),
    ):
        check_array(name, x, axes)
        if 0 in x.shape:
            raise ValueError(f"{name}.shape={x.shape}: every axis of {axes} needs at least 1")
    if k.shape != q.shape:
        raise ValueError(f"q.shape={q.shape} and k.shape={k.shape}: must be equal, [B, T, H, Dk]")
    for name, x in (("v", v), ("i", i), ("f", f)):
        if x.shape[:3] != q.shape[:3]:
            raise ValueError(
                f"{name}.shape={x.shape}: must begin with [B, T, H] like q, here {q.shape[:3]}"
            )
    if segment_ids is not None:
        check_segment_ids(segment_ids, *q.shape[:2])


def check_state(name: str, state: object, q: Array, v: Array) -> None:
    """Raise ValueError unless a state fits q [B, ..., H, Dk] and v [B, ..., H, Dv]."""
    if not isinstance(state, MLSTMState):
        raise ValueError(
            f"{name} is a {type(state).__name__}: must be an MLSTMState, as MLSTMState.zeros or "
            "return_state=True give one"
        )
    heads = (q.shape[0], q.shape[-2])
    wanted = {
        "memory": (*heads, q.shape[-1], v.shape[-1]),
        "normalizer": (*heads, q.shape[-1]),
        "stabilizer": heads,
    }
    for field, shape in wanted.items():
        found = getattr(state, field)
        if found.shape != shape:
            raise ValueError(
                f"{name}.{field}.shape={found.shape}: must be {shape} for these q and v"
            )


def check_step(state: object, q_t: Array, k_t: Array, v_t: Array, i_t: Array, f_t: Array) -> None:
    """Raise ValueError unless one token's arrays fit each other and a state."""
    for name, x, axes in (
        ("q_t", q_t, "[B, H, Dk]"),
        ("k_t", k_t, "[B, H, Dk]"),
        ("v_t", v_t, "[B, H, Dv]"),
        ("i_t", i_t, "[B, H]"),
        ("f_t", f_t, "[B, H]"),
    ):
        check_array(name, x, axes)
    if k_t.shape != q_t.shape:
        raise ValueError(f"q_t.shape={q_t.shape} and k_t.shape={k_t.shape}: must be equal")
    for name, x in (("v_t", v_t), ("i_t", i_t), ("f_t", f_t)):
        if x.shape[:2] != q_t.shape[:2]:
            raise ValueError(
                f"{name}.shape={x.shape}: must begin with [B, H] like q_t, here {q_t.shape[:2]}"
            )
    check_state("state", state, q_t, v_t)
