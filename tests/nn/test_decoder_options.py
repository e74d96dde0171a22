"""Options of published decoders in a `LanguageModel`, against all of it written out in float64."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mlstm_cases import quick_jit

from swr_jax.nn import LanguageModel, LanguageModelConfig, RopeScaling, SlidingWindowAttention
from swr_jax.nn.feedforward import rms_norm
from swr_jax.nn.rotary import rotary_frequencies

LENGTH, VOCABULARY = 22, 37
SIZES = {
    "vocab_size": VOCABULARY,
    "features": 24,
    "depth": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "window": 6,
    "mlp_features": 40,
}
LLAMA_3 = RopeScaling(
    "llama3", factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=32
)
CASES = {
    "llama 3": {
        "pattern": ("attention",),
        "rope_base": 500.0,
        "rope_scaling": LLAMA_3,
        "output_bias": True,
        "qkv_bias": True,
        "mlp_bias": True,
    },
    "qwen": {
        "pattern": ("swa",),
        "qkv_bias": True,
        "qk_norm": True,
        "head_dim": 10,
        "tie_embeddings": False,
        "mlp_activation": "gelu",
    },
    "gemma": {
        "pattern": ("swa", "attention"),
        "head_dim": 8,
        "qk_norm": True,
        "norm_offset": 1.0,
        "post_norms": True,
        "mlp_activation": "gelu_tanh",
        "embedding_scale": 24**0.5,
        "attention_scale": 0.5,
        "attention_soft_cap": 2.0,
        "logits_soft_cap": 5.0,
        "rope_local_base": 100.0,
        "rope_scaling": RopeScaling("linear", factor=4.0),
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
    },
}
# One has next to all options; the others run in the complete suite.
each_case = pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[pytest.mark.slow] * (name != "gemma")) for name in CASES]
)


def relative_error(got, wanted):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    return np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2))


@functools.cache
def initial(case, **options):
    """A model of random numbers, none left at a value that would hide a mistake."""
    config = LanguageModelConfig(**SIZES, **CASES[case], **options)
    definition, abstract = nnx.split(
        nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    )
    rng = np.random.default_rng(0)
    values = []
    for path, x in nnx.to_flat_state(abstract):
        value = rng.normal(size=x.shape)
        if path[-1] == "kernel":
            value /= math.sqrt(x.shape[-2])
        elif path[-1] == "scale":
            value = 1 - config.norm_offset + 0.3 * value
        elif path[-1] == "bias":
            value *= 0.5
        values.append((path, x.replace(jnp.asarray(value, x.dtype))))
    return nnx.merge(definition, nnx.from_flat_state(values))


def sample():
    return np.random.default_rng(1).integers(0, VOCABULARY, (2, LENGTH))


def angles(config, mixer, dim):
    """Angle per token of each pair of features, one after the other."""
    local = mixer == "swa" and config.rope_local_base is not None
    base = config.rope_local_base if local else config.rope_base
    found = [base ** (-2 * i / dim) for i in range(dim // 2)]
    scaling = None if local else config.rope_scaling
    return found if scaling is None else [slowed(angle, scaling) for angle in found]


def slowed(angle, scaling):
    """A frequency of a published model with longer contexts, by its wavelength."""
    if scaling.kind == "linear":
        return angle / scaling.factor
    wavelength = 2 * math.pi / angle
    if wavelength > scaling.original_length / scaling.low_frequency_factor:
        return angle / scaling.factor
    if wavelength < scaling.original_length / scaling.high_frequency_factor:
        return angle
    smooth = (scaling.original_length / wavelength - scaling.low_frequency_factor) / (
        scaling.high_frequency_factor - scaling.low_frequency_factor
    )
    return (1 - smooth) * angle / scaling.factor + smooth * angle


def oracle(config, parameters, tokens):
    """Logits of the whole model, block by block and head by head, in the dtype of `parameters`."""
    heads, kv_heads = config.num_heads, config.num_kv_heads
    dim = config.head_dim or config.features // heads
    age = np.subtract.outer(np.arange(LENGTH), np.arange(LENGTH))

    def norm(x, scale):
        size = jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + config.norm_epsilon)
        return x / size * (config.norm_offset + scale)

    def activation(x):
        if config.mlp_activation == "silu":
            return x / (1 + jnp.exp(-x))
        if config.mlp_activation == "gelu":
            return x * (1 + jax.scipy.special.erf(x / math.sqrt(2))) / 2
        return x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2

    def rotated(x, mixer):
        turns = jnp.exp(1j * np.outer(np.arange(LENGTH), angles(config, mixer, dim)))
        pairs = (x[..., : dim // 2] + 1j * x[..., dim // 2 :]) * turns
        return jnp.concatenate([pairs.real, pairs.imag], axis=-1)

    def attend(mixer, own, x):
        def project(name):
            out = x @ own[f"mixer.{name}.kernel"]
            return out + own.get(f"mixer.{name}.bias", 0.0)

        q, k, v = (project(name) for name in ("query", "key", "value"))
        visible = (age >= 0) & (age < (config.window if mixer == "swa" else LENGTH))
        outputs = []
        for head in range(heads):
            shared = head * kv_heads // heads
            query = q[..., head * dim : (head + 1) * dim]
            key = k[..., shared * dim : (shared + 1) * dim]
            if config.qk_norm:
                query = norm(query, own["mixer.query_norm.scale"])
                key = norm(key, own["mixer.key_norm.scale"])
            logits = jnp.einsum("btd,bsd->bts", rotated(query, mixer), rotated(key, mixer))
            logits = logits * (config.attention_scale or 1 / math.sqrt(dim))
            if config.attention_soft_cap is not None:
                logits = config.attention_soft_cap * jnp.tanh(logits / config.attention_soft_cap)
            weights = jnp.where(visible, jnp.exp(logits - 10), 0.0)
            weights = weights / weights.sum(axis=-1, keepdims=True)
            outputs.append(weights @ v[..., shared * dim : (shared + 1) * dim])
        joined = jnp.concatenate(outputs, axis=-1)
        return joined @ own["mixer.output.kernel"] + own.get("mixer.output.bias", 0.0)

    x = parameters["embedding"][tokens] * config.embedding_scale
    for block in range(config.depth):
        place, period = block % len(config.pattern), block // len(config.pattern)
        prefix = f"periods.{place}."
        own = {
            name.removeprefix(prefix): value[period]
            for name, value in parameters.items()
            if name.startswith(prefix)
        }
        added = attend(config.pattern[place], own, norm(x, own["mixer_norm.scale"]))
        if config.post_norms:
            added = norm(added, own["mixer_post_norm.scale"])
        x = x + added
        hidden = norm(x, own["mlp_norm.scale"])
        gate, up = (
            hidden @ own[f"mlp.{name}.kernel"] + own.get(f"mlp.{name}.bias", 0.0)
            for name in ("gate", "up")
        )
        added = (activation(gate) * up) @ own["mlp.down.kernel"] + own.get("mlp.down.bias", 0.0)
        if config.post_norms:
            added = norm(added, own["mlp_post_norm.scale"])
        x = x + added
    unembedding = parameters.get("unembedding.kernel", parameters["embedding"].T)
    logits = norm(x, parameters["norm.scale"]) @ unembedding
    cap = config.logits_soft_cap
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def flat(state):
    return {".".join(map(str, path)): x[...] for path, x in nnx.to_flat_state(state)}


@each_case
def test_logits_and_every_gradient_equal_the_model_written_out(case):
    model, tokens = initial(case), sample()
    definition, variables = nnx.split(model)
    cotangent = np.random.default_rng(2).normal(size=(2, LENGTH, VOCABULARY))

    def ours(variables):
        logits = nnx.merge(definition, variables)(jnp.asarray(tokens, jnp.int32))
        return (logits * jnp.asarray(cotangent, jnp.float32)).sum(), logits

    gradients, logits = quick_jit(jax.grad(ours, has_aux=True))(variables)
    with jax.enable_x64():
        exact = {
            name: jnp.asarray(np.asarray(x, np.float64)) for name, x in flat(variables).items()
        }

        def theirs(parameters):
            logits = oracle(model.config, parameters, tokens)
            return (logits * cotangent).sum(), logits

        wanted_gradients, wanted = quick_jit(jax.grad(theirs, has_aux=True))(exact)
        assert wanted.dtype == jnp.float64
    assert relative_error(logits, wanted) <= 3e-6
    found = flat(gradients)
    assert found.keys() == wanted_gradients.keys()
    for name, gradient in found.items():
        assert relative_error(gradient, wanted_gradients[name]) <= 2e-5, name


@each_case
@pytest.mark.parametrize(
    "chunks",
    [[13, *[1] * 9], pytest.param([1, 4, 6, 11], marks=pytest.mark.slow)],
    ids=str,
)
def test_prefill_and_steps_equal_one_forward(case, chunks):
    model, tokens = initial(case), jnp.asarray(sample(), jnp.int32)
    definition, variables = nnx.split(model)
    run = quick_jit(lambda tokens, **state: nnx.merge(definition, variables)(tokens, **state))
    state, outputs, start = model.init_state(2, max_length=LENGTH), [], 0
    for length in chunks:
        logits, state = run(tokens[:, start : start + length], state=state)
        outputs.append(logits)
        start += length
    assert start == LENGTH
    assert relative_error(jnp.concatenate(outputs, axis=1), run(tokens)) <= 3e-6


def test_bfloat16_is_close_to_float32():
    model, tokens = initial("gemma"), jnp.asarray(sample(), jnp.int32)
    config = dataclasses.replace(model.config, dtype="bfloat16")
    half = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    half = nnx.merge(nnx.split(half)[0], nnx.state(model))
    run = quick_jit(lambda model: model(tokens))
    assert 1e-4 < relative_error(run(half), run(model)) < 5e-2


def test_norms_with_an_offset_start_as_those_without():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8)), jnp.float32)
    plain, offset = (rms_norm(8, offset=value, rngs=nnx.Rngs(0)) for value in (0.0, 1.0))
    np.testing.assert_array_equal(offset.scale[...], np.zeros(8))
    np.testing.assert_allclose(offset(x), plain(x), rtol=1e-6)
    assert offset.scale.out_sharding == (None,)
    assert offset(x.astype(jnp.bfloat16)).dtype == jnp.float32
    assert rms_norm(8, offset=1.0, dtype="bfloat16", rngs=nnx.Rngs(0))(x).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling("linear", factor=3.0),
        LLAMA_3,
        # As Llama 3.1 has it.
        RopeScaling("llama3", factor=8.0, original_length=8192),
    ],
)
def test_scaled_frequencies_are_the_published_ones(scaling):
    found = rotary_frequencies(128, base=500_000.0, scaling=scaling)
    wanted = [slowed(500_000.0 ** (-2 * i / 128), scaling) for i in range(64)]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    if scaling.kind == "llama3":
        # Some as they were, some slowed down, some between the two.
        ratio = found / 500_000.0 ** (-2 * np.arange(64) / 128)
        assert ratio[0] == 1
        assert ratio[-1] == pytest.approx(1 / 8)
        assert ((ratio > 0.13) & (ratio < 0.99)).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "yarn"}, "kind='yarn'; it must be one of linear, llama3"),
        ({"factor": 0.0}, r"factor=0\.0; it must be above 0"),
        ({"original_length": -1}, "original_length=-1; it must be above 0"),
        ({"low_frequency_factor": 4.0}, r"high_frequency_factor=4\.0; it must be above low"),
    ],
)
def test_scalings_that_are_none_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**({"kind": "llama3", "factor": 2.0} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 7}, "head_dim=7; it must be even"),
        ({"head_dim": 0}, "head_dim=0; it must be even and at least 2"),
        ({"attention_scale": 0.0}, r"attention_scale=0\.0; it must be above 0, or None"),
        ({"attention_soft_cap": -1.0}, r"attention_soft_cap=-1\.0; it must be above 0, or None"),
        ({"rope_local_base": 0.0}, r"rope_local_base=0\.0; it must be above 0, or None"),
        ({"mlp_activation": "relu"}, "mlp_activation='relu'; it must be one of silu, gelu, gelu_t"),
        ({"embedding_scale": 0.0}, r"embedding_scale=0\.0; it must be above 0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LanguageModelConfig(**SIZES, pattern=("attention",), **options)


@pytest.mark.parametrize("name", ["scale", "logits_soft_cap"])
def test_bad_options_of_the_layer_are_named(name):
    with pytest.raises(ValueError, match=rf"{name}=-1\.0; it must be above 0, or None"):
        SlidingWindowAttention(8, num_heads=2, window=2, **{name: -1.0}, rngs=nnx.Rngs(0))


def test_biases_of_inputs_and_output_are_chosen_apart():
    def biases(**options):
        layer = SlidingWindowAttention(8, num_heads=2, window=2, **options, rngs=nnx.Rngs(0))
        names = ("query", "key", "value", "output")
        return {name for name in names if getattr(layer, name).bias is not None}

    assert biases() == set()
    assert biases(use_bias=True) == {"query", "key", "value", "output"}
    assert biases(qkv_bias=True) == {"query", "key", "value"}
    assert biases(use_bias=True, qkv_bias=False) == {"output"}
