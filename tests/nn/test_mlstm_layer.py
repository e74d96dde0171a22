"""`MLSTM`: the layer's arithmetic in every variant, streams, packed documents, initial values."""

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
    numpy_mlstm_layer,
    parameters_of,
    randomised,
    relative_error,
    sample,
)

from swr_jax.nn import MLSTM

FEATURES, LENGTH = 24, 29
PIECES = [8, 1, 1, 8, 1, 1, 8, 1]
FLOAT32 = 1e-5
VARIANTS = {
    "published": {"num_heads": 2, "chunk_size": 8},
    "other": {
        "num_heads": 3,
        "qk_dim_factor": 0.25,
        "v_dim_factor": 2.0,
        "gate_soft_cap": 0.7,
        "head_norm": "rms",
        "input_gate": "sigmoid",
        "norm_epsilon": 0.3,
        "chunk_size": 4,
    },
    "uncapped": {"num_heads": 1, "gate_soft_cap": None, "norm_epsilon": 0.3, "chunk_size": 16},
}
each_variant = pytest.mark.parametrize(
    "variant", ["published", "other", pytest.param("uncapped", marks=pytest.mark.slow)]
)


@functools.cache
def make(variant, **options):
    options = VARIANTS[variant] | options
    return randomised(lambda: MLSTM(FEATURES, rngs=nnx.Rngs(0), **options))


@functools.cache
def compiled(variant):
    definition, variables = nnx.split(make(variant))
    full = jax.jit(lambda x, **arguments: nnx.merge(definition, variables)(x, **arguments))
    step = jax.jit(
        lambda x, state, **arguments: nnx.merge(definition, variables)(x, state=state, **arguments)
    )
    return full, step


@each_variant
def test_equals_the_layer_written_out_in_float64(variant):
    x = sample(LENGTH, FEATURES)
    y = compiled(variant)[0](x)
    parameters = parameters_of(make(variant))
    for row in range(2):
        wanted = numpy_mlstm_layer(np.asarray(x[row], np.float64), parameters, VARIANTS[variant])
        assert relative_error(y[row], wanted) <= FLOAT32


