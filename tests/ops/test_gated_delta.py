"""The gated delta rule against its float64 oracle: outputs, states, every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gated_delta_cases import Problem, draw, draw_documents, draw_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrence_cases import assert_rows_close

from swr_jax import GatedDeltaState, gated_delta_rule, gated_delta_rule_step
from swr_jax.ops import gated_delta_chunk
from swr_jax.ops import reference_gated_delta as ref

FLOAT32 = 1e-5
NAMES = ("o", "final", *ref.Gradients._fields)


@functools.partial(jax.jit, static_argnames="chunk_size")
def evaluate(arguments, initial, cotangents, segment_ids, *, chunk_size):
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


def check(problem, chunk_size, segment_ids=None, tolerance=FLOAT32):
    """Everything that `evaluate` returns is what the oracle finds for these numbers."""
    got = evaluate(
        problem.arguments, problem.initial, problem.cotangents, segment_ids, chunk_size=chunk_size
    )
    problem = Problem(*(np.asarray(x, np.float64) for x in problem))
    start = (problem.initial, segment_ids)
    wanted = (
        *ref.gated_delta_rule(*problem.arguments, *start),
        *ref.gated_delta_gradients(*problem.arguments, *problem.cotangents, *start),
    )
    for name, x, exact in zip(NAMES, got, wanted, strict=True):
        assert_rows_close(x, exact, tolerance, name)


@pytest.mark.parametrize(
    ("length", "chunk_size", "heads", "qk_dim", "v_dim"),
    [
        (1, 64, 3, 4, 1),
        (15, 16, 3, 5, 7),
        (16, 16, 1, 8, 3),
        (17, 16, 2, 3, 1),
        (211, 64, 1, 13, 6),
    ],
)
def test_values_and_every_gradient(length, chunk_size, heads, qk_dim, v_dim):
    problem, documents = draw_rows(length, heads, qk_dim, v_dim)
    check(problem, chunk_size, documents)


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [1, 16, 32, 64, 128, 512])
@pytest.mark.parametrize("length", [2, 63, 64, 65, 127, 1009])
def test_values_and_every_gradient_at_more_lengths_and_chunks(length, chunk_size):
    problem, documents = draw_rows(length, 2, 16, 9)
    check(problem, chunk_size, documents)


@given(
    length=st.integers(1, 24),
    kind=st.sampled_from(["uniform", "some zeros", "near one", "tiny"]),
    seed=st.integers(0, 2**16),
    packed=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_any_problem(length, kind, seed, packed):
    """Shorter problems are the beginning of one that is compiled once."""
    problem = draw(24, kind, batch=1, heads=1, qk_dim=3, v_dim=2, seed=seed)
    problem = problem.rounded(np.float32)
    documents = draw_documents(24, 1, seed) * packed
    # No token after the last one counts: it writes nothing, keeps everything, is not looked at.
    after = (slice(None), slice(length, None))
    problem.alpha[after], problem.beta[after], problem.o_bar[after] = 1.0, 0.0, 0.0
    documents[after] = documents[:, length - 1 : length]
    check(problem, 8, documents)


def test_chunks_change_nothing():
    problem, documents = draw_rows(77, 1, 4, 3)
    run = jax.jit(gated_delta_rule, static_argnames="chunk_size")
    first, *others = (
        run(*problem.arguments, chunk_size=size, segment_ids=documents) for size in (1, 16, 512)
    )
    for o in others:
        assert_rows_close(o, first, FLOAT32)


def test_chunks_prepared_in_groups():
    """As on accelerators: 5 chunks in 2 groups of 3, of which the last one is padding."""
    problem, _ = draw_rows(35, 1, 4, 3)

    def run(*arguments):
        return gated_delta_chunk.gated_delta_rule(*arguments, chunk=8, group=4)

    @jax.jit
    def both(problem):
        found, pull = jax.vjp(run, *problem[:6])
        return *found, *pull(problem.cotangents)

    wanted = (
        *ref.gated_delta_rule(*problem.arguments, problem.initial),
        *ref.gated_delta_gradients(*problem.arguments, *problem.cotangents, problem.initial),
    )
    for name, x, exact in zip(NAMES, both(problem), wanted, strict=True):
        assert_rows_close(x, exact, FLOAT32, name)


@pytest.mark.parametrize("gates", [jnp.bfloat16, jnp.float32])
def test_bfloat16_in_and_out_with_float32_inside(gates):
    """Compared with the oracle at the rounded inputs: what is left is the rounding of results."""
    problem = draw(150, "near one", qk_dim=16, v_dim=16)
    dtypes = Problem(*(jnp.bfloat16,) * 3, gates, gates, jnp.float32, jnp.bfloat16, jnp.float32)
    problem = Problem(*map(jnp.asarray, problem, dtypes))
    check(problem, 64, tolerance=4e-3)
    o, state = jax.eval_shape(
        functools.partial(gated_delta_rule, return_state=True), *problem.arguments
    )
    assert o.dtype == jnp.bfloat16
    assert state.memory.dtype == jnp.float32


def test_float64_where_an_input_is():
    with jax.enable_x64(True):
        check(draw(37, "some zeros"), 16, draw_documents(37), 1e-13)


# --- decays of zero, and documents --------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_a_zero_decay_and_a_new_document_forget_exactly(packed):
    """Not even a rounding error of the past is left, however large it was."""
    problem, documents = draw_rows(40, 2, 4, 3)
    documents[:] = np.arange(40) >= 20 if packed else 0
    if not packed:
        problem.alpha[:, 20] = 0.0
    run = jax.jit(functools.partial(gated_delta_rule, chunk_size=16, return_state=True))
    wanted = run(*problem.arguments, segment_ids=documents)
    problem.v[:, :20] *= 1e30
    o, state = run(*problem.arguments, segment_ids=documents)
    np.testing.assert_array_equal(o[:, 20:], wanted[0][:, 20:])
    np.testing.assert_array_equal(state.memory, wanted[1].memory)


def test_no_token_sees_a_later_one():
    problem = draw(40).rounded(np.float32)
    run = jax.jit(functools.partial(gated_delta_rule, chunk_size=16))
    o = run(*problem.arguments)
    for changed in (5, 16, 31):
        later = [x.copy() for x in problem.arguments]
        for x in later:
            x[:, changed:] = 0.7 - x[:, changed:]
        got = run(*later)
        np.testing.assert_array_equal(got[:, :changed], o[:, :changed])
        assert (np.abs(got - o)[:, changed] > 1e-3).any(axis=-1).all()


# --- streaming ----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 15, 16, 17])
def test_a_prompt_and_steps_are_one_call(length):
    problem, _ = draw_rows(length + 4, 2, 4, 3)
    initial = GatedDeltaState(problem.initial)
    step = jax.jit(gated_delta_rule_step)
    wanted, last = ref.gated_delta_rule(*problem.arguments, problem.initial)
    prompt = [x[:, :length] for x in problem.arguments]
    o, state = gated_delta_rule(*prompt, chunk_size=16, initial_state=initial, return_state=True)
    assert_rows_close(o, wanted[:, :length], FLOAT32)
    for t in range(length, length + 4):
        state, o = step(state, *(x[:, t] for x in problem.arguments))
        assert_rows_close(o, wanted[:, t], FLOAT32)
    assert_rows_close(state.memory, last, FLOAT32)


def test_gradients_through_a_step_are_those_of_a_call_of_one_token():
    problem = draw(1, "some zeros").rounded(np.float32)

    def step(*arguments):
        *arguments, initial = arguments
        state, o = gated_delta_rule_step(GatedDeltaState(initial), *(x[:, 0] for x in arguments))
        return o[:, None], state.memory

    _, pull = jax.vjp(step, *problem.arguments, problem.initial)
    wanted = ref.gated_delta_gradients(*problem.arguments, *problem.cotangents, problem.initial)
    for name, got, exact in zip(wanted._fields, pull(problem.cotangents), wanted, strict=True):
        assert_rows_close(got, exact, FLOAT32, name)


def test_a_step_keeps_the_dtype_of_values_and_of_the_state():
    problem = draw(1)
    arguments = [jnp.asarray(x[:, 0], jnp.bfloat16) for x in problem.arguments]
    state, o = gated_delta_rule_step(GatedDeltaState.zeros(2, 3, 5, 7), *arguments)
    assert o.dtype == jnp.bfloat16
    assert state.memory.dtype == jnp.float32
