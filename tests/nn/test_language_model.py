"""`LanguageModel`: every mixer pattern in training, prefill and decoding; the scanned stack."""

import dataclasses
import functools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from swr_jax.nn.blocks import Block, MLSTMConfig, PhalanxConfig
from swr_jax.nn.language_model import LanguageModel, LanguageModelConfig, num_parameters

BLOCK = 4  # tokens per block of the recurrence
LENGTH = 24
VOCABULARY = 61
PATTERNS = [
    ("attention",),
    ("phalanx", "attention"),
    ("swa", "attention"),
    ("phalanx",),
    ("swa",),
    ("swa", "mlstm"),
]
# Mixers in another order, or whose own tests say as much: in the complete suite only.
MORE_PATTERNS = [("mlstm", "swa"), ("mlstm",), ("swa", "gated_delta")]
each_pattern = pytest.mark.parametrize(
    "pattern",
    [*PATTERNS, *(pytest.param(names, marks=pytest.mark.slow) for names in MORE_PATTERNS)],
    ids="-".join,
)


def configuration(names, **options):
    defaults = {
        "vocab_size": VOCABULARY,
        "features": 32,
        "depth": 2 * len(names),
        "pattern": names,
        "num_heads": 4,
        "num_kv_heads": 2,
        "window": 6,
        "mlp_features": 48,
        "phalanx": PhalanxConfig(head_dim=8, block_size=BLOCK, num_gate_heads=2, global_heads=2),
        "mlstm": MLSTMConfig(num_heads=2, chunk_size=8),
    }
    return LanguageModelConfig(**(defaults | options))


@functools.cache
def initial(config):
    """A model with larger embeddings than it starts with, so that logits tell tokens apart.

    And with gates of mLSTM that are open, where they start all but closed and the same for all.
    """
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    model.embedding[...] = 20 * model.embedding[...]
    for name, block in zip(config.pattern, model.periods, strict=True):
        if name == "mlstm":
            mixer = block.mixer
            for gate in (mixer.input_gate, mixer.forget_gate, mixer.output_gate):
                shape = gate.kernel.shape
                gate.kernel[...] = jax.random.normal(jax.random.key(1), shape) / math.sqrt(shape[1])
            mixer.input_gate.bias[...] += 10
    return model


@functools.cache
def compiled(config):
    """The model as pure functions, without and with a state."""
    definition, variables = nnx.split(initial(config))

    @jax.jit
    def full(tokens, **options):
        return nnx.merge(definition, variables)(tokens, **options)

    @functools.partial(jax.jit, donate_argnums=1)
    def step(tokens, state, **options):
        return nnx.merge(definition, variables)(tokens, state=state, **options)

    return full, step


def sample(batch=2, length=LENGTH):
    rng = np.random.default_rng(length)
    return jnp.asarray(rng.integers(0, VOCABULARY, (batch, length)), jnp.int32)


def run_in_chunks(step, state, tokens, lengths, **options):
    outputs, start = [], 0
    for length in lengths:
        part = slice(start, start + length)
        logits, state = step(
            tokens[:, part], state, **{name: x[:, part] for name, x in options.items()}
        )
        outputs.append(logits)
        start += length
    return jnp.concatenate(outputs, axis=1)


def packing(lengths):
    """Documents of these lengths in each row: their numbers, and positions within them."""
    segment_ids = [np.repeat(np.arange(1, len(row) + 1), row) for row in lengths]
    positions = [np.concatenate([np.arange(n) for n in row]) for row in lengths]
    return {
        "segment_ids": jnp.asarray(segment_ids, jnp.int32),
        "positions": jnp.asarray(positions, jnp.int32),
    }


def relative_error(got, wanted):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    return np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2))


