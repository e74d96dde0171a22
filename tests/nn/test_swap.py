"""`swap_mixers`: what stays, bit for bit; how it is stacked anew; how the new mixers start."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from swr_jax.nn import LanguageModel, LanguageModelConfig, PhalanxConfig, swap_mixers
from swr_jax.nn.blocks import MLSTMConfig
from swr_jax.nn.swap import layer_mixers, shortest_period

CONFIG = LanguageModelConfig(
    vocab_size=61,
    features=32,
    depth=4,
    pattern=("swa", "attention"),
    num_heads=4,
    num_kv_heads=2,
    window=6,
    mlp_features=48,
    phalanx=PhalanxConfig(head_dim=4, block_size=4),
    mlstm=MLSTMConfig(num_heads=2, chunk_size=8),
)


def abstract_model(config: LanguageModelConfig) -> LanguageModel:
    return nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))


def model_of(**changes) -> LanguageModel:
    """A model whose parameters are noise of the size that they begin with, no two alike."""
    rng = np.random.default_rng(0)
    definition, state = nnx.split(abstract_model(dataclasses.replace(CONFIG, **changes)))

    def draw(x: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(rng.normal(scale=x.shape[-2] ** -0.5, size=x.shape), x.dtype)

    state = jax.tree.map(lambda x: draw(x) if x.ndim > 1 else jnp.ones(x.shape, x.dtype), state)
    return nnx.merge(definition, state)


def arrays(module: nnx.Module, at=...) -> dict[str, np.ndarray]:
    """All parameters by dotted path, of one period where they are stacked."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(map(str, path)): np.asarray(value[...])[at] for path, value in flat}


