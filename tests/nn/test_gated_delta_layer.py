"""`GatedDeltaNet`: its arithmetic, its convolutions, streams, packed documents, initial values."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from layer_cases import (
    documents,
    fed_in_pieces,
    parameters_of,
    randomised,
    relative_error,
    sample,
    sigmoid,
)

from swr_jax.nn import GatedDeltaNet

FEATURES, LENGTH = 24, 29
PIECES = [8, 1, 1, 8, 1, 1, 8, 1]
FLOAT32 = 1e-5
VARIANTS = {
    "default": {"num_heads": 2},
    "wide": {"num_heads": 3, "head_dim": 4, "expand_v": 1.5, "conv_size": 2, "chunk_size": 8},
    "no convolution": {"num_heads": 1, "head_dim": 5, "expand_v": 1.0, "conv_size": 1},
}
each_variant = pytest.mark.parametrize(
    "variant", ["default", "wide", pytest.param("no convolution", marks=pytest.mark.slow)]
)


@functools.cache
def make(variant, **options):
    options = VARIANTS[variant] | options
    return randomised(lambda: GatedDeltaNet(FEATURES, rngs=nnx.Rngs(0), **options))


@functools.cache
def compiled(variant):
    definition, variables = nnx.split(make(variant))
    full = jax.jit(lambda x, **arguments: nnx.merge(definition, variables)(x, **arguments))
    step = jax.jit(
        lambda x, state, **arguments: nnx.merge(definition, variables)(x, state=state, **arguments)
    )
    return full, step


def silu(x):
    return x * sigmoid(x)


def numpy_layer(x, p, num_heads, epsilon=1e-6):
    """One document [T, M] in float64, token by token, from the equations of the docstring."""
    time = len(x)

    def convolved(name):
        y, kernel = x @ p[f"{name}.kernel"], p[f"{name}_conv.kernel"]
        padded = np.concatenate([np.zeros((len(kernel) - 1, y.shape[1])), y])
        z = np.stack([(padded[t : t + len(kernel)] * kernel).sum(axis=0) for t in range(time)])
        return silu(z).reshape(time, num_heads, -1)

    q, k, v = (convolved(name) for name in ("query", "key", "value"))
    q = q / np.sqrt((q**2).sum(-1, keepdims=True) + 1e-6) / np.sqrt(q.shape[-1])
    k = k / np.sqrt((k**2).sum(-1, keepdims=True) + 1e-6)
    step = np.log1p(np.exp(x @ p["decay.kernel"] + p["decay.bias"]))
    alpha = np.exp(-np.exp(p["log_rate"]) * step)
    beta = sigmoid(x @ p["write_gate.kernel"])
    gate = silu(x @ p["output_gate.kernel"]).reshape(v.shape)
    out = np.zeros_like(v)
    for head in range(num_heads):
        memory = np.zeros((v.shape[2], k.shape[2]))  # S of the paper
        for t in range(time):
            key = k[t, head]
            erased = np.eye(len(key)) - beta[t, head] * np.outer(key, key)
            memory = alpha[t, head] * memory @ erased
            memory += beta[t, head] * np.outer(v[t, head], key)
            o = memory @ q[t, head]
            norm = o / np.sqrt((o**2).mean() + epsilon) * p["norm.scale"]
            out[t, head] = norm * gate[t, head]
    return out.reshape(time, -1) @ p["output.kernel"]


@each_variant
def test_equals_the_layer_written_out_in_float64(variant):
    x = sample(LENGTH, FEATURES)
    y = compiled(variant)[0](x)
    parameters = parameters_of(make(variant))
    for row in range(2):
        wanted = numpy_layer(np.asarray(x[row], np.float64), parameters, make(variant).num_heads)
        assert relative_error(y[row], wanted) <= FLOAT32


@each_variant
def test_packed_documents_equal_separate_runs_to_the_last_convolution_tap(variant):
    full, _ = compiled(variant)
    x, ids = sample(LENGTH, FEATURES), documents(LENGTH, [2, 3, 12, 20])
    y = full(x, segment_ids=ids)
    for row in range(2):
        for document in np.unique(ids[row]):
            inside = np.asarray(ids[row] == document)
            # The document at the start of the sequence; what follows there comes too late to act.
            start = int(np.argmax(inside))
            alone = full(jnp.roll(x, -start, axis=1))[row, : inside.sum()]
            assert relative_error(y[row, inside], alone) <= FLOAT32
            changed = full(jnp.where(inside[None, :, None], x, 1e6), segment_ids=ids)
            np.testing.assert_array_equal(changed[row, inside], y[row, inside])


def test_a_segment_number_that_comes_again_is_another_document():
    """As for the recurrence: also where a convolution reaches over the document between."""
    full, step = compiled("default")
    x = sample(7, FEATURES)
    again = jnp.asarray([[5, 5, 5, 2, 5, 5, 5]] * 2)
    apart = jnp.asarray([[1, 1, 1, 2, 3, 3, 3]] * 2)
    np.testing.assert_array_equal(full(x, segment_ids=again), full(x, segment_ids=apart))
    y, _ = fed_in_pieces(make("default"), step, x, [1] * 7, again)
    assert relative_error(y, full(x, segment_ids=apart)) <= FLOAT32


def test_the_future_changes_no_bit_of_the_past():
    full, _ = compiled("default")
    x = sample(LENGTH, FEATURES)
    y = np.asarray(full(x))
    for token in (1, 8, LENGTH - 1):
        changed = np.asarray(full(x.at[:, token].set(1e6)))
        np.testing.assert_array_equal(changed[:, :token], y[:, :token])
        assert (changed[:, token] != y[:, token]).any()


@each_variant
@pytest.mark.parametrize("chunks", [[1] * LENGTH, PIECES], ids=["tokens", "pieces"])
def test_a_stream_in_pieces_is_one_full_forward(variant, chunks):
    full, step = compiled(variant)
    x = sample(LENGTH, FEATURES)
    y, state = fed_in_pieces(make(variant), step, x, chunks)
    assert relative_error(y, full(x)) <= FLOAT32
    np.testing.assert_array_equal(state.last_segment, [0, 0])


@pytest.mark.parametrize(
    "boundaries", [[8, 9, 10, 17], [1, 13, 15, 28]], ids=["at the starts of calls", "inside them"]
)
def test_pieces_of_packed_documents_are_one_full_forward(boundaries):
    full, step = compiled("default")
    x, ids = sample(LENGTH, FEATURES), documents(LENGTH, boundaries)
    y, state = fed_in_pieces(make("default"), step, x, PIECES, ids)
    assert relative_error(y, full(x, segment_ids=ids)) <= FLOAT32
    np.testing.assert_array_equal(state.last_segment, ids[:, -1])


def test_without_segment_ids_a_stream_goes_on_in_the_last_segment():
    full, step = compiled("default")
    x, ids = sample(LENGTH, FEATURES), jnp.full((2, 8), 7, jnp.int32)
    _, state = step(x[:, :8], make("default").init_state(2), segment_ids=ids)
    y, state = step(x[:, 8:16], state)
    assert relative_error(y, full(x)[:, 8:16]) <= FLOAT32
    np.testing.assert_array_equal(state.last_segment, [7, 7])


def test_bfloat16_computation_keeps_parameters_and_memory_in_float32():
    layer, x = make("default", dtype=jnp.bfloat16), sample(LENGTH, FEATURES)
    assert {v.dtype for v in jax.tree.leaves(nnx.state(layer))} == {jnp.dtype("float32")}
    step = jax.jit(lambda x, state: layer(x, state=state))
    y, state = fed_in_pieces(layer, step, x, [LENGTH - 1, 1])
    assert y.dtype == state.key.dtype == jnp.bfloat16
    assert state.memory.memory.dtype == jnp.float32
    assert relative_error(y, compiled("default")[0](x)) <= 2e-2


def test_gradients_are_those_of_finite_differences():
    """Of the float64 layer above, in a random direction of every parameter and of the input."""
    layer = make("default")
    definition, variables = nnx.split(layer)
    x = sample(11, FEATURES)[:1]
    y_bar = np.random.default_rng(3).normal(size=x.shape)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(variables, x):
        return jnp.sum(nnx.merge(definition, variables)(x) * y_bar)

    gradients, x_gradient = gradient(variables, x)
    found = {".".join(path): g[...] for path, g in nnx.to_flat_state(gradients)} | {"x": x_gradient}
    values = parameters_of(layer) | {"x": np.asarray(x, np.float64)}
    rng = np.random.default_rng(4)
    for name, got in found.items():
        got = np.asarray(got, np.float64)
        direction = rng.normal(size=got.shape) + got / np.sqrt(np.mean(got**2))

        def loss(step, name=name, direction=direction):
            moved = values | {name: values[name] + step * direction}
            return np.sum(numpy_layer(moved.pop("x")[0], moved, 2) * y_bar[0])

        wanted = (loss(1e-6) - loss(-1e-6)) / 2e-6
        np.testing.assert_allclose(np.sum(got * direction), wanted, rtol=1e-4, err_msg=name)


def test_every_axis_has_a_logical_name():
    layer = nnx.eval_shape(lambda: GatedDeltaNet(24, num_heads=2, rngs=nnx.Rngs(0)))
    names = {
        ".".join(path): variable.out_sharding
        for path, variable in nnx.to_flat_state(nnx.state(layer))
    }
    into, gates = ("embed", "heads"), ("decay", "write_gate")
    assert names == {
        **{f"{name}.kernel": into for name in ("query", "key", "value", "output_gate", *gates)},
        **{f"{name}_conv.kernel": (None, "heads") for name in ("query", "key", "value")},
        "decay.bias": ("heads",),
        "log_rate": ("heads",),
        "norm.scale": (None,),
        "output.kernel": ("heads", "embed"),
    }


def test_starts_with_the_published_decays():
    layer = GatedDeltaNet(64, num_heads=2048, head_dim=2, rngs=nnx.Rngs(0))
    rate = np.exp(np.asarray(layer.log_rate[...], np.float64))
    step = np.log1p(np.exp(np.asarray(layer.decay.bias[...], np.float64)))
    # Uniform quantiles of the rate, log-uniform ones of the step.
    quantiles = np.linspace(0, 1, 9)
    np.testing.assert_allclose(np.quantile(rate, quantiles), 16 * quantiles, atol=0.7)
    np.testing.assert_allclose(
        np.log(np.quantile(step, quantiles) / 1e-3), np.log(100) * quantiles, atol=0.2
    )
    kernel = np.asarray(layer.key_conv.kernel[...])
    np.testing.assert_allclose([kernel.min(), kernel.max()], [-0.5, 0.5], atol=1e-3)
    np.testing.assert_allclose(kernel.std(), 1 / np.sqrt(12), rtol=0.02)


@pytest.mark.parametrize(
    ("options", "multiple"), [({"num_heads": 4}, 4), ({"num_heads": 6, "head_dim": 128}, 6)]
)
def test_parameters_are_four_or_as_published_six_times_the_width_squared(options, multiple):
    layer = nnx.eval_shape(lambda: GatedDeltaNet(1024, rngs=nnx.Rngs(0), **options))
    count = sum(x.size for x in jax.tree.leaves(nnx.state(layer, nnx.Param)))
    assert abs(count / (multiple * 1024**2) - 1) <= 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 0}, "num_heads=0: must be at least 1"),
        ({"num_heads": 5}, "features=24: must be a multiple of 2 num_heads = 10"),
        ({"num_heads": 2, "head_dim": 0}, "head_dim=0: must be at least 1"),
        ({"num_heads": 2, "head_dim": 3, "expand_v": 1.5}, "expand_v=1.5: times head_dim=3"),
        ({"num_heads": 2, "conv_size": 0}, "conv_size=0: must be at least 1, the token itself"),
        ({"num_heads": 2, "chunk_size": 12}, "chunk_size=12: must be a power of two"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GatedDeltaNet(24, rngs=nnx.Rngs(0), **options)
