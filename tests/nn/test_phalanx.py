"""`Phalanx`: the layer's arithmetic in every variant, its window, its use from Linen."""

import functools
import re

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from recurrence_cases import assert_close, assert_rows_close

from swr_jax.nn import Phalanx
from swr_jax.ops import reference as ref

FEATURES, HEAD_DIM, LENGTH = 24, 4, 29
FLOAT32 = 2e-6  # projections included


def make(features=FEATURES, **options):
    """A layer whose parameters, biases too, are all random."""
    options = {"head_dim": HEAD_DIM, "block_size": 4} | options
    layer = Phalanx(features, rngs=nnx.Rngs(0), **options)
    rng = np.random.default_rng(1)
    for parameter in jax.tree.leaves(nnx.state(layer, nnx.Param)):
        assert parameter.ndim in (1, 2)
    parameters = jax.tree.map(
        lambda x: jnp.asarray(
            rng.normal(size=x.shape) / np.sqrt(x.shape[0] ** (x.ndim - 1)), x.dtype
        ),
        nnx.state(layer, nnx.Param),
    )
    nnx.update(layer, parameters)
    return layer


def sample(length=LENGTH, batch=2, features=FEATURES):
    rng = np.random.default_rng(length)
    return jnp.asarray(rng.normal(size=(batch, length, features)), jnp.float32)


def packing(length=LENGTH):
    """Two rows of documents, as the data pipeline numbers them."""
    rows = [np.repeat([1, 2, 3, 4], [5, 1, 11, length - 17]), np.ones(length)]
    return jnp.asarray(np.stack(rows), jnp.int32)


def parameters_of(layer):
    """{"decay.kernel": float64 array, ...}"""
    found = {}
    for path, parameter in nnx.to_flat_state(nnx.state(layer, nnx.Param)):
        found[".".join(map(str, path))] = np.asarray(parameter[...], np.float64)
    return found


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


ACTIVATIONS = {None: lambda x: x, "silu": lambda x: x * sigmoid(x), "sigmoid": sigmoid}