def block_arrays(model: LanguageModel, layer: int) -> dict[str, np.ndarray]:
    length = len(model.config.pattern)
    return arrays(model.periods[layer % length], layer // length)


@pytest.mark.parametrize(
    ("sequence", "period"),
    [
        ("a", "a"),
        ("aaaa", "a"),
        ("abab", "ab"),
        ("abba", "abba"),
        ("ababa", "ababa"),  # two and a half times is not all of it
        ("aabaab", "aab"),
    ],
)
def test_shortest_period(sequence, period):
    assert "".join(shortest_period(sequence)) == period


@pytest.mark.parametrize(
    ("pattern", "depth", "layers", "expected"),
    [
        (("swa", "attention"), 4, {0: "phalanx", 2: "phalanx"}, ("phalanx", "attention")),
        (("swa", "attention"), 4, {2: "phalanx"}, ("swa", "attention", "phalanx", "attention")),
        (("attention",), 3, {1: "mlstm"}, ("attention", "mlstm", "attention")),
        (("attention",), 4, {1: "phalanx", 3: "phalanx"}, ("attention", "phalanx")),
        (("phalanx", "swa"), 4, {1: "phalanx", 3: "phalanx"}, ("phalanx",)),
        (("swa", "swa", "attention"), 6, {0: "phalanx", 4: "gated_delta"}, None),
    ],
)
def test_all_but_the_new_mixers_is_the_same_to_the_bit(pattern, depth, layers, expected):
    model = model_of(pattern=pattern, depth=depth)
    before = arrays(model)
    config, swapped = swap_mixers(model, layers, rngs=nnx.Rngs(1))

    mixers = [layers.get(n, pattern[n % len(pattern)]) for n in range(depth)]
    assert list(layer_mixers(config)) == mixers
    assert config.pattern == (tuple(mixers) if expected is None else expected)
    assert swapped.config == config
    shapes = [
        {path: (x.shape, x.dtype) for path, x in nnx.to_flat_state(nnx.state(m, nnx.Param))}
        for m in (swapped, abstract_model(config))
    ]
    assert shapes[0] == shapes[1]

    for layer in range(depth):
        old, new = block_arrays(model, layer), block_arrays(swapped, layer)
        kept = [name for name in new if not (layer in layers and name.startswith("mixer."))]
        assert len(kept) >= 5
        for name in kept:
            np.testing.assert_array_equal(new[name], old[name], err_msg=f"layer {layer}: {name}")
    for name in ("embedding", "norm.scale"):
        np.testing.assert_array_equal(arrays(swapped)[name], before[name])
    for name, value in arrays(model).items():  # what was passed in is as it was
        np.testing.assert_array_equal(value, before[name])


def test_parameters_keep_their_logical_axes():
    _, swapped = swap_mixers(model_of(), {2: "phalanx"}, rngs=nnx.Rngs(1))
    abstract = abstract_model(swapped.config)
    names = [
        {path: value.get_metadata("out_sharding") for path, value in nnx.to_flat_state(state)}
        for state in (nnx.state(swapped, nnx.Param), nnx.state(abstract, nnx.Param))
    ]
    assert names[0] == names[1]


def logits(model: LanguageModel, tokens: jax.Array, segment_ids: jax.Array) -> np.ndarray:
    return np.asarray(nnx.jit(lambda m, t, s: m(t, segment_ids=s))(model, tokens, segment_ids))


def test_a_window_that_holds_everything_is_full_attention():
    """Attention keeps its own parameters, so the function is the same one in other stacks."""
    model = model_of(pattern=("attention",), depth=4)
    config, swapped = swap_mixers(model, {0: "swa", 3: "swa"}, window=24, rngs=nnx.Rngs(1))
    assert config.pattern == ("swa", "attention", "attention", "swa")
    tokens = jax.random.randint(jax.random.key(0), (2, 24), 0, 61)
    segments = jnp.repeat(jnp.arange(2), 12)[None].repeat(2, axis=0)
    exact = logits(model, tokens, segments)
    error = logits(swapped, tokens, segments) - exact
    assert np.linalg.norm(error) <= 1e-6 * np.linalg.norm(exact)
    # With a short window it is another function.
    _, short = swap_mixers(model, {0: "swa", 3: "swa"}, window=2, rngs=nnx.Rngs(1))
    assert np.linalg.norm(logits(short, tokens, segments) - exact) > 1e-3 * np.linalg.norm(exact)


def test_the_same_keys_make_the_same_mixers():
    made = [
        arrays(swap_mixers(model_of(), {0: "mlstm", 2: "mlstm"}, rngs=nnx.Rngs(seed))[1])
        for seed in (1, 1, 2)
    ]
    name = "periods.0.mixer.query.kernel"
    np.testing.assert_array_equal(made[0][name], made[1][name])
    assert not np.array_equal(made[0][name], made[2][name])
    assert not np.array_equal(made[0][name][0], made[0][name][1])  # nor do layers share keys


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        ({}, {}, "name at least one layer"),
        ({-1: "phalanx"}, {}, "layers has -1; it must be the number of a layer, from 0 to 3"),
        ({4: "phalanx"}, {}, "layers has 4;"),
        ({True: "phalanx"}, {}, "layers has True;"),
        ({0: "mamba"}, {}, r"layers\[0\]='mamba'; it must be one of attention, gated_delta"),
        ({1: "attention"}, {}, "is the mixer it has already"),
        ({2: "attention"}, {}, "layer 2 is 'phalanx'; only attention can be replaced"),
        ({0: "phalanx"}, {"init": "best"}, "init='best'; it must be one of"),
        ({0: "phalanx"}, {"features": 64}, "features=64 is no option of the new mixers alone"),
        ({0: "mlstm"}, {"phalanx": PhalanxConfig()}, "these have mlstm"),
        ({0: "phalanx"}, {"phalanx": PhalanxConfig()}, "other layers are 'phalanx' with"),
    ],
)
def test_what_cannot_be_is_refused(layers, options, message):
    pattern = ("swa", "attention", "phalanx", "swa")
    model = abstract_model(dataclasses.replace(CONFIG, pattern=pattern))
    with pytest.raises(ValueError, match=message):
        swap_mixers(model, layers, rngs=nnx.Rngs(1), **options)