@each_pattern
def test_a_future_token_changes_nothing_before_it(pattern):
    full, _ = compiled(configuration(pattern))
    tokens = sample()
    before = full(tokens)
    for place in (1, 7, 8, LENGTH - 1):
        after = full(tokens.at[:, place].set((tokens[:, place] + 1) % VOCABULARY))
        np.testing.assert_array_equal(before[:, :place], after[:, :place])
        assert np.abs(before[:, place] - after[:, place]).max() > 1e-2


@each_pattern
@pytest.mark.parametrize(
    "prompt",
    [
        *(pytest.param(n, marks=pytest.mark.slow) for n in (1, BLOCK - 1, BLOCK + 1, 2 * BLOCK)),
        BLOCK,
        3 * BLOCK + 5,
    ],
)
def test_prefill_then_decoding_equals_one_forward(pattern, prompt):
    config = configuration(pattern)
    full, step = compiled(config)
    tokens, options = sample(), packing([[LENGTH], [LENGTH]])
    state = initial(config).init_state(2, max_length=LENGTH)
    got = run_in_chunks(step, state, tokens, [prompt] + [1] * (LENGTH - prompt), **options)
    assert relative_error(got, full(tokens)) <= 3e-6


@each_pattern
def test_any_chunking_of_packed_documents_equals_one_forward(pattern):
    config = configuration(pattern)
    full, step = compiled(config)
    tokens, options = sample(), packing([[6, 1, 8, 9], [15, 9]])
    state = initial(config).init_state(2, max_length=LENGTH)
    # Chunks that end inside, at and one past the ends of documents and blocks.
    got = run_in_chunks(step, state, tokens, [5, 1, 1, 1, 3, 8, 5], **options)
    assert relative_error(got, full(tokens, **options)) <= 3e-6


@each_pattern
def test_documents_packed_together_are_isolated(pattern):
    full, _ = compiled(configuration(pattern))
    tokens, options = sample(), packing([[6, 1, 8, 9], [15, 9]])
    before = full(tokens, **options)
    for document in (1, 2, 4):
        inside = options["segment_ids"] == document
        after = full(jnp.where(inside, (tokens + 1) % VOCABULARY, tokens), **options)
        np.testing.assert_array_equal(before[~inside], after[~inside])


@each_pattern
def test_packed_documents_equal_separate_runs(pattern):
    full, _ = compiled(configuration(pattern))
    # Documents begin with a block, as they do alone: the recurrence's window hangs on that.
    lengths = [2 * BLOCK, BLOCK, 3 * BLOCK]
    ends = np.cumsum(lengths)
    tokens, options = sample(), packing([lengths, lengths])
    packed = full(tokens, **options)
    for row in range(2):
        for end, length in zip(ends, lengths, strict=True):
            # The document at the start of the sequence; what follows there comes too late to act.
            alone = full(jnp.roll(tokens, length - end, axis=1))[row, :length]
            assert relative_error(packed[row, end - length : end], alone) <= 3e-6


@each_pattern
def test_scanned_stack_equals_a_loop_over_blocks_written_out(pattern):
    config = configuration(pattern, logits_soft_cap=5.0)
    model, tokens = initial(config), sample()
    definition, variables = nnx.split(model.periods)

    def norm(x, scale):
        x = np.asarray(x, np.float64)
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * scale

    x = np.asarray(model.embedding[...], np.float64)[tokens]
    for period in range(2):
        own = jax.tree.map(operator.itemgetter(period), variables)
        for block in nnx.merge(definition, own):
            mixed = block.mixer(jnp.asarray(norm(x, block.mixer_norm.scale[...]), jnp.float32))
            x = x + np.asarray(mixed, np.float64)
            h = norm(x, block.mlp_norm.scale[...])
            kernel = {
                name: np.asarray(getattr(block.mlp, name).kernel[...], np.float64)
                for name in ("gate", "up", "down")
            }
            gate = h @ kernel["gate"]
            x = x + (gate / (1 + np.exp(-gate)) * (h @ kernel["up"])) @ kernel["down"]
    logits = norm(x, model.norm.scale[...]) @ np.asarray(model.embedding[...], np.float64).T
    got = compiled(config)[0](tokens)
    assert np.abs(got).max() < 5
    assert relative_error(got, 5 * np.tanh(logits / 5)) <= 3e-6


