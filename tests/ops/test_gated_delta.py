"""The gated delta rule against its float64 oracle: outputs, states, every gradient."""

import functools

import jax
import numpy as np
import pytest
from gated_delta_cases import draw
from recurrence_cases import assert_rows_close

from swr_jax import GatedDeltaState, gated_delta_rule, gated_delta_rule_step
from swr_jax.ops import reference_gated_delta as ref

FLOAT32 = 1e-5
NAMES = ("o", "final", *ref.Gradients._fields)


@functools.partial(jax.jit, static_argnames="chunk_size")
def evaluate(arguments, initial, cotangents, segment_ids=None, *, chunk_size):
    """Output, last state, and the gradients of all arguments and of the initial state."""

    def run(*arguments):
        *arguments, initial = arguments
        o, state = gated_delta_rule(
            *arguments,
            chunk_size=chunk_size,
            initial_state=GatedDeltaState(initial),
            segment_ids=segment_ids,
            return_state=True,
        )
        return o, state.memory

    found, pull = jax.vjp(run, *arguments, initial)
    return *found, *pull(cotangents)


def exact(problem, segment_ids=None):
    """The oracle's answer, in the order of `evaluate`."""
    start = (problem.initial, segment_ids)
    return (
        *ref.gated_delta_rule(*problem.arguments, *start),
        *ref.gated_delta_gradients(*problem.arguments, *problem.cotangents, *start),
    )


def check(problem, chunk_size, segment_ids=None, tolerance=FLOAT32):
    problem = problem.rounded(np.float32)
    got = evaluate(
        problem.arguments, problem.initial, problem.cotangents, segment_ids, chunk_size=chunk_size
    )
    for name, x, wanted in zip(NAMES, got, exact(problem, segment_ids), strict=True):
        assert_rows_close(x, wanted, tolerance, name)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 37])
def test_every_length_and_every_gradient(length):
    check(draw(length, "some zeros"), 16)


@pytest.mark.parametrize("length", [1, 16, 21])
def test_prefill_and_steps_are_one_call(length):
    problem = draw(length + 5).rounded(np.float32)
    initial = GatedDeltaState(problem.initial)
    step = jax.jit(gated_delta_rule_step)
    whole, last = gated_delta_rule(*problem.arguments, initial_state=initial, return_state=True)
    prompt = [x[:, :length] for x in problem.arguments]
    o, state = gated_delta_rule(*prompt, chunk_size=16, initial_state=initial, return_state=True)
    assert_rows_close(o, whole[:, :length], FLOAT32)
    for t in range(length, length + 5):
        state, o = step(state, *(x[:, t] for x in problem.arguments))
        assert_rows_close(o, whole[:, t], FLOAT32)
    assert_rows_close(state.memory, last.memory, FLOAT32)