def causal_weights(a: np.ndarray, *, block: int, lookback: int | None) -> np.ndarray:
    """Weights [T, T] of a recurrence with one decay, by the definition of its window."""
    time = np.arange(len(a))
    weights = np.zeros((len(a), len(a)))
    for i in time:
        for j in time[: i + 1]:
            if lookback is None or i // block - j // block <= lookback:
                weights[i, j] = np.prod(a[j + 1 : i + 1])
    return weights


def test_phalanx_starts_as_a_fading_mean_of_the_attentions_values():
    """With gates in the middle of where they start it is one, of weights that sum to 1."""
    model = model_of()
    _, swapped = swap_mixers(model, {0: "phalanx", 2: "phalanx"}, rngs=nnx.Rngs(1))
    length, head_dim, heads, layer = 40, 4, 8, 2
    block = swapped.periods[0]
    mixer = nnx.merge(*nnx.split(block.mixer))
    for gate in (mixer.decay, mixer.pre_gate, mixer.post_gate):
        gate.kernel[...] = 0 * gate.kernel[...]
    definition, state = nnx.split(mixer)
    mixer = nnx.merge(definition, jax.tree.map(lambda x: x[layer // 2], state))
    x = np.random.default_rng(3).normal(size=(1, length, 32))
    found = np.asarray(mixer(jnp.asarray(x, jnp.float32)), np.float64)[0]

    attention = {name: np.float64(v) for name, v in block_arrays(model, layer).items()}
    values = x[0] @ attention["mixer.value.kernel"]  # two heads of 8, each for two of queries
    values = values.reshape(length, 2, 1, 8).repeat(2, axis=2).reshape(length, heads, head_dim)
    mixed = np.zeros_like(values)
    for head, bias in enumerate(np.linspace(0, 3, heads)):
        decay = np.full(length, 1 / (1 + np.exp(-bias)))
        weights = 0.5 * causal_weights(decay, block=4, lookback=1) + np.eye(length)
        share = 1 / (1 + 0.5 * sum(decay[0] ** n for n in range(6)))  # a window of 6 in the mean
        mixed[:, head] = share * weights @ values[:, head]
        assert 0.9 < (share * weights[8:]).sum(1).mean() < 1.1
    exact = mixed.reshape(length, -1) @ attention["mixer.output.kernel"]
    assert np.linalg.norm(found - exact) <= 1e-6 * np.linalg.norm(exact)


def test_where_widths_differ_and_where_it_is_asked_for_phalanx_starts_afresh():
    fresh = arrays(
        swap_mixers(model_of(), {0: "phalanx", 2: "phalanx"}, init="fresh", rngs=nnx.Rngs(1))[1]
    )
    wide = model_of(head_dim=16)  # 4 heads of 16 at a width of 32
    found = arrays(swap_mixers(wide, {0: "phalanx", 2: "phalanx"}, rngs=nnx.Rngs(1))[1])
    new = [name for name in found if name.startswith("periods.0.mixer.")]
    assert len(new) == 8
    for name in new:
        np.testing.assert_array_equal(found[name], fresh[name], err_msg=name)


@pytest.mark.parametrize(
    "options",
    [
        {"lookback": None},
        {"global_heads": 2, "gate_activation": "silu"},
        {"fixed_decay": 1.0, "pre_gate": False, "post_gate": False},
    ],
)
def test_it_starts_finite_whatever_its_options(options):
    phalanx = PhalanxConfig(head_dim=8, block_size=4, **options)
    config, swapped = swap_mixers(model_of(), {0: "phalanx"}, phalanx=phalanx, rngs=nnx.Rngs(1))
    assert config.phalanx == phalanx
    tokens = jnp.zeros((1, 12), jnp.int32)
    assert np.isfinite(logits(swapped, tokens, tokens)).all()
