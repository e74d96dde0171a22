"""mLSTM against the float64 recurrence: outputs, last states, and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlstm_cases import (
    FIELDS,
    Kind,
    assert_all_close,
    assert_close,
    draw,
    evaluate,
    expect,
    expect_terms,
    quick_jit,
)

from swr_jax import MLSTMState, mlstm
from swr_jax.ops import reference_mlstm as ref
from swr_jax.ops.reference import relative_rms

FLOAT32 = 1e-5
SIGMOID = {"input_gate": "sigmoid"}
BARE = SIGMOID | {"normalize": False}


@pytest.mark.parametrize(("length", "options"), [(1, {}), (17, BARE), (53, {}), (53, SIGMOID)])
def test_results_and_gradients_are_those_of_the_recurrence(length, options):
    """Every kind of gate, documents, an initial state, cotangents of h and of the last state."""
    problem = draw(length)
    got = evaluate(problem, chunk_size=16, **options)
    assert_all_close(got, expect(problem, **options), FLOAT32)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, SIGMOID, BARE], ids=str)
@pytest.mark.parametrize(
    ("length", "chunk_size", "sizes"),
    [
        (5, 1, (1, 1, 1)),
        (31, 32, (1, 3, 2)),
        (127, 128, (2, 16, 24)),
        (128, 128, (1, 8, 8)),
        (129, 128, (3, 1, 6)),
        (257, 256, (1, 13, 1)),
        (521, 512, (1, 7, 11)),
        (1009, 128, (2, 17, 33)),
        (1009, 16, (1, 8, 5)),
        (1009, 512, (1, 8, 5)),
    ],
)
def test_any_length_chunk_and_size(length, chunk_size, sizes, options):
    heads, qk_dim, v_dim = sizes
    problem = draw(length, heads=heads, qk_dim=qk_dim, v_dim=v_dim)
    got = evaluate(problem, chunk_size=chunk_size, **options)
    terms = expect_terms(problem, **options)
    assert_all_close(got, expect(problem, **options), FLOAT32, terms)


@pytest.mark.parametrize("chunk_size", [4, 512])
def test_the_chunk_size_changes_no_result(chunk_size):
    """512 is one chunk of 150 tokens: the parallel form."""
    problem = draw(150, heads=2)
    assert_all_close(evaluate(problem, chunk_size=chunk_size), expect(problem), FLOAT32)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.builds(
        Kind,
        i=st.floats(-50, 50),
        f=st.floats(-50, 50),
        spread=st.floats(0, 20),
        overlap=st.just(2.0),
        packed=st.floats(0, 0.5),
    ),
    seed=st.integers(0, 2**16),
)
def test_whatever_the_gates(kind, seed):
    problem = draw(23, (kind,), heads=2, qk_dim=4, v_dim=3, seed=seed)
    got = evaluate(problem, chunk_size=8)
    assert_all_close(got, expect(problem), FLOAT32, expect_terms(problem))


# --- states -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, pytest.param(SIGMOID, marks=pytest.mark.slow)], ids=str)
def test_a_sequence_begins_from_the_empty_state(options):
    """No state at all is `MLSTMState.zeros`, of which nothing depends on what its fields hold."""
    problem = draw(21, ("plain", "packed"))
    wanted = expect(problem, from_empty=True, **options)
    assert_all_close(evaluate(problem, from_empty=True, **options), wanted, FLOAT32)

    zeros = MLSTMState.zeros(2, 3, 5, 7)
    for memory in (zeros.memory, problem.state.memory):
        state = ref.MLSTMState(memory, zeros.normalizer, zeros.stabilizer)
        got = evaluate(problem._replace(state=state), **options)
        for name in FIELDS:
            np.testing.assert_array_equal(got.pop(f"d{name}"), 0)
        assert_all_close(got, wanted, FLOAT32)


def test_a_sequence_of_nothing_leaves_the_state_empty():
    """Input gates of exactly zero: no token is written, and no NaN comes of 0 / 0."""
    problem = draw(9, ("plain",))
    q, k, v, _, f = problem.inputs
    closed = jnp.full(f.shape, -jnp.inf)

    def run(q, k, v, f):
        return mlstm(q, k, v, closed, f, chunk_size=4, return_state=True)

    @quick_jit
    def both(*inputs):
        (h, state), pull = jax.vjp(run, *inputs)
        return h, state, pull((h + 1, jax.tree.map(jnp.ones_like, state)))

    h, state, gradients = both(q, k, v, f)
    for x in (h, state.memory, state.normalizer, *gradients):
        np.testing.assert_array_equal(x, 0)
    assert np.isneginf(state.stabilizer).all()


def test_a_state_means_the_same_to_both_gates():
    """e^stabilizer is a factor of it: (C, n, m) and (e C, e n, m - 1) are one state."""
    problem = draw(21, ("plain", "packed"))
    memory, normalizer, stabilizer = problem.state
    other = ref.MLSTMState(np.e * memory, np.e * normalizer, stabilizer - 1)
    for options in ({}, SIGMOID):
        h = evaluate(problem, **options)["h"]
        assert_close(evaluate(problem._replace(state=other), **options)["h"], h, 1e-6)
    got = evaluate(problem, **SIGMOID)
    np.testing.assert_array_equal(got["last stabilizer"], 0)
    starts = {"initial_state": problem.state, "segment_ids": problem.segment_ids}
    _, memory, normalizer = ref.unstabilized(*problem.inputs, **starts, **SIGMOID)
    assert_close(got["last memory"], memory, FLOAT32)
    assert_close(got["last normalizer"], normalizer, FLOAT32)


# --- gradients --------------------------------------------------------------------------------


def test_the_gradient_includes_the_normalizer():
    """Left out, as public kernels do, it is off by more than its own size: loss |h|^2 / 2."""
    problem = draw(64, ("loud",))
    h, _ = ref.recurrence(*problem.inputs)
    got = quick_jit(jax.grad(lambda *x: jnp.sum(mlstm(*x) ** 2) / 2, argnums=range(5)))
    exact = ref.gradients(*problem.inputs, h)
    partial = ref.gradients(*problem.inputs, h, through_normalizer=False)
    for name, gradient in zip("qkvif", got(*problem.inputs), strict=True):
        assert relative_rms(gradient, exact[name]) <= FLOAT32
    for name in "qkif":
        assert relative_rms(partial[name], exact[name]) > 1


def test_on_the_bound_of_the_denominator_the_gradient_is_the_bounds():
    """|s q.n| = 1 = exp(-m) exactly: h = s q.C on this side, so that dh/dk = s q v."""
    one = jnp.ones((1, 1, 1, 1))
    gate = jnp.zeros((1, 1, 1))

    @quick_jit
    @jax.value_and_grad
    def h(k):
        return mlstm(one, k, 3 * one, gate, gate)[0, 0, 0, 0]

    assert h(one) == (3, 3)
    assert h(1.001 * one)[1] < 1e-5


def test_the_stabilizer_belongs_to_the_newest_of_equal_tokens():
    gates = jnp.zeros((1, 3, 1))
    one = jnp.ones((1, 3, 1, 1))

    @quick_jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(i, f):
        return mlstm(one, one, one, i, f, return_state=True)[1].stabilizer[0, 0]

    di, df = gradient(gates, gates + 1000)
    np.testing.assert_array_equal(di[0, :, 0], [0, 0, 1])
    np.testing.assert_array_equal(df, 0)
    i = gates.at[0, 1].set(5)  # the second of three tokens wins; one forget gate lies after it
    di, df = gradient(i, gates)
    np.testing.assert_array_equal(di[0, :, 0], [0, 1, 0])
    np.testing.assert_array_equal(df[0, :, 0], [0, 0, 0.5])


# --- documents, causality ---------------------------------------------------------------------


def test_documents_do_not_see_each_other():
    """A document's results are those of a call of its own, and nothing outside it moves a bit."""
    first, second = 13, 20
    problem = draw(first + second, ("plain", "loud", "silent"))
    documents = jnp.asarray([[3] * first + [1] * second] * 3)

    @quick_jit
    def both(bars, *inputs):
        def run(*inputs):
            return mlstm(*inputs, chunk_size=16, segment_ids=documents, return_state=True)

        results, pull = jax.vjp(run, *inputs)
        return results, pull(bars)

    def pull(tokens, of_state):
        h_bar = np.zeros_like(problem.h_bar)
        h_bar[:, tokens] = problem.h_bar[:, tokens]
        state_bar = jax.tree.map(lambda x: of_state * x, MLSTMState(*problem.state_bar))
        return both((h_bar, state_bar), *problem.inputs)

    before, after = slice(first), slice(first, None)
    (h, state), late = pull(after, of_state=1)
    alone, last = ref.recurrence(*(x[:, after] for x in problem.inputs))
    assert_close(h[:, after], alone, FLOAT32)
    for name in FIELDS:
        assert_close(getattr(state, name), getattr(last, name), FLOAT32, name)

    _, early = pull(before, of_state=0)
    for own, other in zip(early, late, strict=True):
        np.testing.assert_array_equal(own[:, after], 0)
        np.testing.assert_array_equal(other[:, before], 0)
        assert own[:, 1:first].any()
        assert other[:, first + 1 :].any()

    # Enormous numbers next door: even those whose products overflow leave h alone.
    loud = [x.copy() for x in problem.inputs]
    bars = (problem.h_bar * (np.arange(first + second) >= first)[:, None, None],)
    bars += (MLSTMState(*problem.state_bar),)
    for size in (1e30, 1e10):
        for x, value in zip(loud, (size, size, -size, 1e4, -1e4), strict=True):
            x[:, before] = value
        (loud_h, loud_state), gradients = both(bars, *loud)
        np.testing.assert_array_equal(loud_h[:, after], h[:, after])
        jax.tree.map(np.testing.assert_array_equal, loud_state, state)
    for gradient, wanted in zip(gradients, late, strict=True):
        np.testing.assert_array_equal(gradient, wanted)


