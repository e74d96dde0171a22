"""The TPU kernels of the mLSTM in the interpreter, races detected and scratch poisoned.

Against the float64 recurrence, through the operator; what it leaves out, against plain passes.
"""

import functools

import jax
import jax.numpy as jnp
import mlstm_cases
import mlstm_passes
import numpy as np
import pytest
from mlstm_cases import (
    assert_all_close,
    assert_close,
    draw,
    evaluate,
    expect,
    expect_terms,
    quick_jit,
)
from simulation import simulated_tpu

from pallas_kernels.mlstm import gates, mosaic_tpu
from pallas_kernels.mlstm.gradient import Options
from pallas_kernels.mlstm.tuning_tpu import TuningConfig
from swr_jax import mlstm
from swr_jax.ops.reference import relative_rms

FLOAT32 = 1e-5
BFLOAT16 = 4e-3
SIGMOID = {"input_gate": "sigmoid"}
BARE = SIGMOID | {"normalize": False}
TPU = {"implementation": "mosaic_tpu"}


@pytest.fixture(autouse=True)
def one_core():
    with simulated_tpu():
        yield
    mlstm_cases._compiled.cache_clear()


def check(problem, tolerance=FLOAT32, *, chunk_size=128, **options):
    got = evaluate(problem, chunk_size=chunk_size, **TPU, **options)
    terms = expect_terms(problem, **options)
    assert_all_close(got, expect(problem, **options), tolerance, terms)


@pytest.mark.parametrize(
    ("length", "kinds", "options"),
    [
        (1, ("plain",), {}),
        (257, ("wild",), {}),
        pytest.param(130, ("as initialised", "loud"), SIGMOID, marks=pytest.mark.slow),
        pytest.param(130, ("packed",), BARE, marks=pytest.mark.slow),
    ],
)
def test_results_and_gradients_are_those_of_the_recurrence(length, kinds, options):
    """Documents, an initial state, cotangents of h and of the last state."""
    check(draw(length, kinds, heads=2), **options)


@pytest.mark.slow
def test_an_empty_state_has_no_gradient_of_nan():
    problem = draw(140, ("plain",), heads=1)
    got = evaluate(problem, from_empty=True, **TPU)
    terms = expect_terms(problem, from_empty=True)
    assert_all_close(got, expect(problem, from_empty=True), FLOAT32, terms)


def arguments(batch, chunks, heads, q_dim, v_dim, chunk, dtype, *, normalized=True, seed=0):
    """Options, and arguments of a backend's `backward`, those of its `forward` first."""
    rng = np.random.default_rng([seed, chunks, heads, q_dim, v_dim])
    time = chunks * chunk

    def normal(*shape, dtype=jnp.float32):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    q, k = (normal(batch, time, heads, q_dim, dtype=dtype) for _ in range(2))
    v, dh = (normal(batch, time, heads, v_dim, dtype=dtype) for _ in range(2))
    log_i = normal(batch, time, heads)
    log_f = jax.nn.log_sigmoid(normal(batch, time, heads) + 3)
    log_f = jnp.where(rng.uniform(size=log_f.shape) < 2 / time, -jnp.inf, log_f)
    memory, dmemory = (normal(batch, heads, q_dim, v_dim) for _ in range(2))
    normalizer, dnormalizer = (normal(batch, heads, q_dim) for _ in range(2))
    prepared = gates.prepare(
        log_i,
        log_f,
        jnp.zeros((batch, heads)),
        chunk=chunk,
        stabilized=normalized,
        normalized=normalized,
        q_dim=q_dim,
    )
    options = Options(chunk, normalized, normalized, TuningConfig())
    forward = (q, k, v, prepared.rows, prepared.carry, memory, normalizer)
    return options, (*forward, dh, dmemory, dnormalizer)