@each_variant
def test_gradients_are_those_of_finite_differences(variant):
    """Of the float64 layer above, in a random direction of every parameter and of the input."""
    layer = make(variant)
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
            return np.sum(numpy_mlstm_layer(moved.pop("x")[0], moved, VARIANTS[variant]) * y_bar[0])

        wanted = (loss(1e-6) - loss(-1e-6)) / 2e-6
        np.testing.assert_allclose(np.sum(got * direction), wanted, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("variant", ["published", "other"])
def test_packed_documents_equal_separate_runs(variant):
    full, _ = compiled(variant)
    x, ids = sample(LENGTH, FEATURES), documents(LENGTH, [2, 3, 12, 20])
    y = full(x, segment_ids=ids)
    for row in range(2):
        for document in np.unique(ids[row]):
            inside = np.asarray(ids[row] == document)
            # The document at the start of the sequence; what follows there comes too late to act.
            alone = full(jnp.roll(x, -int(np.argmax(inside)), axis=1))[row, : inside.sum()]
            assert relative_error(y[row, inside], alone) <= FLOAT32
            changed = full(jnp.where(inside[None, :, None], x, x + 3), segment_ids=ids)
            np.testing.assert_array_equal(changed[row, inside], y[row, inside])


def test_the_future_changes_no_bit_of_the_past():
    full, _ = compiled("published")
    x = sample(LENGTH, FEATURES)
    y = np.asarray(full(x))
    for token in (1, 7, 8, LENGTH - 1):
        changed = np.asarray(full(x.at[:, token].add(1.0)))
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


@pytest.mark.parametrize("variant", ["published", "other"])
@pytest.mark.parametrize(
    "boundaries", [[8, 9, 10, 17], [1, 13, 15, 28]], ids=["at the starts of calls", "inside them"]
)
def test_pieces_of_packed_documents_are_one_full_forward(variant, boundaries):
    full, step = compiled(variant)
    x, ids = sample(LENGTH, FEATURES), documents(LENGTH, boundaries)
    y, state = fed_in_pieces(make(variant), step, x, PIECES, ids)
    assert relative_error(y, full(x, segment_ids=ids)) <= FLOAT32
    np.testing.assert_array_equal(state.last_segment, ids[:, -1])


def test_without_segment_ids_a_stream_goes_on_in_the_last_segment():
    full, step = compiled("published")
    x, ids = sample(LENGTH, FEATURES), jnp.full((2, 8), 7, jnp.int32)
    _, state = step(x[:, :8], make("published").init_state(2), segment_ids=ids)
    y, state = step(x[:, 8:16], state)
    assert relative_error(y, full(x)[:, 8:16]) <= FLOAT32
    np.testing.assert_array_equal(state.last_segment, [7, 7])


def test_the_state_does_not_grow_with_the_stream():
    layer = make("published")
    sizes = [
        sum(x.size for x in jax.tree.leaves(layer.init_state(2, max_length=n))) for n in (1, 10**6)
    ]
    assert sizes[0] == sizes[1] == 2 * (2 * (6 * 12 + 6 + 1) + 1)


def test_bfloat16_computation_keeps_parameters_gates_and_state_in_float32():
    layer, x = make("published", dtype=jnp.bfloat16), sample(LENGTH, FEATURES)
    assert {v.dtype for v in jax.tree.leaves(nnx.state(layer))} == {jnp.dtype("float32")}
    step = jax.jit(lambda x, state: layer(x, state=state))
    y, state = fed_in_pieces(layer, step, x, [LENGTH - 1, 1])
    assert y.dtype == jnp.bfloat16
    assert layer.input_gate(x).dtype == layer.forget_gate(x).dtype == jnp.float32
    assert {v.dtype.name for v in jax.tree.leaves(state)} == {"float32", "int32"}
    assert relative_error(y, compiled("published")[0](x)) <= 2e-2
    assert make("published", param_dtype=jnp.bfloat16).head_norm.scale.dtype == jnp.bfloat16


def test_every_axis_has_a_logical_name():
    layer = nnx.eval_shape(lambda: MLSTM(24, num_heads=2, rngs=nnx.Rngs(0)))
    names = {
        ".".join(path): variable.out_sharding
        for path, variable in nnx.to_flat_state(nnx.state(layer))
    }
    gates = ("input_gate", "forget_gate")
    into = ("query", "key", "value", "output_gate", *gates)
    assert names == {
        **{f"{name}.kernel": ("embed", "heads") for name in into},
        **{f"{name}.bias": ("heads",) for name in gates},
        "head_norm.scale": ("heads",),
        "output.kernel": ("heads", "embed"),
    }


def test_starts_as_published():
    width, heads, blocks = 512, 8, 24
    layer = MLSTM(width, num_heads=heads, num_blocks=blocks, rngs=nnx.Rngs(0))
    p = parameters_of(layer)
    for name in ("query", "key", "value"):
        np.testing.assert_allclose(p[f"{name}.kernel"].std(), (2 / (5 * width)) ** 0.5, rtol=0.01)
        # Normal and not cut off: the fourth moment tells.
        kernel = p[f"{name}.kernel"] / p[f"{name}.kernel"].std()
        np.testing.assert_allclose((kernel**4).mean(), 3, rtol=0.05)
    np.testing.assert_allclose(p["output.kernel"].std(), 2 / (blocks * width**0.5), rtol=0.01)
    for name in ("input_gate", "forget_gate", "output_gate"):
        assert not p[f"{name}.kernel"].any()
    np.testing.assert_array_equal(p["input_gate.bias"], np.full(heads, -10.0))
    np.testing.assert_allclose(p["forget_gate.bias"], np.linspace(3, 6, heads), rtol=1e-6)
    np.testing.assert_array_equal(p["head_norm.scale"], np.ones(width))


def test_parameters_are_about_four_times_the_width_squared():
    layer = nnx.eval_shape(lambda: MLSTM(1024, num_heads=4, rngs=nnx.Rngs(0)))
    count = sum(x.size for x in jax.tree.leaves(nnx.state(layer, nnx.Param)))
    # Two M x M / 2, three M x M, gates with biases, the norm's scale.
    assert count == 4 * 1024**2 + 2 * 4 * (1024 + 1) + 1024


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 0}, "num_heads=0: must be at least 1"),
        ({"num_heads": 8}, "qk_dim_factor=0.5: makes 12 of features=24, which must be a positive"),
        ({"v_dim_factor": 0.0}, "v_dim_factor=0.0: makes 0 of features=24"),
        ({"gate_soft_cap": 0.0}, "gate_soft_cap=0.0: must be above 0, or None for no cap"),
        ({"head_norm": "batch"}, "head_norm='batch': must be one of ['layer', 'rms']"),
        ({"input_gate": "tanh"}, "input_gate='tanh'"),
        ({"chunk_size": 12}, "chunk_size=12: must be an int, a power of two"),
        ({"num_blocks": 0}, "num_blocks=0: must be at least 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MLSTM(24, rngs=nnx.Rngs(0), **({"num_heads": 2} | options))


def test_weights_may_be_constants_of_a_compiled_program():
    """As in `jax.jit(lambda x: layer(x))`; at this size compilers begin to fuse more."""
    layer = MLSTM(256, num_heads=4, rngs=nnx.Rngs(0))
    definition, parameters = nnx.split(layer)
    x = jax.random.normal(jax.random.key(0), (1, 2048, 256))
    expected = jax.jit(lambda parameters, x: nnx.merge(definition, parameters)(x))(parameters, x)
    for _ in range(3):
        assert relative_error(jax.jit(lambda x: layer(x))(x), expected) < 1e-6