def test_the_first_token_continues_the_initial_state_whatever_its_document():
    problem = draw(21, ("plain", "packed"))
    documents = np.asarray([[7] * 21, [0] + [1] * 20], np.int32)
    problem = problem._replace(segment_ids=documents)
    got = evaluate(problem)
    assert_all_close(got, expect(problem), FLOAT32)
    assert got["dstabilizer"].all()


def test_no_token_sees_a_later_one():
    """Everything from token t on is replaced: results before t keep every bit."""
    problem = draw(40, ("plain", "wild"))
    other = draw(40, ("wild", "loud"), seed=1)
    run = quick_jit(lambda *x: mlstm(*x, chunk_size=16))
    h = run(*problem.inputs)
    for t in (1, 15, 16, 17, 39):
        pairs = zip(problem.inputs, other.inputs, strict=True)
        changed = run(*(np.concatenate([a[:, :t], b[:, t:]], axis=1) for a, b in pairs))
        np.testing.assert_array_equal(changed[:, :t], h[:, :t])
        assert (changed[:, t] != h[:, t]).all()


# --- numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("input_gate", ["exp", pytest.param("sigmoid", marks=pytest.mark.slow)])
def test_extreme_gates_give_finite_numbers(input_gate):
    """Every combination of them, with zero queries too: no NaN, no infinity, no gradient of one."""
    values = (1e4, -1e4, 100.0, -100.0, "mixed")
    starts = (0.0, -1e4, -np.inf) + ((1e4,) if input_gate == "exp" else ())
    cases = [(i, f, m, q) for i in values for f in values for m in starts for q in (0, 1)]
    rng = np.random.default_rng(0)
    problem = draw(20, ("plain",) * len(cases), heads=1)
    q, _, _, i, f = problem.inputs
    for row, (input_value, forget_value, start, factor) in enumerate(cases):
        for gate, value in ((i, input_value), (f, forget_value)):
            mixed = rng.choice([1e4, -1e4, 30.0, -30.0], size=gate[row].shape)
            gate[row] = mixed if value == "mixed" else value
        q[row] *= factor
        problem.state.stabilizer[row] = start
    problem.state_bar.stabilizer[:] = 0.0
    for name, x in evaluate(problem, chunk_size=8, input_gate=input_gate).items():
        finite = np.isfinite(x).reshape(len(cases), -1).all(axis=1)
        assert finite.all(), (
            name,
            [case for case, ok in zip(cases, finite, strict=True) if not ok],
        )


