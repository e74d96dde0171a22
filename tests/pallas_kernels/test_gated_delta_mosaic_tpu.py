"""The TPU kernels of the gated delta rule in the interpreter, races detected and scratch poisoned.

Against the float64 recurrence, through the operator.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gated_delta_cases import Problem, draw, draw_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from mlstm_cases import quick_jit
from recurrence_cases import assert_rows_close
from simulation import simulated_tpu

from pallas_kernels.gated_delta import mosaic_tpu
from pallas_kernels.gated_delta.mosaic_tpu_chunk import unit_lower_inverse
from pallas_kernels.gated_delta.mosaic_tpu_plan import TuningConfig
from swr_jax import GatedDeltaState, gated_delta_rule
from swr_jax.ops import reference_gated_delta as ref
from swr_jax.ops.gated_delta_evaluation import evaluate as evaluation

FLOAT32 = 1e-5
BFLOAT16 = 4e-3
NAMES = ("o", "final", *ref.Gradients._fields)
TPU = {"implementation": "mosaic_tpu"}


@pytest.fixture(autouse=True)
def one_core():
    with simulated_tpu():
        yield
    evaluate.clear_cache()


@functools.partial(quick_jit, static_argnames="implementation")
def evaluate(arguments, initial, cotangents, segment_ids, *, implementation="mosaic_tpu"):
    """Output, last state, and the gradients of all arguments and of the initial state."""

    def run(*arguments):
        *arguments, initial = arguments
        o, state = gated_delta_rule(
            *arguments,
            initial_state=GatedDeltaState(initial),
            segment_ids=segment_ids,
            return_state=True,
            implementation=implementation,
        )
        return o, state.memory

    found, pull = jax.vjp(run, *arguments, initial)
    return *found, *pull(cotangents)


def in_precision(problem, dtype):
    """q, k, v and the cotangent of o in a dtype, all else in float32."""
    low = {name: jnp.asarray(getattr(problem, name), dtype) for name in ("q", "k", "v", "o_bar")}
    return Problem(*(jnp.asarray(x, jnp.float32) for x in problem))._replace(**low)


def check(problem, documents=None, *, dtype=jnp.float32, tolerance=FLOAT32, rows=...):
    """Everything that `evaluate` returns is what the oracle finds for these numbers."""
    problem = in_precision(problem, dtype)
    got = evaluate(problem.arguments, problem.initial, problem.cotangents, documents)
    exact = Problem(*(np.asarray(x, np.float64) for x in problem))
    start = (exact.initial, documents)
    wanted = (
        *ref.gated_delta_rule(*exact.arguments, *start),
        *ref.gated_delta_gradients(*exact.arguments, *exact.cotangents, *start),
    )
    given = (problem.o_bar, problem.initial, *problem.arguments, problem.initial)
    for name, x, expected, like in zip(NAMES, got, wanted, given, strict=True):
        assert x.dtype == like.dtype, name
        assert_rows_close(x[rows], expected[rows], tolerance, name)


@pytest.mark.parametrize(
    ("length", "heads", "qk_dim", "v_dim"),
    [
        (1, 3, 4, 1),
        (131, 1, 5, 7),
        pytest.param(127, 2, 16, 9, marks=pytest.mark.slow),
        pytest.param(128, 1, 8, 3, marks=pytest.mark.slow),
        pytest.param(129, 5, 3, 140, marks=pytest.mark.slow),
        pytest.param(1009, 4, 130, 33, marks=pytest.mark.slow),
    ],
)
def test_results_and_gradients_are_those_of_the_recurrence(length, heads, qk_dim, v_dim):
    """Every kind of gate, keys that are all the same, documents; states before and after."""
    check(*draw_rows(length, heads, qk_dim, v_dim))


# Of the rows of `draw_rows`: of keys that are all the same nothing is left but rounding errors.
DIFFERENT_KEYS = np.array([row for row in range(14) if row != 11])


@pytest.mark.parametrize(
    ("length", "sizes", "dtype"),
    [
        (260, (2, 16, 24), jnp.bfloat16),
        pytest.param(130, (1, 16, 24), jnp.float16, marks=pytest.mark.slow),
        pytest.param(300, (1, 128, 256), jnp.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_half_precision(length, sizes, dtype):
    """What is computed from inputs of 16 bits is not rounded to 16 bits on the way."""
    problem, documents = draw_rows(length, *sizes)
    check(problem, documents, dtype=dtype, tolerance=BFLOAT16, rows=DIFFERENT_KEYS)


@pytest.mark.slow
def test_features_that_fill_several_registers():
    check(draw(200, "near one", heads=2, batch=1, qk_dim=256, v_dim=384))


@given(
    seed=st.integers(0, 2**16),
    size=st.sampled_from([0.01, 0.3, 1.0, 3.0]),
    alike=st.booleans(),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
@settings(max_examples=20, deadline=None)
def test_the_inverse(seed, size, alike, dtype):
    """Of any triangle whose inverse is not enormous: here up to about 1e3, from 1 of keys alike."""
    rng = np.random.default_rng(seed)
    lower = np.full((128, 128), min(size, 1.0)) if alike else rng.standard_normal((128, 128)) * size
    lower = np.tril(lower, -1) / (1 if alike else np.sqrt(128))
    expected = np.linalg.inv(np.eye(128) + lower)
    found = _inverse(jnp.asarray(lower, jnp.float32), dtype)
    tolerance = 1e-4 if dtype == jnp.bfloat16 else 1e-5
    scale = np.abs(expected).max()
    assert np.sqrt(np.mean((np.asarray(found) - expected) ** 2)) <= tolerance * scale


@functools.partial(jax.jit, static_argnums=1)
def _inverse(lower, dtype):
    steps = unit_lower_inverse(lower, dtype)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def _arrays(batch=1, time=600, heads=2, q_dim=8, v_dim=8):
    rng = np.random.default_rng(time)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    q, k = (normal(batch, time, heads, q_dim) / np.sqrt(q_dim) for _ in range(2))
    alpha, beta = (jnp.asarray(rng.uniform(size=(batch, time, heads)), jnp.float32) for _ in "ab")
    v, do = (normal(batch, time, heads, v_dim) for _ in range(2))
    memory, dmemory = (normal(batch, heads, q_dim, v_dim) for _ in range(2))
    return (q, k, v, alpha, beta, memory), (do, dmemory)


def _passes(config, arguments, cotangents):
    def run(*arguments):
        return mosaic_tpu.gated_delta_rule(*arguments, config=config)

    found, pull = jax.vjp(run, *arguments)
    return *found, *pull(cotangents)


@pytest.mark.slow
def test_tuning_changes_no_bit():
    """Heads and chunks at a time; the last step of the default has fewer chunks than the others."""
    given = _arrays()
    run = quick_jit(_passes, static_argnums=0)
    expected = run(TuningConfig(), *given)
    for found, wanted in zip(run(TuningConfig(heads=1, together=1), *given), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_last_step_with_fewer_chunks():
    """One kernel call forward, one backward, over two steps of two chunks and of one."""
    given = _arrays(time=257, heads=1)
    found = quick_jit(_passes, static_argnums=0)(TuningConfig(together=2), *given)
    (*arguments, memory), cotangents = jax.tree.map(lambda x: np.asarray(x, np.float64), given)
    wanted = (
        *ref.gated_delta_rule(*arguments, memory),
        *ref.gated_delta_gradients(*arguments, *cotangents, memory),
    )
    for name, x, exact in zip(NAMES, found, wanted, strict=True):
        assert_rows_close(x, exact, FLOAT32, name)


@pytest.mark.slow
def test_two_cores_share_the_batch():
    given = _arrays(batch=2, time=140, heads=1)
    expected = quick_jit(_passes, static_argnums=0)(TuningConfig(), *given)
    with simulated_tpu(cores=2):
        found = quick_jit(functools.partial(_passes, TuningConfig()))(*given)
    for x, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(x, wanted)


@pytest.mark.slow
def test_under_vmap():
    inputs = draw(20, batch=2, heads=1).rounded(np.float32).arguments

    def loss(implementation, *x):
        return jnp.sum(gated_delta_rule(*x, implementation=implementation) ** 2)

    def of_a_row(*x):
        return loss("mosaic_tpu", *(y[None] for y in x))

    found = quick_jit(jax.vmap(jax.grad(of_a_row, argnums=range(5))))(*inputs)
    wanted = jax.grad(functools.partial(loss, "xla"), argnums=range(5))(*inputs)
    for x, y in zip(found, wanted, strict=True):
        assert_rows_close(x, np.asarray(y, np.float64), FLOAT32)


def test_without_queries_there_is_a_state_and_its_gradient():
    """As a device makes of its part of a sequence what it does to the memory before it."""
    (_, *arguments), (_, dmemory) = _arrays(time=130, heads=1)

    def both(implementation, dmemory, *arguments):
        def last(*arguments):
            return evaluation(implementation, None, *arguments, chunk_size=64)[1]

        memory, pull = jax.vjp(last, *arguments)
        return memory, *pull(dmemory)

    run = quick_jit(both, static_argnums=0)
    found, wanted = (run(name, dmemory, *arguments) for name in ("mosaic_tpu", "xla"))
    for x, y in zip(found, wanted, strict=True):
        assert_rows_close(x, np.asarray(y, np.float64), FLOAT32)


def test_each_argument_has_a_dtype_of_its_own():
    problem = draw(20, batch=1, heads=1).rounded(np.float32)
    dtypes = [jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32, jnp.bfloat16, jnp.bfloat16]
    arguments = [jnp.asarray(x, dtype) for x, dtype in zip(problem[:6], dtypes, strict=True)]
    *given, initial = arguments
    found = evaluate(tuple(given), initial, problem.cotangents, None)
    exact = [np.asarray(x, np.float64) for x in arguments]
    wanted = (
        *ref.gated_delta_rule(*exact),
        *ref.gated_delta_gradients(*exact[:5], *problem.cotangents, exact[5]),
    )
    for name, x, y, dtype in zip(
        NAMES, found, wanted, [jnp.float32, jnp.float32, *dtypes], strict=True
    ):
        assert x.dtype == dtype, name
        assert_rows_close(x, y, FLOAT32 if dtype == jnp.float32 else BFLOAT16, name)


def test_forward_mode_is_refused_in_jax_s_own_words():
    arguments, _ = _arrays(time=2, heads=1)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(mosaic_tpu.gated_delta_rule, arguments, arguments)


def test_the_kernels_are_the_default_and_run_where_they_can(monkeypatch):
    """Of numbers in float64, for one, XLA takes care."""
    calls, kernel = [], mosaic_tpu.gated_delta_rule

    def watched(*arrays):
        calls.append(arrays[0].shape)
        return kernel(*arrays)

    monkeypatch.setattr(mosaic_tpu, "gated_delta_rule", watched)
    arguments = draw(3, batch=1, heads=1).arguments
    jax.eval_shape(gated_delta_rule, *(x.astype(np.float32) for x in arguments))
    assert calls == [(1, 3, 1, 5)]
    with jax.enable_x64(True):
        jax.eval_shape(gated_delta_rule, *arguments)
        assert len(calls) == 1
        with pytest.raises(NotImplementedError, match="the maths is in float64: kernels have"):
            gated_delta_rule(*arguments, **TPU)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"batch": 0}, r"q has shape \(0, 600, 2, 8\): the TPU kernels need a size of 1 or more"),
        ({"q_dim": 1024, "v_dim": 1024, "time": 2}, "heads of 1024 and 1024 features take"),
    ],
)
def test_what_is_out_of_reach_is_refused_with_the_reason(sizes, reason):
    arguments, _ = _arrays(**sizes)
    with pytest.raises(NotImplementedError, match=reason):
        mosaic_tpu.gated_delta_rule(*arguments)


def test_a_dtype_out_of_reach_is_refused_by_name():
    (q, *others), _ = _arrays(time=2)
    with pytest.raises(NotImplementedError, match="q has dtype float8_e4m3fn: the TPU kernels"):
        mosaic_tpu.gated_delta_rule(q.astype(jnp.float8_e4m3fn), *others)


@pytest.mark.parametrize("options", [{"heads": 0}, {"together": 0}], ids=str)
def test_a_tuning_out_of_range_is_refused(options):
    with pytest.raises(ValueError, match="=0: must be at least 1"):
        TuningConfig(**options)
