"""Bad input to the recurrences: a ValueError that names the argument, its value and the rule."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swr_jax import (
    RecurrenceState,
    gated_sliding_window_recurrence,
    linear_recurrence,
    recurrence_step,
    sliding_window_recurrence,
)

A, U = jnp.ones((2, 5, 4)), jnp.ones((2, 5, 4, 3))
GATE = jnp.ones((2, 5, 2, 3))


def raises(message):
    return pytest.raises(ValueError, match=re.escape(message))


@pytest.mark.parametrize("block_size", [0, -4, 12, 16.0, True, "16"])
def test_block_size_is_a_power_of_two(block_size):
    with raises(f"{block_size=}: must be an int, a power of two and at least 1"):
        sliding_window_recurrence(A, U, block_size=block_size)
    with raises(f"{block_size=}: must be"):
        RecurrenceState.zeros(1, 1, 1, block_size=block_size)


@pytest.mark.parametrize("lookback", [-1, 1.0, True, "all"])
def test_lookback_is_a_number_of_blocks(lookback):
    with raises(f"{lookback=}: must be an int of at least 0, or None for no limit"):
        sliding_window_recurrence(A, U, lookback=lookback)
    with raises(f"{lookback=}: must be"):
        RecurrenceState.zeros(1, 1, 1, lookback=lookback)


@pytest.mark.parametrize(
    ("a", "u", "message"),
    [
        (A[0], U, "a.shape=(5, 4): must have 3 axes, [B, T, H]"),
        (A, U[0], "u.shape=(5, 4, 3): must have 4 axes, [B, T, H, D]"),
        (A[:, :4], U, "a.shape=(2, 4, 4) and u.shape=(2, 5, 4, 3): a must be [B, T, H]"),
        (A[:1], U, "a.shape=(1, 5, 4) and u.shape=(2, 5, 4, 3)"),
        (A[:, :, :1], U, "a.shape=(2, 5, 1) and u.shape=(2, 5, 4, 3)"),
        (A[:, :0], U[:, :0], "u.shape=(2, 0, 4, 3): every axis of [B, T, H, D] needs at least 1"),
        (A, U[..., :0], "u.shape=(2, 5, 4, 0): every axis"),
        (A.astype(int), U, "a.dtype=int32: must be a floating dtype"),
        (A, U.astype(int), "u.dtype=int32: must be a floating dtype"),
        (A, U.astype(complex), "u.dtype=complex64: must be a floating dtype"),
        (0.5, U, "a is a float: must be an array [B, T, H]"),
        (A, [1.0], "u is a list: must be an array [B, T, H, D]"),
    ],
)
def test_decays_and_inputs_fit_together(a, u, message):
    with raises(message):
        sliding_window_recurrence(a, u)
    with raises(message):
        linear_recurrence(a, u)


@pytest.mark.parametrize(
    ("b", "c", "message"),
    [
        (GATE[0], GATE, "b.shape=(5, 2, 3): must have 4 axes, [B, T, K, D]"),
        (GATE, GATE[:, :4], "c.shape=(2, 4, 2, 3): must be [B, T, K, D] like v, here (2, 5, K, 3)"),
        (GATE[..., :2], GATE, "b.shape=(2, 5, 2, 2): must be [B, T, K, D] like v"),
        (U[:, :, :3], GATE, "b.shape=(2, 5, 3, 3): its number of gate heads, 3, must divide"),
        (GATE[:, :, :0], GATE, "b.shape=(2, 5, 0, 3): its number of gate heads, 0, must divide"),
        (GATE, U, "b.shape=(2, 5, 2, 3) and c.shape=(2, 5, 4, 3): must be equal"),
        (GATE, GATE.astype(int), "c.dtype=int32: must be a floating dtype"),
    ],
)
def test_gates_fit_the_values(b, c, message):
    with raises(message):
        gated_sliding_window_recurrence(A, b, c, U)


def test_errors_of_the_gated_form_call_the_values_v():
    with raises("v.shape=(5, 4, 3): must have 4 axes"):
        gated_sliding_window_recurrence(A, GATE, GATE, U[0])


@pytest.mark.parametrize(
    ("segment_ids", "message"),
    [
        (np.ones((2, 4), int), "segment_ids.shape=(2, 4): must be [B, T], here (2, 5)"),
        (np.ones(5, int), "segment_ids.shape=(5,): must be [B, T]"),
        (np.ones((2, 5)), "segment_ids.dtype=float64: must be an integer dtype"),
    ],
)
def test_segment_ids_number_the_tokens(segment_ids, message):
    with raises(message):
        sliding_window_recurrence(A, U, segment_ids=segment_ids)


def zeros(batch=2, heads=4, features=3, **window):
    return RecurrenceState.zeros(batch, heads, features, **window)


@pytest.mark.parametrize(
    ("state", "window", "message"),
    [
        (
            zeros(block_size=8),
            {},
            "initial_state has block_size=8, lookback=1, the call has block_size=16, lookback=1: a "
            "state continues only in its own window",
        ),
        (zeros(lookback=2), {}, "initial_state has block_size=16, lookback=2"),
        (zeros(), {"lookback": None}, "the call has block_size=16, lookback=None"),
        (zeros(lookback=None), {}, "initial_state has block_size=16, lookback=None"),
        (zeros(features=1), {}, "initial_state is for [B, H, D] = (2, 4, 1), the inputs have"),
        (zeros(batch=1), {}, "initial_state is for [B, H, D] = (1, 4, 3)"),
        (jnp.ones((2, 4)), {}, "initial_state.shape=(2, 4): must have 3 axes, [B, H, D]"),
        (jnp.ones((2, 3, 4)), {}, "initial_state is for [B, H, D] = (2, 3, 4)"),
        (jnp.ones((2, 4, 3), int), {}, "initial_state.dtype=int32: must be a floating dtype"),
        (jnp.ones((2, 4, 3)), {"lookback": 0}, "with lookback=0 no block sees an earlier one"),
        (0.0, {}, "initial_state is a float: must be a RecurrenceState or an array"),
    ],
)
def test_an_initial_state_belongs_to_its_window_and_shape(state, window, message):
    with raises(message):
        sliding_window_recurrence(A, U, initial_state=state, **window)


@pytest.mark.parametrize("operator", [sliding_window_recurrence, linear_recurrence])
def test_an_implementation_is_one_that_exists(operator):
    with raises("implementation='cuda': unknown; must be None or one of ["):
        operator(A, U, implementation="cuda")
    np.testing.assert_array_equal(operator(A, U, implementation="xla"), operator(A, U))


def test_an_implementation_is_one_that_this_device_has():
    """No name is replaced by another, silently or otherwise."""
    with raises("implementation='mosaic_gpu': not available on cpu (cpu), which has ['xla']"):
        sliding_window_recurrence(A, U, implementation="mosaic_gpu")


@pytest.mark.parametrize(
    ("a", "u", "message"),
    [
        (jnp.ones((2, 1, 4)), jnp.ones((2, 4, 3)), "a_t.shape=(2, 1, 4): must have 2 axes, [B, H]"),
        (jnp.ones((2, 4)), U[:, :1], "u_t.shape=(2, 1, 4, 3): must have 3 axes, [B, H, D]"),
        (
            jnp.ones((2, 4)),
            jnp.ones((2, 4, 1)),
            "a_t.shape=(2, 4), u_t.shape=(2, 4, 1): the state holds [B, H, D] = (2, 4, 3), so a_t "
            "must be (2, 4) and u_t (2, 4, 3)",
        ),
        (jnp.ones((2, 4), int), jnp.ones((2, 4, 3)), "a_t.dtype=int32: must be a floating dtype"),
    ],
)
def test_a_step_takes_one_token(a, u, message):
    with raises(message):
        recurrence_step(zeros(), a, u)


def test_errors_are_raised_while_tracing_too():
    with raises("a.shape=(2, 4, 4) and u.shape=(2, 5, 4, 3)"):
        jax.jit(sliding_window_recurrence)(A[:, :4], U)


def test_forward_mode_is_refused_by_jax_itself():
    """Only reverse mode has a rule; asking for the other names the reason, and computes nothing."""
    with pytest.raises(TypeError, match=r"forward-mode autodiff .* custom_vjp"):
        jax.jvp(lambda u: sliding_window_recurrence(A, u), (U,), (U,))
    with pytest.raises(TypeError, match=r"forward-mode autodiff .* custom_vjp"):
        jax.jacfwd(lambda a: sliding_window_recurrence(a, U))(A)