def run(backend, options, given):
    """What both passes return, by name."""
    names = ("h", "memory", "normalizer")
    names += ("dq", "dk", "dv", "drows", "dcarry", "dmemory", "dnormalizer")
    forward, backward = (functools.partial(f, options) for f in (backend.forward, backend.backward))
    forward_given, cotangents = given[:7], given[7:]
    state = given[5:7]
    if backend is mosaic_tpu:
        *_, memories, normalizers = quick_jit(functools.partial(forward, keep=True))(*forward_given)
        state = memories, normalizers
    found = quick_jit(forward)(*forward_given)
    found = (*found, *quick_jit(backward)(*given[:5], *state, *cotangents))
    return dict(zip(names, found, strict=True))


def check_passes(options, given, tolerance):
    """Every number that a backend returns, relative to those of the plain passes."""
    found, expected = run(mosaic_tpu, options, given), run(mlstm_passes, options, given)
    for name, wanted in expected.items():
        assert found[name].shape == wanted.shape, name
        assert found[name].dtype == wanted.dtype, name
        # Few numbers, each a sum over a whole state, much smaller than its terms.
        allowed = 4 * tolerance if name == "dcarry" else tolerance
        assert relative_rms(found[name], np.asarray(wanted, np.float64)) <= allowed, name


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_half_precision(dtype):
    """Products on operands of 16 bits, all else in float32; float16 is computed in float32."""
    options, given = arguments(1, 2, 1, 40, 130, 128, dtype)
    check_passes(options, given, BFLOAT16)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_states_are_kept_beside_results_that_do_not_change(dtype):
    """As the plain passes have them before each chunk, C rounded to the operands of products."""
    options, given = arguments(1, 3, 1, 8, 130, 128, dtype)
    forward = functools.partial(mosaic_tpu.forward, options)
    plain = quick_jit(forward)(*given[:7])
    *results, memories, normalizers = quick_jit(functools.partial(forward, keep=True))(*given[:7])
    for found, expected in zip(results, plain, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert memories.dtype == dtype
    for chunk in range(3):
        arrays = (x[:, : chunk * 128] for x in given[:3])
        rows, carry = (x[:, :, :chunk] for x in given[3:5])
        memory, normalizer = given[5:7]
        if chunk:
            _, memory, normalizer = mlstm_passes.forward(options, *arrays, rows, carry, *given[5:7])
        kept = memories[:, :, chunk, :8, :130], normalizers[:, :, chunk, 0, :8]
        for found, expected in zip(kept, (memory, normalizer), strict=True):
            tolerance = FLOAT32 if found.dtype == jnp.float32 else BFLOAT16
            assert relative_rms(found, np.asarray(expected, np.float64)) <= tolerance


@pytest.mark.slow
def test_features_that_fill_several_registers():
    options, given = arguments(1, 2, 1, 256, 384, 128, jnp.float32)
    check_passes(options, given, FLOAT32)


@pytest.mark.slow
def test_tuning_changes_no_bit():
    """Heads and chunks at a time; the last step of the default has fewer chunks than the others."""
    options, given = arguments(1, 5, 2, 16, 16, 128, jnp.float32)
    expected = run(mosaic_tpu, options, given)
    small = options._replace(config=TuningConfig(heads=1, tokens=128))
    for name, found in run(mosaic_tpu, small, given).items():
        np.testing.assert_array_equal(found, expected[name], err_msg=name)


@pytest.mark.slow
def test_two_cores_share_the_batch():
    options, given = arguments(2, 2, 1, 8, 8, 128, jnp.float32)
    with simulated_tpu(cores=2):
        check_passes(options, given, FLOAT32)


@pytest.mark.slow
def test_under_vmap():
    problem = draw(20, ("plain", "packed"), heads=1)
    inputs = problem.inputs

    def loss(*x):
        return jnp.sum(mlstm(*(y[None] for y in x), **TPU) ** 2)

    found = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1, 2, 3, 4))))(*inputs)

    def whole(*x):
        return jnp.sum(mlstm(*x, implementation="xla") ** 2)

    for got, wanted in zip(found, jax.grad(whole, argnums=(0, 1, 2, 3, 4))(*inputs), strict=True):
        assert_close(got, np.asarray(wanted, np.float64), FLOAT32)


