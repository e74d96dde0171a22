"""Decoder checkpoints here and in transformers: the same logits, streams, and files, in float32."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

from swr_jax.nn.convert import load_pretrained, save_pretrained
from swr_jax.nn.convert_families import FAMILIES

pytestmark = pytest.mark.slow
WHY = "compares with transformers and torch: pip install 'swr_jax[parity]', or make test-parity"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)

TOLERANCE = 1e-4
WINDOW = 8
LENGTHS = [1, WINDOW, WINDOW + 1, 61]
SIZES = {
    "vocab_size": 83,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 2000.0, "factor": 4.0}
WINDOWS = {"sliding_window": WINDOW}
# By name: the model_type, and options of its configuration.
CASES = {
    "llama": ("llama", {}),
    "llama of many heads": ("llama", {"num_key_value_heads": 6, "rms_norm_eps": 1e-3}),
    "llama 3": ("llama", {"rope_parameters": LLAMA_3, "tie_word_embeddings": True}),
    "llama with linear positions": ("llama", {"rope_parameters": LINEAR, "head_dim": 20}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with gelu": ("llama", {"hidden_act": "gelu"}),
    "mistral": ("mistral", WINDOWS),
    "mistral without windows": ("mistral", {"sliding_window": None, "head_dim": 12}),
    "qwen 2": ("qwen2", {}),
    "qwen 2 with windows": (
        "qwen2",
        {"use_sliding_window": True, "max_window_layers": 3} | WINDOWS,
    ),
    "qwen 3": ("qwen3", {"head_dim": 16, "rope_parameters": {"rope_theta": 1e6}}),
    "qwen 3 with layer types": (
        "qwen3",
        {
            "use_sliding_window": True,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "attention_bias": True,
            "head_dim": 10,
        }
        | WINDOWS,
    ),
    "gemma": ("gemma", {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma 2": (
        "gemma2",
        {"head_dim": 16, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 3.0} | WINDOWS,
    ),
    "gemma 2 without caps": (
        "gemma2",
        {"head_dim": 16, "attn_logit_softcapping": None, "final_logit_softcapping": None} | WINDOWS,
    ),
    "gemma 3": (
        "gemma3_text",
        {
            "head_dim": 16,
            "num_hidden_layers": 8,  # which 6 does not divide
            "query_pre_attn_scalar": 20,
            "rope_parameters": {
                "full_attention": LINEAR,
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        }
        | WINDOWS,
    ),
}
each_case = pytest.mark.parametrize("case", CASES)


def relative_error(got, wanted):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    return np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2))


def their_config(model_type, **options):
    kind = type(transformers.AutoConfig.for_model(model_type))
    return kind(**(SIZES | options))


def their_model(config):
    """A model of random numbers, none of which is left at a value that would hide a mistake."""
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            if name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            elif parameter.ndim == 1:
                # Around what they start with, 1, or 0 where 1 is added.
                parameter.copy_(parameter + 0.3 * noise)
            else:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
    return model.eval()


@pytest.fixture
def both(case, tmp_path):
    """transformers' model, the folder that it wrote, and what is read of that here."""
    model_type, options = CASES[case]
    theirs = their_model(their_config(model_type, **options))
    theirs.save_pretrained(tmp_path / "theirs")
    return theirs, tmp_path / "theirs", load_pretrained(tmp_path / "theirs")[1]


def sample(length, vocab_size=SIZES["vocab_size"]):
    return np.random.default_rng(length).integers(3, vocab_size, (2, length))


def run_theirs(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens), use_cache=False).logits.numpy()


@functools.partial(jax.jit, static_argnums=0)
def run(definition, variables, tokens, state=None):
    return nnx.merge(definition, variables)(tokens, state=state)


def run_ours(model, tokens, **options):
    return run(*nnx.split(model), jnp.asarray(tokens, jnp.int32), **options)


def stored(folder):
    """Tensors by name, as bytes."""
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        return {
            key: (file.get_tensor(key).dtype, file.get_tensor(key).tobytes())
            for key in file.keys()  # noqa: SIM118 - the file is no mapping
        }


