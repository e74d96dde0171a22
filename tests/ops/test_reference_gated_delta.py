"""The oracle of the gated delta rule: the paper's formula, other routes, finite differences."""

import itertools

import numpy as np
import pytest
from gated_delta_cases import DECAYS, STRENGTHS, draw, draw_documents
from recurrence_cases import assert_close, assert_rows_close

from swr_jax.ops import reference as ref
from swr_jax.ops.reference_gated_delta import (
    gated_delta_gradients,
    gated_delta_rule,
    reset_decays,
)


def by_definition(q, k, v, alpha, beta, initial):
    """S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T, one matrix at a time."""
    o, final = np.zeros_like(v), np.zeros_like(initial)
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[2])):
        s = initial[b, h].T
        for t in range(q.shape[1]):
            key, strength = k[b, t, h], beta[b, t, h]
            s = alpha[b, t, h] * s @ (np.eye(len(key)) - strength * np.outer(key, key))
            s = s + strength * np.outer(v[b, t, h], key)
            o[b, t, h] = s @ q[b, t, h]
        final[b, h] = s.T
    return o, final


@pytest.mark.parametrize("decay", DECAYS)
def test_states_are_those_of_the_published_formula(decay):
    problem = draw(9, decay)
    o, final = gated_delta_rule(*problem.arguments, problem.initial)
    wanted_o, wanted_final = by_definition(*problem.arguments, problem.initial)
    assert_close(o, wanted_o)
    assert_close(final, wanted_final)


def test_without_an_initial_state_it_is_zero():
    problem = draw(9)
    got = gated_delta_rule(*problem.arguments)
    wanted = gated_delta_rule(*problem.arguments, np.zeros_like(problem.initial))
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_memory_without_decay_returns_what_was_written_last_under_a_key():
    """Orthonormal keys, beta = 1: the delta rule replaces a value, and touches no other."""
    keys = np.eye(3)[[0, 1, 0, 2]][None, :, None]
    values = np.array([1.0, 2.0, 30.0, 4.0])[None, :, None, None]
    ones = np.ones((1, 4, 1))
    _, final = gated_delta_rule(keys, keys, values, ones, ones)
    np.testing.assert_array_equal(final[0, 0, :, 0], [30.0, 2.0, 4.0])


def test_orthogonal_keys_make_it_linear_recurrences():
    """Nothing is erased: under each key, h_t = alpha_t h_{t-1} + beta_t v_t, zero elsewhere."""
    problem = draw(8, qk_dim=8)
    k = np.broadcast_to(np.eye(8)[:, None], (2, 8, 3, 8))
    q, _, v, alpha, beta = problem.arguments
    u = np.einsum("bthv,bth,bthk->bthkv", v, beta, k).reshape(2, 8, 3, -1)
    states = ref.linear_recurrence(alpha, u).reshape(2, 8, 3, 8, -1)
    o, final = gated_delta_rule(q, k, v, alpha, beta)
    assert_close(o, np.einsum("bthkv,bthk->bthv", states, q))
    assert_close(final, states[:, -1])


def test_a_new_segment_starts_from_zero():
    problem = draw(30, batch=1)
    documents = np.repeat([3, 1, 2], [7, 1, 22])[None]
    o, final = gated_delta_rule(*problem.arguments, problem.initial, documents)
    for first, last in ((0, 7), (7, 8), (8, 30)):
        part = [x[:, first:last] for x in problem.arguments]
        initial = problem.initial if first == 0 else None
        wanted, end = gated_delta_rule(*part, initial)
        np.testing.assert_array_equal(o[:, first:last], wanted)
    np.testing.assert_array_equal(final, end)


def gradients_by_differences(problem, documents):
    *arguments, initial = problem[:6]

    def loss(*changed):
        *arguments, initial = changed
        o, final = gated_delta_rule(*arguments, initial, documents)
        return np.sum(o * problem.o_bar) + np.sum(final * problem.final_bar)

    values = (*arguments, initial)
    # Quadratic in a key, affine in every other number: central differences are exact.
    return [
        ref.finite_difference_gradient(
            lambda x, i=i: loss(*values[:i], x, *values[i + 1 :]), value, step=0.5
        )
        for i, value in enumerate(values)
    ]


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("length", [1, 5])
def test_gradients_are_those_of_finite_differences(length, decay, segments):
    problem = draw(length, decay, heads=2, qk_dim=3, v_dim=2)
    documents = draw_documents(length, seed=1) if segments else None
    got = gated_delta_gradients(*problem.arguments, *problem.cotangents, problem.initial, documents)
    wanted = gradients_by_differences(problem, documents)
    for name, x, exact in zip(got._fields, got, wanted, strict=True):
        assert_rows_close(x, exact, 1e-11, name)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_gradients_at_every_writing_strength(strength):
    problem = draw(5, "some zeros", strength, heads=2, qk_dim=3, v_dim=2)
    got = gated_delta_gradients(*problem.arguments, *problem.cotangents, problem.initial)
    for x, exact in zip(got, gradients_by_differences(problem, None), strict=True):
        assert_close(x, exact, 1e-11)


def test_gradients_without_states_are_those_of_zero_states():
    problem = draw(7)
    zero = np.zeros_like(problem.initial)
    got = gated_delta_gradients(*problem.arguments, problem.o_bar)
    wanted = gated_delta_gradients(*problem.arguments, problem.o_bar, zero, zero)
    for x, exact in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(x, exact)


def test_a_zero_decay_has_a_gradient_and_a_reset_has_none():
    problem = draw(6, "zeros", batch=1)
    gradients = gated_delta_gradients(*problem.arguments, problem.o_bar)
    assert (np.abs(gradients.alpha[:, 1:]) > 1e-3).all()
    documents = np.arange(6)[None]
    gradients = gated_delta_gradients(*problem.arguments, problem.o_bar, segment_ids=documents)
    assert not gradients.alpha[:, 1:].any()


def test_resets_leave_their_input_and_the_first_token_alone():
    alpha = np.full((1, 4, 2), 0.5)
    documents = np.array([[1, 1, 0, 1]])
    got = reset_decays(alpha, documents)
    np.testing.assert_array_equal(got[0, :, 0], [0.5, 0.5, 0.0, 0.0])
    assert (alpha == 0.5).all()
    np.testing.assert_array_equal(reset_decays(alpha, None), alpha)