@pytest.mark.slow
def test_finite_values_of_any_size_stay_in_their_document():
    options, given = arguments(1, 2, 1, 8, 8, 128, jnp.float32)
    q, k, v, rows, *rest = given
    begin = jnp.where(jnp.arange(128) >= 100, 100.0, 0.0)
    rows = rows.at[:, :, 0, gates.BEGIN].set(begin)
    rows = rows.at[:, :, 0, gates.RECALL, 100:].set(0)
    rows = rows.at[:, :, 0, gates.KEPT, :100].set(0)
    given = (q, k, v, rows, given[4].at[:, :, 0].set(0), *rest[1:])
    plain = run(mosaic_tpu, options, given)
    loud = run(mosaic_tpu, options, (q, k, v.at[:, :100].set(3e38), *given[3:]))
    np.testing.assert_array_equal(loud["h"][:, 100:], plain["h"][:, 100:])
    np.testing.assert_array_equal(loud["memory"], plain["memory"])


def _empty(dtype=jnp.float32, features=8, **shape):
    sizes = {"batch": 1, "time": 128, "heads": 1} | shape
    x = jnp.zeros((*sizes.values(), features), dtype)
    return x, x, x


@pytest.mark.parametrize(
    ("chunk", "arrays", "reason"),
    [
        (128, _empty(jnp.float8_e4m3fn), "q has dtype float8_e4m3fn"),
        (128, _empty(batch=0), r"q has shape \(0, 128, 1, 8\)"),
        (64, _empty(), r"options.chunk=64: the TPU kernels take multiples of 128"),
        (128, _empty(features=2048), "heads of 2048 and 2048 features in chunks of 128 take"),
    ],
)
def test_what_is_out_of_reach_is_refused_with_the_reason(chunk, arrays, reason):
    with pytest.raises(NotImplementedError, match=reason):
        mosaic_tpu.check(Options(chunk, True, True, TuningConfig()), *arrays)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"heads": 0}, "heads=0"),
        ({"tokens": 64}, "tokens=64"),
        ({"longest_chunk": 384}, "longest_chunk=384"),
        ({"columns": 100}, "columns=100"),
    ],
)
def test_a_tuning_out_of_range_is_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        TuningConfig(**options)


@pytest.mark.parametrize(
    ("wished", "time", "sizes", "dtype", "length"),
    [
        (16, 1000, (128, 256), jnp.bfloat16, 128),
        (256, 1000, (128, 256), jnp.bfloat16, 256),
        (1024, 1000, (16, 16), jnp.bfloat16, 512),  # as long as the tuning allows
        (512, 130, (128, 256), jnp.bfloat16, 256),
        (512, 128, (128, 256), jnp.bfloat16, 128),  # all there is
        (256, 1000, (512, 512), jnp.float32, 128),  # what VMEM holds
    ],
)
def test_the_length_of_a_chunk(wished, time, sizes, dtype, length):
    config = TuningConfig(longest_chunk=512)
    assert mosaic_tpu.chunk_lengths(wished, time, *sizes, dtype, config) == (length, length)
    assert mosaic_tpu.chunk_lengths(wished, time, *sizes, dtype, TuningConfig())[1] == 128


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, SIGMOID, BARE], ids=str)
@pytest.mark.parametrize(
    ("length", "chunk_size", "sizes"),
    [
        (127, 128, (2, 16, 24)),
        (128, 128, (1, 8, 8)),
        (129, 256, (3, 1, 6)),
        (521, 128, (5, 7, 11)),
        (1009, 128, (4, 130, 33)),
    ],
)
def test_any_length_chunk_and_size(length, chunk_size, sizes, options):
    heads, qk_dim, v_dim = sizes
    problem = draw(length, heads=heads, qk_dim=qk_dim, v_dim=v_dim)
    check(problem, chunk_size=chunk_size, **options)


@pytest.mark.slow
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "sizes",
    [(2, 3, 4, 128, 256, 256), (1, 2, 3, 64, 64, 128), (1, 2, 1, 256, 512, 128)],
    ids=str,
)
def test_default_tuning(sizes, dtype, normalized):
    options, given = arguments(*sizes, dtype, normalized=normalized)
    check_passes(options, given, FLOAT32 if dtype == jnp.float32 else BFLOAT16)