@each_case
def test_logits_agree(both):
    theirs, _, ours = both
    for length in LENGTHS:
        tokens = sample(length)
        assert relative_error(run_ours(ours, tokens), run_theirs(theirs, tokens)) <= TOLERANCE


@each_case
def test_streams_agree(both):
    theirs, _, ours = both
    tokens, start = sample(61), 0
    wanted = run_theirs(theirs, tokens)
    state = ours.init_state(2, max_length=61)
    for length in (WINDOW + 5, 1, 1, 1, WINDOW - 1, 61 - 2 * WINDOW - 7):
        part = slice(start, start + length)
        got, state = run_ours(ours, tokens[:, part], state=state)
        assert relative_error(got, wanted[:, part]) <= TOLERANCE
        start += length
    assert start == 61


@each_case
@pytest.mark.parametrize("with_source", [False, True])
def test_what_is_written_is_what_was_read(both, tmp_path, with_source):
    theirs, folder, ours = both
    out = tmp_path / "ours"
    save_pretrained(
        ours, out, model_type=theirs.config.model_type, source=folder if with_source else None
    )
    assert stored(out) == stored(folder)
    if with_source:
        first, second = (json.loads((x / "config.json").read_text()) for x in (folder, out))
        assert second == {"tie_word_embeddings": theirs.config.tie_word_embeddings} | first
    again = transformers.AutoModelForCausalLM.from_pretrained(
        out, attn_implementation="eager", dtype=torch.float32
    )
    assert type(again) is type(theirs)
    tokens = sample(40)
    np.testing.assert_array_equal(run_theirs(again.eval(), tokens), run_theirs(theirs, tokens))
    assert load_pretrained(out)[0] == ours.config


@each_case
def test_the_older_spelling_of_positions_means_the_same(both, tmp_path):
    theirs, folder, ours = both
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    rope = fields.pop("rope_parameters")
    if "full_attention" in rope:
        fields["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    fields["rope_theta"] = rope.pop("rope_theta")
    fields["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    path.write_text(json.dumps(fields))
    assert load_pretrained(folder)[0] == ours.config
    again = transformers.AutoConfig.from_pretrained(folder)
    assert again.rope_parameters == theirs.config.rope_parameters


def test_a_model_made_here_is_read_there(tmp_path):
    """No checkpoint before it: the family is the first that can describe it."""
    from swr_jax.nn import LanguageModel, LanguageModelConfig

    config = LanguageModelConfig(
        vocab_size=83,
        features=32,
        depth=4,
        pattern=("attention", "swa"),
        num_heads=4,
        num_kv_heads=2,
        window=WINDOW,
        qk_norm=True,
    )
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    save_pretrained(model, tmp_path / "ours", fields={"eos_token_id": 5}, shard_bytes=20_000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", dtype=torch.float32
    )
    assert theirs.config.model_type == "qwen3"
    assert theirs.config.eos_token_id == 5
    tokens = sample(40)
    assert relative_error(run_ours(model, tokens), run_theirs(theirs, tokens)) <= TOLERANCE


@pytest.mark.parametrize("model_type", FAMILIES)
def test_absent_fields_mean_what_they_mean_there(model_type):
    config = transformers.AutoConfig.for_model(model_type)
    family = FAMILIES[model_type]
    # What is derived from others, once it is known; and no field of newer versions.
    derived = {"head_dim", "layer_types", "num_key_value_heads", "sliding_window_pattern"}
    for name, default in family.defaults.items():
        if name in derived and default is None:
            continue
        if name == "sliding_window_pattern":
            assert config._sliding_window_pattern == default
        elif name == "sliding_window" and "use_sliding_window" in family.defaults:
            assert type(config)(use_sliding_window=True).sliding_window == default
        else:
            assert getattr(config, name) == default, name
    rope = config.rope_parameters
    full = rope.get("full_attention", rope)
    assert full["rope_theta"] == family.rope_base
    if family.rope_local_base is not None:
        assert rope["sliding_attention"]["rope_theta"] == family.rope_local_base
    mine = [
        "sliding_attention" if family.layers(family.defaults, block) else "full_attention"
        for block in range(config.num_hidden_layers)
    ]
    if "layer_types" in family.defaults and "use_sliding_window" not in family.defaults:
        assert config.layer_types == mine