def test_program_does_not_grow_with_depth():
    def size(depth):
        model = nnx.eval_shape(
            lambda: LanguageModel(
                configuration(("phalanx", "attention"), depth=depth), rngs=nnx.Rngs(0)
            )
        )
        definition, variables = nnx.split(model)
        run = jax.jit(lambda variables, tokens: nnx.merge(definition, variables)(tokens))
        return len(run.lower(variables, sample()).as_text().splitlines())

    assert size(2) == size(16)


def gradients_and_memory(pattern, remat):
    config = configuration(pattern, remat=remat)
    definition, variables = nnx.split(initial(dataclasses.replace(config, remat="none")))
    definition = nnx.graphdef(initial(config))

    def loss(variables, tokens):
        logits = nnx.merge(definition, variables)(tokens)
        return -jax.nn.log_softmax(logits)[..., 0].mean()

    run = jax.jit(jax.grad(loss)).lower(variables, sample(8)).compile()
    return run(variables, sample(8)), run.memory_analysis().temp_size_in_bytes


def test_remat_trades_memory_for_the_same_gradients():
    wanted, most = gradients_and_memory(("swa",), "none")
    for remat, share in (("dots", 0.95), ("full", 0.6)):
        got, memory = gradients_and_memory(("swa",), remat)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())
        assert memory <= share * most, remat


@pytest.mark.parametrize(
    "pattern",
    [
        ("phalanx", "attention"),
        ("swa", "mlstm"),
        pytest.param(("swa", "gated_delta"), marks=pytest.mark.slow),
    ],
    ids="-".join,
)
def test_every_parameter_has_a_gradient(pattern):
    gradients, _ = gradients_and_memory(pattern, "none")
    for path, gradient in nnx.to_flat_state(gradients):
        assert 0 < jnp.abs(gradient[...]).max() < jnp.inf, path


@pytest.mark.parametrize("features", [256, 384])
def test_equal_widths_make_equal_numbers_of_parameters(features):
    counts = {}
    for pattern in PATTERNS + MORE_PATTERNS:
        config = LanguageModelConfig(
            vocab_size=300, features=features, depth=4, pattern=pattern, num_heads=4
        )
        counts[pattern] = num_parameters(
            nnx.eval_shape(lambda config=config: LanguageModel(config, rngs=nnx.Rngs(0)))
        )
    # Four M x M projections and three of SwiGLU per block, two norms; embedding; last norm.
    hidden = 64 * math.ceil(features / 24)
    block = 4 * features**2 + 3 * features * hidden + 2 * features
    assert counts[("attention",)] == 4 * block + 300 * features + features
    assert max(counts.values()) <= 1.02 * min(counts.values())


def test_axes_carry_logical_names():
    config = configuration(("phalanx", "attention"), tie_embeddings=False)
    model = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    names = {
        ".".join(map(str, path)): variable.out_sharding
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }
    assert names["embedding"] == ("vocab", "embed")
    assert names["unembedding.kernel"] == ("embed", "vocab")
    assert names["norm.scale"] == (None,)
    attention = "periods.1.mixer"
    assert names[f"{attention}.query.kernel"] == ("layers", "embed", "heads")
    assert names[f"{attention}.key.kernel"] == ("layers", "embed", "kv_heads")
    assert names[f"{attention}.output.kernel"] == ("layers", "heads", "embed")
    assert names["periods.0.mlp.gate.kernel"] == ("layers", "embed", "mlp")
    assert names["periods.0.mlp.down.kernel"] == ("layers", "mlp", "embed")
    assert names["periods.0.mixer_norm.scale"] == ("layers", None)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        name = ".".join(map(str, path))
        assert len(names[name]) == len(variable.shape), name
        assert (names[name][0] == "layers") == name.startswith("periods."), name
    rules = (("embed", "fsdp"), ("mlp", "tensor"), ("layers", None))
    with nnx.logical_axis_rules(rules):
        specs = nnx.get_partition_spec(nnx.state(model))
    assert specs["periods"][0]["mlp"]["gate"]["kernel"].get_value() == jax.P(None, "fsdp", "tensor")


