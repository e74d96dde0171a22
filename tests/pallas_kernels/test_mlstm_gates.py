"""What the mLSTM's kernels share, with passes in plain JAX where the kernels would be."""

import jax
import jax.numpy as jnp
import mlstm_cases
import mlstm_passes
import numpy as np
import pytest
from mlstm_cases import assert_all_close, assert_close, draw, evaluate, expect, expect_terms

from pallas_kernels.mlstm import gates
from pallas_kernels.mlstm.gradient import entry_point
from swr_jax import mlstm
from swr_jax.ops import mlstm_evaluation
from swr_jax.ops.mlstm_chunkwise import State

FLOAT32 = 1e-5
SIGMOID = {"input_gate": "sigmoid"}
BARE = SIGMOID | {"normalize": False}


@pytest.fixture(autouse=True)
def plain_passes(monkeypatch):
    """Run the operators on `mlstm_passes`."""
    kernel = entry_point(
        mlstm_passes.forward,
        mlstm_passes.backward,
        lambda chunk_size, *_: (2 * chunk_size, chunk_size),
        lambda *_: None,
        default=lambda: None,
        automatic=True,
    )

    def chunkwise(options, *arrays):
        *arrays, state = arrays
        names = ("chunk_size", "stabilized", "normalized")
        given = {name: getattr(options, name) for name in names}
        h, state = kernel(*arrays, tuple(state), **given)
        return h, State(*state)

    monkeypatch.setattr(mlstm_evaluation.xla, "chunkwise", chunkwise)
    mlstm_cases._compiled.cache_clear()
    yield
    mlstm_cases._compiled.cache_clear()


@pytest.mark.parametrize(
    ("length", "chunk", "options"),
    [(1, 16, {}), (53, 16, {}), (53, 16, SIGMOID), (48, 16, BARE), (150, 128, {})],
)
def test_results_and_gradients_are_those_of_the_recurrence(length, chunk, options):
    problem = draw(length)
    got = evaluate(problem, chunk_size=chunk, **options)
    terms = expect_terms(problem, **options)
    assert_all_close(got, expect(problem, **options), FLOAT32, terms)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, SIGMOID, BARE], ids=str)
@pytest.mark.parametrize(("length", "chunk"), [(521, 512), (1009, 128)])
def test_long_chunks(length, chunk, options):
    problem = draw(length, heads=1)
    got = evaluate(problem, chunk_size=chunk, **options)
    terms = expect_terms(problem, **options)
    assert_all_close(got, expect(problem, **options), FLOAT32, terms)


def test_an_empty_state_has_no_gradient_of_nan():
    problem = draw(40)
    got = evaluate(problem, from_empty=True, chunk_size=16)
    terms = expect_terms(problem, from_empty=True)
    assert_all_close(got, expect(problem, from_empty=True), FLOAT32, terms)


def test_vmap_is_a_larger_batch():
    problem = draw(20, ("plain", "packed"))
    q, k, v, i, f = problem.inputs
    mapped = jax.vmap(lambda *x: mlstm(*(y[None] for y in x), chunk_size=16)[0])(q, k, v, i, f)
    assert_close(mapped, np.asarray(mlstm(q, k, v, i, f, chunk_size=16), np.float64), 1e-6)


def test_where_64_bits_are_enabled_kernels_get_32():
    log_i, log_f = jnp.zeros((1, 20, 2), jnp.float32), jnp.full((1, 20, 2), -jnp.inf, jnp.float32)
    options = {"chunk": 16, "stabilized": True, "normalized": True, "q_dim": 8}
    with jax.enable_x64(True):
        found = gates.prepare(log_i, log_f, jnp.zeros((1, 2), jnp.float32), **options)
    assert found.rows.dtype == found.carry.dtype == found.stabilizer.dtype == jnp.float32


def test_weights_of_a_long_forgetful_chunk_are_exact():
    """A difference of plain prefix sums would be wrong by 1e-4 here."""
    rng = np.random.default_rng(0)
    log_f = -20 * rng.uniform(size=(1, 512, 1)).astype(np.float32)
    log_i = rng.standard_normal((1, 512, 1)).astype(np.float32)
    rows = gates.prepare(
        jnp.asarray(log_i),
        jnp.asarray(log_f),
        jnp.zeros((1, 1)),
        chunk=512,
        stabilized=False,
        normalized=False,
        q_dim=1,
    ).rows[0, 0, 0]
    row = np.asarray(rows)
    exponent = row[gates.ROW_HIGH][:, None] - row[gates.COLUMN_HIGH]
    exponent += row[gates.ROW_LOW][:, None] - row[gates.COLUMN_LOW]
    sums = np.cumsum(np.float64(log_f[0, :, 0]))
    exact = sums[:, None] - sums + np.float64(log_i[0, :, 0])
    near = np.tril(np.ones((512, 512), bool)) & (exact > -80)
    np.testing.assert_allclose(exponent[near], exact[near], rtol=2e-7, atol=3e-7)