def numpy_layer(x, parameters, options, segment_ids=None):
    """The layer written out in float64 NumPy from the equations of its docstring."""
    options = {"lookback": 1, "block_size": 4, "global_heads": 0, "decay_max": 1.0} | options
    x = np.asarray(x, np.float64)
    heads = parameters["value.kernel"].shape[1] // HEAD_DIM

    def project(name):
        y = x @ parameters[f"{name}.kernel"] + parameters.get(f"{name}.bias", 0.0)
        return y if name in ("decay", "output") else y.reshape(*y.shape[:2], -1, HEAD_DIM)

    v = project("value")
    if options.get("fixed_decay") is None:
        a = options["decay_max"] * sigmoid(project("decay"))
    else:
        a = np.full(v.shape[:3], options["fixed_decay"])
    b, c = np.ones((2, *v.shape))
    if options.get("pre_gate", True):
        b = sigmoid(project("pre_gate"))
    if options.get("post_gate", True):
        c = ACTIVATIONS[options.get("gate_activation")](project("post_gate"))
    # Every head on its own, so that nothing here knows about groups but this one index.
    outputs = []
    for head in range(heads):
        at_b, at_c = (head // (heads // gate.shape[2]) for gate in (b, c))
        reach = None if head >= heads - options["global_heads"] else options["lookback"]
        outputs.append(
            ref.gated_sliding_window_recurrence(
                a[:, :, [head]],
                b[:, :, [at_b]],
                c[:, :, [at_c]],
                v[:, :, [head]],
                block_size=options["block_size"],
                lookback=reach,
                segment_ids=segment_ids,
            )
        )
    return np.concatenate(outputs, axis=2).reshape(x.shape) @ parameters["output.kernel"]


VARIANTS = [
    {},
    {"num_gate_heads": 3, "global_heads": 2, "lookback": 2, "block_size": 8},
    {"num_gate_heads": 1, "decay_max": 0.8, "lookback": 0},
    {"global_heads": 1, "lookback": 0, "gate_activation": "silu"},
    {"global_heads": 6, "gate_activation": "sigmoid"},
    {"lookback": None, "fixed_decay": 0.9},
    {"pre_gate": False, "num_gate_heads": 2, "global_heads": 3},
    {"post_gate": False, "block_size": 32},
    {"pre_gate": False, "post_gate": False, "global_heads": 3},
]
variants = pytest.mark.parametrize("options", VARIANTS, ids=str)


@functools.cache
def compiled(**options):
    """The layer as pure functions of its input, without and with a state."""
    definition, variables = nnx.split(make(**options))
    full = jax.jit(
        lambda x, **arguments: nnx.merge(definition, variables)(x, **arguments),
        static_argnames=("block_size", "lookback"),
    )
    step = jax.jit(
        lambda x, state, **arguments: nnx.merge(definition, variables)(x, state=state, **arguments),
        static_argnames=("block_size", "lookback"),
    )
    return full, step


@variants
def test_equals_the_layer_written_out_in_float64(options):
    full, _ = compiled(**options)
    x, segment_ids = sample(), packing()
    parameters = parameters_of(make(**options))
    y = full(x, segment_ids=segment_ids)
    assert_rows_close(y, numpy_layer(x, parameters, options, segment_ids), FLOAT32)


@pytest.mark.parametrize(
    "options",
    [
        {"num_gate_heads": 1, "global_heads": 0, "gate_activation": "silu", "decay_max": 0.8},
        {"global_heads": 1},
        {"pre_gate": False, "post_gate": False},
    ],
    ids=str,
)
def test_gradients_are_those_of_finite_differences(options):
    """Of the float64 layer above: by every parameter, and by the input."""
    layer = make(8, **options)
    x = sample(9, 1, 8)
    y_bar = np.random.default_rng(3).normal(size=x.shape)
    definition, variables = nnx.split(layer)

    def loss(variables, x):
        return jnp.sum(nnx.merge(definition, variables)(x) * y_bar)

    gradients, x_gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(variables, x)
    parameters = parameters_of(layer)

    def numpy_loss(x=x, **changed):
        return np.sum(numpy_layer(x, parameters | changed, options) * y_bar)

    wanted = ref.finite_difference_gradient(lambda x: numpy_loss(x=x), x)
    assert_close(x_gradient, wanted, FLOAT32)
    found = {".".join(path): g[...] for path, g in nnx.to_flat_state(gradients)}
    assert found.keys() == parameters.keys()
    for name, gradient in found.items():
        wanted = ref.finite_difference_gradient(
            lambda value, name=name: numpy_loss(**{name: value}), parameters[name]
        )
        assert_close(gradient, wanted, FLOAT32)


# --- the window -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"lookback": 2, "global_heads": 2}, {"block_size": 32}])
def test_the_future_changes_no_bit_of_the_past(options):
    full, _ = compiled(**options)
    x = sample()
    y = np.asarray(full(x))
    for token in (1, 7, 8, LENGTH - 1):
        for value in (100.0, np.nan):
            changed = np.asarray(full(x.at[:, token].set(value)))
            np.testing.assert_array_equal(changed[:, :token], y[:, :token])
            assert (changed[:, token] != y[:, token]).any()


@pytest.mark.parametrize("options", [{}, {"lookback": 2, "block_size": 8}, {"global_heads": 2}])
def test_a_token_sees_its_own_block_and_as_many_as_it_looks_back(options):
    """The jagged window, from gradients: which inputs an output depends on at all."""
    full, _ = compiled(**options)
    x = sample(batch=1)
    depends = jax.jit(jax.vmap(jax.grad(lambda x, t: full(x)[0, t].sum()), in_axes=(None, 0)))
    felt = np.asarray(depends(x, jnp.arange(LENGTH)) != 0).any(axis=(1, 3))
    token = np.arange(LENGTH)
    block = token // options.get("block_size", 4)
    distance = block[:, None] - block
    reach = np.inf if "global_heads" in options else options.get("lookback", 1)
    np.testing.assert_array_equal(felt, (token <= token[:, None]) & (distance <= reach))


@pytest.mark.parametrize("options", [{}, {"global_heads": 2, "num_gate_heads": 3}])
def test_packed_documents_are_isolated(options):
    full, _ = compiled(**options)
    x, segment_ids = sample(), packing()
    y = np.asarray(full(x, segment_ids=segment_ids))
    for document in (1, 2, 3, 4):
        here = np.asarray(segment_ids[0] == document)
        others = np.where(here[None, :, None], x, 1e6)
        changed = np.asarray(full(others, segment_ids=segment_ids))
        np.testing.assert_array_equal(changed[0, here], y[0, here])
    # A document that begins at a block's edge is what it would be alone.
    edge = jnp.asarray(np.repeat([[1, 2]], [12, LENGTH - 12], axis=1), jnp.int32).repeat(2, axis=0)
    packed = full(x, segment_ids=edge)
    assert_rows_close(packed[:, 12:], full(x[:, 12:]), FLOAT32)


# --- other windows at call time ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("global_heads", "window"), [(2, {"block_size": 8, "lookback": 0}), (0, {"lookback": None})]
)
def test_a_window_given_at_the_call_is_that_of_a_layer_built_with_it(global_heads, window):
    full, step = compiled(global_heads=global_heads)
    layer, x = make(global_heads=global_heads), sample()
    built = make(global_heads=global_heads, **window)
    wanted, last = nnx.jit(lambda built, x: built(x, state=built.init_state(2)))(built, x)
    np.testing.assert_array_equal(full(x, **window), nnx.jit(lambda built, x: built(x))(built, x))
    y, state = step(x, layer.init_state(2, **window), **window)
    np.testing.assert_array_equal(y, wanted)
    assert jax.tree.structure(state) == jax.tree.structure(last)
    jax.tree.map(np.testing.assert_array_equal, state, last)
    assert (full(x) != wanted).any()