def test_a_mesh_in_use_changes_nothing():
    config = configuration(("swa",))
    auto = jax.sharding.AxisType.Auto
    with jax.set_mesh(jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(auto, auto))):
        model = LanguageModel(config, rngs=nnx.Rngs(0))
    got, wanted = (nnx.state(x.periods) for x in (model, initial(config)))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(("tied", "width"), [(True, 64), (False, 512)])
def test_first_loss_is_close_to_guessing(tied, width):
    config = configuration(("swa",), features=width, vocab_size=1000, tie_embeddings=tied)
    tokens = jax.random.randint(jax.random.key(0), (4, 65), 0, 1000)

    @jax.jit
    def loss():
        logits = LanguageModel(config, rngs=nnx.Rngs(0))(tokens[:, :-1])
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], 2).mean()

    assert abs(loss() - math.log(1000)) < 0.2


def test_last_projections_of_blocks_start_smaller_with_depth():
    config = configuration(("phalanx", "attention"), depth=8, features=64, phalanx=PhalanxConfig())
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    for block in model.periods:
        for projection in (block.mixer.output, block.mlp.down):
            fan_in = projection.kernel.shape[1]
            wanted = fan_in**-0.5 / math.sqrt(2 * 8)
            np.testing.assert_allclose(np.std(projection.kernel[...]), wanted, rtol=0.05)
        np.testing.assert_allclose(np.std(block.mlp.gate.kernel[...]), 64**-0.5, rtol=0.05)
        assert not np.array_equal(block.mlp.gate.kernel[0], block.mlp.gate.kernel[1])


def test_last_projection_of_mlstm_starts_as_published():
    """Smaller by the number of blocks, and not once more by its square root."""
    config = configuration(("mlstm",), depth=8, features=64)
    (block,) = LanguageModel(config, rngs=nnx.Rngs(0)).periods
    np.testing.assert_allclose(np.std(block.mixer.output.kernel[...]), 2 / 8 / 64**0.5, rtol=0.05)
    wanted = 48**-0.5 / math.sqrt(2 * 8)
    np.testing.assert_allclose(np.std(block.mlp.down.kernel[...]), wanted, rtol=0.05)


def test_a_window_can_change_while_the_parameters_stay():
    """As training with a window drawn for each batch does."""
    config = configuration(("swa", "mlstm"))
    short = dataclasses.replace(config, window=3)
    definition, variables = nnx.split(initial(config))
    short_definition, short_variables = nnx.split(initial(short))
    assert jax.tree.structure(variables) == jax.tree.structure(short_variables)
    jax.tree.map(np.testing.assert_array_equal, variables, short_variables)
    assert definition != short_definition

    wanted = compiled(short)[0](sample())
    got = jax.jit(lambda tokens: nnx.merge(short_definition, variables)(tokens))(sample())
    np.testing.assert_array_equal(got, wanted)
    # Tokens up to the window see what they saw; what comes later does not.
    long = compiled(config)[0](sample())
    assert relative_error(long[:, :3], wanted[:, :3]) <= 3e-6
    assert np.abs(long[:, 3:] - wanted[:, 3:]).max() > 1e-2


