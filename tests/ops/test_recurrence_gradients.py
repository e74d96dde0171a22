"""Gradients beyond the plain case: of returned states, from long and realistic sequences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recurrence_cases import (
    as_state,
    assert_close,
    assert_rows_close,
    assert_states_close,
    draw,
    draw_state,
    rounded,
)

from swr_jax import (
    gated_sliding_window_recurrence,
    linear_recurrence,
    sliding_window_recurrence,
)
from swr_jax.ops import reference as ref

FLOAT32 = 1e-6
BLOCK = 4
FIELDS = ("local", "carriers", "decays")


@pytest.mark.parametrize(
    ("length", "lookback", "gated"),
    [(1, 1, False), (4, 2, False), (5, 0, False), (11, 3, True), (7, None, False)],
)
def test_cotangents_of_the_returned_state_reach_every_argument(length, lookback, gated):
    """The loss weighs outputs and state fields; finite differences go through the stream."""
    a, u = draw(length, "some zeros", heads=2, features=2)
    rng = np.random.default_rng(3)
    b, c = rng.standard_normal((2, 2, length, 1, 2))
    arguments = {"a": a, "b": b, "c": c, "v": u} if gated else {"a": a, "u": u}
    initial = rounded(draw_state(2, 2, 2, lookback, BLOCK))
    arguments = {name: x.astype(np.float32) for name, x in arguments.items()}
    arguments |= {name: getattr(initial, name) for name in FIELDS}
    # No two rows of the batch see the same cotangents: a mix-up of carriers would show.
    weights = {
        name: rng.standard_normal(x.shape)
        for name, x in ({"x": u} | {name: getattr(initial, name) for name in FIELDS}).items()
    }
    documents = np.cumsum(rng.uniform(size=(2, length)) < 0.1, axis=1).astype(np.int32)
    documents[0] = 0

    def weighted(x, state):
        terms = {"x": x} | {name: getattr(state, name) for name in FIELDS}
        return sum((terms[name] * weight).sum() for name, weight in weights.items())

    def by_operator(arguments):
        inputs = {name: x for name, x in arguments.items() if name not in FIELDS}
        start = as_state(initial, BLOCK, lookback)
        start = start.replace(**{name: arguments[name] for name in FIELDS})
        operator = gated_sliding_window_recurrence if gated else sliding_window_recurrence
        return weighted(
            *operator(
                **inputs,
                block_size=BLOCK,
                lookback=lookback,
                initial_state=start,
                segment_ids=documents,
                return_state=True,
            )
        )

    def by_stream(arguments):
        a, *inputs = (x for name, x in arguments.items() if name not in FIELDS)
        start = ref.RecurrenceState(*(arguments[name] for name in FIELDS), initial.position)
        u = inputs[0] * inputs[2] if gated else inputs[0]
        x, state = ref.stream(ref.reset_decays(a, documents), u, BLOCK, lookback, start)
        return weighted(x * inputs[1] + inputs[2] if gated else x, state)

    gradients = jax.jit(jax.grad(by_operator))(arguments)
    for name, gradient in gradients.items():
        wanted = ref.finite_difference_gradient(
            lambda x, name=name: by_stream(arguments | {name: x}), arguments[name], step=1.0
        )
        assert_rows_close(gradient, wanted, FLOAT32, name)


def adjoint(a, u, x_bar):
    """Textbook adjoint of x_i = a_i x_{i-1} + u_i: x, da and du by two sequential sweeps."""
    x = ref.linear_recurrence(a, u)
    later = np.concatenate([a[:, 1:], np.ones_like(a[:, :1])], axis=1)
    du = ref.linear_recurrence(later[:, ::-1], x_bar[:, ::-1])[:, ::-1]
    before = np.concatenate([np.zeros_like(x[:, :1]), x[:, :-1]], axis=1)
    return x, np.sum(du * before, axis=-1), du


@pytest.mark.parametrize("length", [20011, 65536])
def test_long_exact_recurrences_stay_accurate_at_unit_decay(length):
    """Errors grow with log T: without decay nothing is forgotten, and plain sums would drift."""
    heads = 3
    rng = np.random.default_rng(length)
    a = np.ones((1, length, heads))
    a[:, :, 1] = 1 - 1e-3 * rng.uniform(size=length)
    a[:, :, 2] = rng.uniform(-1, 1, length)
    u, x_bar = rng.standard_normal((2, 1, length, heads, 2))
    a, u, x_bar = (y.astype(np.float32) for y in (a, u, x_bar))

    @jax.jit
    def run(a, u, x_bar):
        x, pull = jax.vjp(linear_recurrence, a, u)
        return x, *pull(x_bar)

    for name, got, wanted in zip(
        ("x", "a", "u"), run(a, u, x_bar), adjoint(a, u, x_bar), strict=True
    ):
        for head in range(heads):
            assert_rows_close(got[:, :, head], wanted[:, :, head], FLOAT32, f"{name}, {head}")


def test_products_of_decays_close_to_one_are_as_accurate_as_an_associative_scans():
    """Float32 drops the second-order terms of (1 - 5e-5)^n: so does every parallel evaluation."""
    a = (1 - 1e-4 * np.random.default_rng(0).uniform(size=(1, 20011, 1))).astype(np.float32)
    u = draw(20011, batch=1, heads=1, features=1)[1].astype(np.float32)

    def combine(left, right):
        return left[0] * right[0], right[0][..., None] * left[1] + right[1]

    flat = jax.jit(lambda a, u: jax.lax.associative_scan(combine, (a, u), axis=1)[1])(a, u)
    expected = ref.linear_recurrence(a, u)
    error = ref.relative_rms(jax.jit(linear_recurrence)(a, u), expected)
    assert error <= 1.2 * ref.relative_rms(flat, expected)
    assert error <= 1e-4


def test_decay_gradients_are_accurate_on_realistic_activations():
    """Log-space forms that divide by a lose da on trained decays: saturated, near 0 and near 1."""
    length, heads, features = 509, 4, 16
    rng = np.random.default_rng(5)
    a = 1 / (1 + np.exp(-rng.normal(1.0, 4.0, (1, length, heads))))
    b, c, v, y_bar = rng.standard_normal((4, 1, length, heads, features))
    a, b, c, v, y_bar = (x.astype(np.float32) for x in (a, 1 / (1 + np.exp(-b)), c, v, y_bar))
    assert a.min() < 1e-5
    assert a.max() > 1 - 1e-5

    @jax.jit
    def run(a, b, c, v, y_bar):
        return jax.vjp(gated_sliding_window_recurrence, a, b, c, v)[1](y_bar)

    wanted = ref.gated_gradients(a, b, c, v, y_bar, block_size=16)
    for name, gradient in zip("abcv", run(a, b, c, v, y_bar), strict=True):
        assert_rows_close(gradient, wanted[name], FLOAT32, name)


def test_the_decay_gradient_survives_a_zero_decay():
    """At a_1 = 0 the derivative is u_0, finite and not zero: x_1 = a_1 u_0 + u_1."""
    u = jnp.full((1, 2, 1, 1), 3.0)
    for block_size, lookback in ((1, 1), (32, 0), (16, None)):
        window = {"block_size": block_size, "lookback": lookback}
        gradient = jax.grad(lambda a, w=window: sliding_window_recurrence(a, u, **w).sum())
        np.testing.assert_array_equal(jax.jit(gradient)(jnp.zeros((1, 2, 1)))[0, :, 0], [0.0, 3.0])


def test_decays_that_a_document_boundary_overwrites_have_no_gradient():
    a, u = (jnp.asarray(x, jnp.float32) for x in draw(9))
    documents = jnp.asarray([[1] * 9, [1] * 5 + [2] * 4])
    loss = jax.jit(lambda a: linear_recurrence(a, u, segment_ids=documents).sum())
    gradient = jax.grad(loss)(a)
    assert (gradient[1, 5] == 0).all()
    assert (gradient[0, 5] != 0).all()
    assert (gradient[1, 6] != 0).all()


# --- precision --------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0, static_argnames=("block_size", "lookback"))
def evaluate(operator, *arguments, y_bar, **window):
    """Output, gradients and state; window as keywords."""
    operator = functools.partial(operator, **window, return_state=True)
    y, pull, state = jax.vjp(operator, *arguments, has_aux=True)
    return y, *pull(y_bar), state


@pytest.mark.parametrize(
    ("decay", "value", "tolerance", "lookback"),
    [
        ("float32", "bfloat16", 4e-3, 1),
        ("bfloat16", "bfloat16", 4e-3, None),
        ("bfloat16", "float32", 4e-3, 1),
        ("float16", "float16", 1e-3, 1),
    ],
)
def test_low_precision_arguments_are_rounded_only_when_read_and_written(
    decay, value, tolerance, lookback
):
    """Each result has its argument's dtype, and the oracle starts from the same rounded numbers."""
    length, heads, features = 53, 4, 5
    a, v = draw(length, "some zeros", heads=heads, features=features)
    b, c = np.random.default_rng(1).standard_normal((2, 2, length, 2, features))
    a = jnp.asarray(a, decay)
    b, c, v = (jnp.asarray(x, value) for x in (b, c, v))
    y_bar = jnp.asarray(draw(length, heads=heads, features=features, seed=1)[1], value)
    window = {"block_size": 16, "lookback": lookback}
    exact = {name: np.asarray(x, np.float64) for name, x in zip("abcv", (a, b, c, v), strict=True)}

    *results, state = evaluate(gated_sliding_window_recurrence, a, b, c, v, y_bar=y_bar, **window)
    gradients = ref.gated_gradients(**exact, y_bar=np.asarray(y_bar, np.float64), **window)
    expected = {"y": ref.gated_sliding_window_recurrence(**exact, **window)} | gradients
    for name, result in zip(("y", *"abcv"), results, strict=True):
        low = decay if name == "a" else value
        assert result.dtype == low, name
        assert_rows_close(result, expected[name], FLOAT32 if low == "float32" else tolerance, name)

    assert {x.dtype.name for x in jax.tree.leaves(state)} == {"float32", "int32"}