def test_a_state_of_another_window_is_refused():
    layer, x = make(), sample()
    for length in (1, 3):
        with pytest.raises(ValueError, match=r"initial_state has block_size=4, lookback=1, the"):
            layer(x[:, :length], state=layer.init_state(2), block_size=8)
        with pytest.raises(ValueError, match=r"initial_state has block_size=4, lookback=2, the"):
            layer(x[:, :length], state=layer.init_state(2, lookback=2))
        with pytest.raises(ValueError, match=r"initial_state is for \[B, H, D\] = \(1, 6, 4\)"):
            layer(x[:, :length], state=layer.init_state(1))


def test_a_state_of_other_heads_is_refused():
    for layer, other in ((0, 6), (2, 6), (6, 2)):
        layer, other = make(global_heads=layer), make(global_heads=other)
        with pytest.raises(ValueError, match="of a layer with other global_heads than this"):
            layer(sample(), state=other.init_state(2))


# --- sizes, dtypes, options -------------------------------------------------------------------


def test_parameters_are_about_four_times_the_width_squared():
    width = 1024
    layer = nnx.eval_shape(lambda: Phalanx(width, rngs=nnx.Rngs(0)))
    count = sum(x.size for x in jax.tree.leaves(nnx.state(layer, nnx.Param)))
    assert abs(count / (4.06 * width**2) - 1) <= 0.02


def test_shared_gates_and_left_out_parts_have_no_parameters():
    def shapes(**options):
        return {name: x.shape for name, x in parameters_of(make(**options)).items()}

    assert shapes(num_gate_heads=2)["pre_gate.kernel"] == (FEATURES, 2 * HEAD_DIM)
    bare = shapes(pre_gate=False, post_gate=False, fixed_decay=0.5)
    assert set(bare) == {"value.kernel", "output.kernel"}


def test_decays_start_spread_over_the_memories_that_the_window_can_use():
    layer = Phalanx(256, rngs=nnx.Rngs(0))
    memories = 1 / (1 - sigmoid(np.asarray(layer.decay.bias[...], np.float64)))
    assert memories.min() == 2
    assert 16 <= memories.max() <= 32
    assert (np.diff(memories) > 0).all()


def test_bfloat16_computation_keeps_parameters_and_states_in_float32():
    layer, x = make(dtype=jnp.bfloat16), sample()
    assert {v.dtype for v in jax.tree.leaves(nnx.state(layer))} == {jnp.dtype("float32")}
    y, state = nnx.jit(lambda layer, x: layer(x, state=layer.init_state(2)))(layer, x)
    assert y.dtype == jnp.bfloat16
    assert {v.dtype.name for v in jax.tree.leaves(state)} == {"float32", "int32"}
    assert_rows_close(y, numpy_layer(x, parameters_of(layer), {}), 1e-2)
    assert make(param_dtype=jnp.bfloat16).value.kernel.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 5}, "features=24, head_dim=5: the first must be a multiple of the second"),
        ({"head_dim": 0}, "features=24, head_dim=0"),
        ({"num_gate_heads": 4}, "num_gate_heads=4: must divide the number of heads"),
        ({"num_gate_heads": 0}, "num_gate_heads=0: must divide"),
        ({"global_heads": 7}, "global_heads=7: must be between 0 and the number of heads, 6"),
        ({"global_heads": 1, "num_gate_heads": 3}, "a multiple of the 2 heads that share a gate"),
        ({"decay_max": 1.5}, "decay_max=1.5: must be above 0 and at most 1"),
        ({"decay_max": 0.0}, "decay_max=0.0: must be above 0 and at most 1"),
        ({"fixed_decay": -0.1}, "fixed_decay=-0.1: must be in [0, 1], or None to learn it"),
        ({"gate_activation": "relu"}, "gate_activation='relu': must be one of [None, 'silu', 'si"),
        ({"block_size": 12}, "block_size=12: must be an int, a power of two"),
        ({"lookback": -1}, "lookback=-1: must be an int of at least 0, or None"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**options)


def test_a_bad_window_at_the_call_is_named():
    with pytest.raises(ValueError, match="block_size=12: must be an int, a power of two"):
        make()(sample(), block_size=12)


# --- Linen ------------------------------------------------------------------------------------


def test_drops_into_a_linen_model():
    class Model(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x):
            options = {"head_dim": HEAD_DIM, "block_size": 4}
            return x + nnx.bridge.to_linen(Phalanx, FEATURES, **options)(x)

    x, y_bar = sample(), jnp.cos(sample())
    model = Model()
    variables = jax.jit(model.init)(jax.random.key(0), x)
    layer = make()
    (inside,) = flax.linen.meta.unbox(variables)["params"].values()
    nnx.update(layer, jax.tree.map(lambda x: x, inside))

    def loss(variables):
        y = model.apply(variables, x)
        return jnp.sum(y * y_bar), y

    gradients, y = jax.jit(jax.grad(loss, has_aux=True))(variables)
    assert_rows_close(y, np.asarray(x) + numpy_layer(x, parameters_of(layer), {}), FLOAT32)

    wanted = nnx.jit(nnx.grad(lambda layer: jnp.sum(layer(x) * y_bar)))(layer)
    (gradients,) = flax.linen.meta.unbox(gradients)["params"].values()
    for (name, part), gradient in flax.traverse_util.flatten_dict(gradients).items():
        assert_close(gradient, wanted[name][part][...], FLOAT32)