@pytest.mark.parametrize(
    "pattern",
    [
        ("swa", "mlstm"),
        *(pytest.param(names, marks=pytest.mark.slow) for names in MORE_PATTERNS),
    ],
    ids="-".join,
)
def test_learns_a_text_by_heart(pattern):
    config = configuration(pattern, depth=len(pattern))
    definition, variables = nnx.split(LanguageModel(config, rngs=nnx.Rngs(0)))
    tokens = sample(2, 9)

    def loss(variables):
        logits = nnx.merge(definition, variables)(tokens[:, :-1])
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], 2).mean()

    optimizer = optax.adam(1e-2)

    @jax.jit
    def update(variables, moments):
        value, gradient = jax.value_and_grad(loss)(variables)
        steps, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(variables, steps), moments, value

    moments, losses = optimizer.init(variables), []
    for _ in range(25):
        variables, moments, value = update(variables, moments)
        losses.append(float(value))
    assert losses[0] == pytest.approx(math.log(VOCABULARY), abs=0.2)
    assert losses[-1] < 0.5 * losses[0]


@each_pattern
def test_bfloat16_is_close_to_float32_and_logits_stay_float32(pattern):
    config = configuration(pattern)
    half = dataclasses.replace(config, dtype="bfloat16")
    definition, _ = nnx.split(initial(half))
    variables = nnx.state(initial(config))
    assert {x.dtype for x in jax.tree.leaves(nnx.state(initial(half)))} == {jnp.dtype("float32")}
    got = jax.jit(lambda tokens: nnx.merge(definition, variables)(tokens))(sample())
    assert got.dtype == jnp.float32
    # Where the values of a head of mLSTM cancel, its norm magnifies their rounding errors.
    limit = 5e-2 if pattern == ("mlstm",) else 2e-2
    assert relative_error(got, compiled(config)[0](sample())) <= limit


def test_hidden_and_logits_are_the_two_halves_of_a_call():
    for tied in (True, False):
        config = configuration(("swa",), tie_embeddings=tied)
        model, tokens = initial(config), sample()
        hidden = model.hidden(tokens)
        assert hidden.shape == (2, LENGTH, 32)
        wanted = model(tokens)
        parts = [model.logits(hidden[:, i : i + 8]) for i in range(0, LENGTH, 8)]
        np.testing.assert_allclose(jnp.concatenate(parts, 1), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 3}, "depth=3 is not a multiple of the 2 mixers"),
        ({"pattern": ("swa", "conv")}, "each one of attention, gated_delta, mlstm, phalanx, swa"),
        ({"pattern": ()}, "at least one name"),
        ({"vocab_size": 0}, "vocab_size=0; it must be at least 1"),
        ({"window": 0}, "window=0; it must be at least 1"),
        ({"remat": "some"}, "remat='some'; it must be one of none, dots, full"),
        ({"logits_soft_cap": 0.0}, "logits_soft_cap=0.0; it must be above 0"),
        ({"mlp_features": 0}, "mlp_features=0; it must be at least 1"),
        ({"mlp_ratio": -1.0}, "mlp_ratio=-1.0; it must be above 0"),
        ({"dtype": "int32"}, "dtype='int32'; it must be a floating dtype"),
    ],
)
def test_bad_configurations_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        configuration(("phalanx", "attention"), **({"depth": 4} | options))


def test_configurations_compare_by_value():
    one = configuration(("swa",), dtype="bfloat16")
    same = configuration(["swa"], dtype=jnp.bfloat16)
    assert one == same
    assert hash(one) == hash(same)


@pytest.mark.parametrize("tokens", [jnp.zeros(4, jnp.int32), jnp.zeros((1, 4))])
def test_bad_tokens_are_named(tokens):
    with pytest.raises(ValueError, match=r"tokens has shape .* integers \[batch, time\]"):
        initial(configuration(("swa",)))(tokens)


def test_block_is_the_identity_with_silent_projections():
    block = Block(configuration(("swa",)), "swa", rngs=nnx.Rngs(0))
    for projection in (block.mixer.output, block.mlp.down):
        projection.kernel[...] = jnp.zeros_like(projection.kernel[...])
    x = jax.random.normal(jax.random.key(0), (1, 5, 32))
    np.testing.assert_array_equal(block(x, state=None)[0], x)