@pytest.mark.parametrize(("lookback", "block_size"), [(None, 16), (2, 32)])
def test_float64_inputs_are_computed_in_float64(lookback, block_size):
    with jax.enable_x64(True):
        a, u = draw(197, "negative", batch=1)
        x_bar = draw(197, batch=1, seed=1)[1]
        window = {"block_size": block_size, "lookback": lookback}
        x, da, du, state = evaluate(sliding_window_recurrence, a, u, y_bar=x_bar, **window)
        assert x.dtype == da.dtype == du.dtype == state.local.dtype == jnp.float64
        wanted = ref.sliding_window_gradients(a, u, x_bar, **window)
        assert_close(x, ref.sliding_window_recurrence(a, u, **window), 1e-13)
        assert_close(da, wanted["a"], 1e-13)
        assert_close(du, wanted["u"], 1e-13)
        assert_states_close(state, ref.stream(a, u, block_size, lookback)[1], 1e-13)


def test_the_maths_is_in_the_widest_dtype_and_the_output_in_that_of_the_inputs():
    with jax.enable_x64(True):
        a, u = draw(20, batch=1)
        u = u.astype(np.float32)
        x_bar = np.ones_like(u)
        x, da, du, state = evaluate(sliding_window_recurrence, a, u, y_bar=x_bar)
        assert (x.dtype, da.dtype, du.dtype) == (jnp.float32, jnp.float64, jnp.float32)
        assert_states_close(state, ref.stream(a, u, 16, 1)[1], 1e-13)
        assert_close(x, ref.sliding_window_recurrence(a, u, block_size=16), 1e-7)
        wanted = ref.sliding_window_gradients(a, u, x_bar, block_size=16)
        assert_close(da, wanted["a"], 1e-13)
        assert_close(du, wanted["u"], 1e-7)
