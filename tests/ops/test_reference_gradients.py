"""Gradients of the NumPy oracles are those of finite differences through the streaming form."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrence_cases import assert_close, draw, draw_state, problems

from swr_jax.ops import reference as ref

BLOCK = 8


def state_gradients_by_differences(loss, state):
    """Central differences with respect to each field; `loss` takes a RecurrenceState."""
    return {
        name: ref.finite_difference_gradient(
            lambda value, name=name: loss(state._replace(**{name: value})),
            getattr(state, name),
            step=1.0,
        )
        for name in ("local", "carriers", "decays")
    }


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("kind", ["some zeros", "ones", "tiny", "negative"])
@pytest.mark.parametrize("lookback", [0, 1, 2, None])
@pytest.mark.parametrize("length", [1, 4, 5, 11])
def test_gradients_are_those_of_finite_differences_through_the_stream(
    length, lookback, kind, segments
):
    block_size = 4
    a, u = draw(length, kind, heads=1, features=3)
    x_bar = np.random.default_rng(2).standard_normal(u.shape)
    state = draw_state(2, 1, 3, lookback, block_size)
    ids = np.random.default_rng(3).integers(0, 2, (2, length)) if segments else None

    def loss(a, u, state):
        return np.sum(
            ref.stream(ref.reset_decays(a, ids), u, block_size, lookback, state)[0] * x_bar
        )

    actual = ref.sliding_window_gradients(
        a,
        u,
        x_bar,
        block_size=block_size,
        lookback=lookback,
        segment_ids=ids,
        initial_state=state,
    )
    expected = state_gradients_by_differences(lambda state: loss(a, u, state), state)
    expected["a"] = ref.finite_difference_gradient(lambda a: loss(a, u, state), a, step=1.0)
    expected["u"] = ref.finite_difference_gradient(lambda u: loss(a, u, state), u, step=1.0)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(actual[name], gradient)


@pytest.mark.parametrize("lookback", [0, 1, None])
@pytest.mark.parametrize("gate_heads", [1, 2, 4])
def test_gradients_of_the_gated_form_are_those_of_finite_differences(gate_heads, lookback):
    block_size, length, heads, features = 4, 9, 4, 2
    rng = np.random.default_rng(gate_heads)
    a, v = draw(length, "some zeros", batch=1, heads=heads, features=features)
    b, c = rng.standard_normal((2, 1, length, gate_heads, features))
    y_bar = rng.standard_normal(v.shape)
    state = draw_state(1, heads, features, lookback, block_size)
    window = {"block_size": block_size, "lookback": lookback}

    def loss(state=state, **changed):
        arguments = {"a": a, "b": b, "c": c, "v": v} | changed
        y = ref.gated_sliding_window_recurrence(**arguments, **window, initial_state=state)
        return np.sum(y * y_bar)

    actual = ref.gated_gradients(a, b, c, v, y_bar, **window, initial_state=state)
    expected = state_gradients_by_differences(loss, state)
    for name, value in {"a": a, "b": b, "c": c, "v": v}.items():
        expected[name] = ref.finite_difference_gradient(
            lambda changed, name=name: loss(**{name: changed}), value, step=1.0
        )
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(actual[name], gradient)


def test_gradients_without_a_state_are_those_at_the_zero_state():
    a, u = draw(21)
    x_bar = np.random.default_rng(5).standard_normal(u.shape)
    zero = ref.zero_state(2, 3, 5, 2)
    without = ref.sliding_window_gradients(a, u, x_bar, block_size=BLOCK, lookback=2)
    given = ref.sliding_window_gradients(
        a, u, x_bar, block_size=BLOCK, lookback=2, initial_state=zero
    )
    for name, gradient in given.items():
        np.testing.assert_array_equal(without[name], gradient)
    assert without["local"].any()
    assert without["carriers"].any()
    assert not without["decays"].any()


def test_gradients_cross_no_window_and_no_document_boundary():
    a, u = draw(5 * BLOCK, batch=1)
    x_bar = np.zeros_like(u)
    x_bar[:, 3 * BLOCK + 2] = 1.0
    gradients = ref.sliding_window_gradients(a, u, x_bar, block_size=BLOCK, lookback=1)
    felt = np.zeros(5 * BLOCK, bool)
    felt[2 * BLOCK : 3 * BLOCK + 3] = True
    np.testing.assert_array_equal(gradients["u"].any(axis=(0, 2, 3)), felt)
    felt[2 * BLOCK] = False  # its decay only multiplies inputs that lie before the window
    np.testing.assert_array_equal(gradients["a"].any(axis=(0, 2)), felt)

    ids = np.arange(5 * BLOCK)[None] >= 3 * BLOCK
    gradients = ref.sliding_window_gradients(
        a, u, x_bar, block_size=BLOCK, lookback=1, segment_ids=ids
    )
    assert not gradients["u"][:, : 3 * BLOCK].any()
    assert not gradients["a"][:, : 3 * BLOCK + 1].any()


def test_the_decay_gradient_survives_a_zero_decay():
    """At a_s = 0 the derivative is finite and not zero: x_1 = a_1 u_0 + u_1 has dx_1/da_1 = u_0."""
    a = np.zeros((1, 2, 1))
    u = np.full((1, 2, 1, 1), 3.0)
    gradients = ref.sliding_window_gradients(a, u, np.ones_like(u), block_size=2)
    np.testing.assert_array_equal(gradients["a"][0, :, 0], [0.0, 3.0])


@given(problems(), st.integers(0, 2**16))
@settings(max_examples=100, deadline=None)
def test_gradients_are_directional_derivatives(problem, seed):
    """In direction e the loss, affine in each number, changes by <gradient, e> along one argument.

    x is linear in u and in the state's local and carriers, affine in one token's decays.
    """
    a, u, block_size, lookback, state = problem
    rng = np.random.default_rng(seed)
    x_bar = rng.standard_normal(u.shape)

    def forward(a, u, state):
        return ref.stream(a, u, block_size, lookback, state)[0]

    gradients = ref.sliding_window_gradients(
        a, u, x_bar, block_size=block_size, lookback=lookback, initial_state=state
    )
    one_token = np.zeros_like(a)
    one_token[:, rng.integers(a.shape[1])] = rng.standard_normal(a[:, 0].shape)
    directions = {
        "a": one_token,
        "u": rng.standard_normal(u.shape),
        "local": rng.standard_normal(state.local.shape),
        "carriers": rng.standard_normal(state.carriers.shape),
        "decays": rng.standard_normal(state.decays.shape),
    }
    base = {"a": a, "u": u} | state._asdict()

    def evaluated(name, sign):
        moved = base | {name: base[name] + sign * directions[name]}
        a, u, *fields = moved.values()
        return forward(a, u, ref.RecurrenceState(*fields))

    for name, direction in directions.items():
        change = (evaluated(name, 1.0) - evaluated(name, -1.0)) / 2 * x_bar
        # Relative to the size of the terms: the sum itself may cancel to nearly nothing.
        scale = np.abs(evaluated(name, 1.0) * x_bar).sum()
        scale += np.abs(gradients[name] * direction).sum()
        assert abs(change.sum() - np.sum(gradients[name] * direction)) <= 1e-12 * scale