def test_low_precision_inputs_are_rounded_only_when_read_and_written():
    problem = draw(53, ("plain", "packed", "as initialised", "loud"))
    low = [jnp.asarray(x, jnp.bfloat16) for x in problem.inputs[:3]]
    gates = problem.inputs[3:]
    exact = tuple(np.asarray(x, np.float32) for x in low) + gates
    h_bar = np.asarray(jnp.asarray(problem.h_bar, jnp.bfloat16), np.float32)
    problem = problem._replace(h_bar=h_bar)
    got = evaluate(problem._replace(inputs=(*low, *gates)), chunk_size=16)
    wanted = expect(problem._replace(inputs=exact))
    for name in wanted:
        is_low = name in ("h", "dq", "dk", "dv")
        assert got[name].dtype == (jnp.bfloat16 if is_low else jnp.float32), name
        assert_close(got[name], wanted[name], 4e-3 if is_low else FLOAT32, name)


def test_gates_in_bfloat16_are_computed_in_float32():
    problem = draw(53, ("plain", "as initialised"))
    low = [jnp.asarray(x, jnp.bfloat16) for x in problem.inputs]
    exact = tuple(np.asarray(x, np.float32) for x in low)
    h = quick_jit(lambda *x: mlstm(*x, chunk_size=16))(*low)
    assert_close(h, ref.recurrence(*exact)[0], 4e-3)


@pytest.mark.parametrize("options", [{}, pytest.param(SIGMOID, marks=pytest.mark.slow)], ids=str)
def test_float64_inputs_are_computed_in_float64(options):
    with jax.enable_x64(True):
        problem = draw(45, dtype=np.float64)
        got = evaluate(problem, chunk_size=16, **options)
        assert {x.dtype for x in got.values()} == {np.dtype(np.float64)}
        assert_all_close(got, expect(problem, **options), 1e-12)
