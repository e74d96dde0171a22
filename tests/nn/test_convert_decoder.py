"""Decoder checkpoints read and written: names, bytes, spellings, and what is refused."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import xlstm_checkpoint
from flax import nnx
from mlstm_cases import quick_jit
from safetensors import safe_open
from safetensors.numpy import save_file

from swr_jax.nn import LanguageModel, LanguageModelConfig, RopeScaling, num_parameters
from swr_jax.nn.convert import (
    MODEL_TYPES,
    convert_pretrained,
    convert_xlstm,
    load_pretrained,
    load_xlstm,
    save_pretrained,
)
from swr_jax.nn.convert_transformer import TRANSFORMERS

SIZES = {
    "vocab_size": 29,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 6,
}
# What config.json of each family has besides sizes.
FIELDS = {
    "llama": {
        "attention_bias": True,
        "mlp_bias": True,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "mistral": {"sliding_window": 5, "rope_theta": 1e6},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "qwen3": {"tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    "gemma": {"hidden_act": "gelu"},
    "gemma2": {"sliding_window": 5, "query_pre_attn_scalar": 7},
    "gemma3_text": {
        "num_hidden_layers": 6,
        "sliding_window": 5,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
}
each_family = pytest.mark.parametrize("family", FIELDS)

BLOCK = {
    "input_layernorm.weight": (12,),
    "post_attention_layernorm.weight": (12,),
    "self_attn.q_proj.weight": (18, 12),
    "self_attn.k_proj.weight": (6, 12),
    "self_attn.v_proj.weight": (6, 12),
    "self_attn.o_proj.weight": (12, 18),
    "mlp.gate_proj.weight": (20, 12),
    "mlp.up_proj.weight": (20, 12),
    "mlp.down_proj.weight": (12, 20),
}
QKV_BIASES = {
    "self_attn.q_proj.bias": (18,),
    "self_attn.k_proj.bias": (6,),
    "self_attn.v_proj.bias": (6,),
}
MORE_BIASES = {
    "self_attn.o_proj.bias": (12,),
    "mlp.gate_proj.bias": (20,),
    "mlp.up_proj.bias": (20,),
    "mlp.down_proj.bias": (12,),
}
QK_NORMS = {"self_attn.q_norm.weight": (6,), "self_attn.k_norm.weight": (6,)}
POST_NORMS = {
    "pre_feedforward_layernorm.weight": (12,),
    "post_feedforward_layernorm.weight": (12,),
}
BLOCKS = {
    "llama": BLOCK | QKV_BIASES | MORE_BIASES,
    "mistral": BLOCK,
    "qwen2": BLOCK | QKV_BIASES,
    "qwen3": BLOCK | QK_NORMS,
    "gemma": BLOCK,
    "gemma2": BLOCK | POST_NORMS,
    "gemma3_text": BLOCK | POST_NORMS | QK_NORMS,
}
TIED = {"qwen3", "gemma", "gemma2", "gemma3_text"}


def configuration(family, **options):
    return SIZES | {"model_type": family} | FIELDS[family] | options


def random_tensors(fields, dtype=np.float32):
    """Tensors by the names of the published checkpoints."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (29, 12), "model.norm.weight": (12,)}
    for block in range(fields["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{block}.{name}": shape
            for name, shape in BLOCKS[fields["model_type"]].items()
        }
    if fields["model_type"] not in TIED:
        shapes["lm_head.weight"] = (29, 12)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def write(folder, fields, tensors):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def stored(folder):
    """Tensors of all files by name: dtype, shape and bytes."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            assert file.metadata() == {"format": "pt"}
            for key in file.keys():  # noqa: SIM118 - the file is no mapping
                array = file.get_tensor(key)
                found[key] = (array.dtype, array.shape, array.tobytes())
    return found


@pytest.fixture
def folder(family, tmp_path):
    fields = configuration(family)
    return write(tmp_path / "theirs", fields, random_tensors(fields))


@each_family
def test_every_tensor_finds_its_place(folder, family):
    config, model = load_pretrained(folder)
    assert model.config == config
    tensors = random_tensors(configuration(family))
    count = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert count == sum(x.size for x in tensors.values())
    for block in (0, 3):
        place = model.periods[block % len(config.pattern)]
        row = block // len(config.pattern)
        name = f"model.layers.{block}.self_attn.k_proj.weight"
        np.testing.assert_array_equal(place.mixer.key.kernel[row], tensors[name].T)
        name = f"model.layers.{block}.input_layernorm.weight"
        np.testing.assert_array_equal(place.mixer_norm.scale[row], tensors[name])
        second = "pre_feedforward" if config.post_norms else "post_attention"
        name = f"model.layers.{block}.{second}_layernorm.weight"
        np.testing.assert_array_equal(place.mlp_norm.scale[row], tensors[name])


def test_fields_mean_what_the_families_mean():
    def config(family, **options):
        fields = configuration(family, **options)
        return convert_pretrained(fields, random_tensors(fields))[0]

    llama = config("llama")
    assert llama.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert (llama.qkv_bias, llama.output_bias, llama.mlp_bias) == (True, True, True)
    assert config("mistral").pattern == ("swa",)
    assert config("mistral", sliding_window=None).pattern == ("attention",)
    assert config("qwen2").pattern == ("attention", "attention", "swa", "swa")
    assert config("qwen2", use_sliding_window=False).pattern == ("attention",)
    assert config("qwen3").qk_norm
    gemma = config("gemma")
    assert (gemma.mlp_activation, gemma.norm_offset) == ("gelu_tanh", 1.0)
    assert gemma.embedding_scale == 12**0.5
    second = config("gemma2")
    assert second.pattern == ("swa", "attention")
    assert (second.attention_soft_cap, second.logits_soft_cap) == (50.0, 30.0)
    assert second.attention_scale == 7**-0.5
    third = config("gemma3_text")
    assert third.pattern == ("swa",) * 5 + ("attention",)
    assert (third.rope_base, third.rope_local_base) == (1e6, 1e4)
    assert third.rope_scaling == RopeScaling("linear", 8.0)
    types = ["full_attention", "sliding_attention"] * 3
    assert config("gemma3_text", layer_types=types).pattern == ("attention", "swa")


@each_family
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_what_is_saved_is_what_was_loaded(family, tmp_path, dtype):
    fields = configuration(family, bos_token_id=5, torch_dtype=np.dtype(dtype).name)
    source = write(tmp_path / "theirs", fields, random_tensors(fields, dtype))
    config, model = load_pretrained(source, param_dtype=np.dtype(dtype).name)
    for name, options in {"alone": {"model_type": family}, "kept": {"source": source}}.items():
        save_pretrained(model, tmp_path / name, **options)
        assert stored(tmp_path / name) == stored(source)
        assert load_pretrained(tmp_path / name, param_dtype=np.dtype(dtype).name)[0] == config
    written = json.loads((tmp_path / "kept" / "config.json").read_text())
    assert written == {"tie_word_embeddings": family in TIED} | fields


def test_xlstm_is_saved_too(tmp_path):
    for mode in ("single", "fused"):
        fields = xlstm_checkpoint.configuration(weight_mode=mode, qk_dim_factor=0.345)
        tensors = xlstm_checkpoint.random_tensors(fields)
        source = tmp_path / mode
        source.mkdir()
        xlstm_checkpoint.write(source, fields, tensors)
        config, model = load_xlstm(source)
        save_pretrained(model, tmp_path / f"{mode} kept", source=source)
        assert stored(tmp_path / f"{mode} kept") == stored(source)
        save_pretrained(model, tmp_path / f"{mode} alone")
        assert load_pretrained(tmp_path / f"{mode} alone")[0] == config
    assert stored(tmp_path / "fused alone") != stored(tmp_path / "fused kept")
    assert stored(tmp_path / "single alone") == stored(tmp_path / "single")


def test_a_float32_model_of_half_precision_is_saved_as_it_was(tmp_path):
    fields = configuration("gemma2")
    source = write(tmp_path / "theirs", fields, random_tensors(fields, ml_dtypes.bfloat16))
    _, model = load_pretrained(source)
    assert model.embedding.dtype == jnp.float32
    save_pretrained(model, tmp_path / "ours", source=source, dtype="bfloat16")
    assert stored(tmp_path / "ours") == stored(source)


def test_large_models_are_cut_into_files(tmp_path):
    fields = configuration("llama")
    source = write(tmp_path / "theirs", fields, random_tensors(fields))
    config, model = load_pretrained(source)
    save_pretrained(model, tmp_path / "ours", shard_bytes=3000)
    files = sorted(path.name for path in (tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert {*index["weight_map"].values()} == {*files}
    sizes = {name: len(data) for name, (_, _, data) in stored(tmp_path / "ours").items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    for file in files:
        assert sum(sizes[x] for x, where in index["weight_map"].items() if where == file) <= 3000
    assert stored(tmp_path / "ours") == stored(source)
    assert load_pretrained(tmp_path / "ours")[0] == config


def test_companions_go_along_and_weights_do_not(tmp_path):
    fields = configuration("qwen3", max_position_embeddings=99)
    source = write(tmp_path / "theirs", fields, random_tensors(fields))
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("template")
    (source / "notes.txt").write_text("of nobody else's interest")
    _, model = load_pretrained(source)
    save_pretrained(model, tmp_path / "ours", source=source, fields={"eos_token_id": [3, 4]})
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")
    }
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (written["max_position_embeddings"], written["eos_token_id"]) == (99, [3, 4])


def test_nothing_is_left_of_a_save_that_fails(tmp_path, monkeypatch):
    fields = configuration("llama")
    _, model = convert_pretrained(fields, random_tensors(fields))

    def fail(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        save_pretrained(model, tmp_path / "ours")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path):
    fields = configuration("llama")
    source = write(tmp_path / "theirs", fields, random_tensors(fields))
    before = stored(source)
    _, model = load_pretrained(source)
    with pytest.raises(FileExistsError, match="is there and not an empty folder"):
        save_pretrained(model, source)
    assert stored(source) == before
    (tmp_path / "empty").mkdir()
    save_pretrained(model, tmp_path / "empty")
    assert stored(tmp_path / "empty") == before


@each_family
def test_both_spellings_of_positions_mean_the_same(family):
    fields = configuration(family)
    tensors = random_tensors(fields)
    wanted, _ = convert_pretrained(fields, tensors)
    default = 1e6 if family == "gemma3_text" else 10_000.0
    rope = {"rope_theta": fields.pop("rope_theta", default)}
    rope |= fields.pop("rope_scaling", None) or {"rope_type": "default"}
    if family == "gemma3_text":
        rope = {"full_attention": rope, "sliding_attention": {"rope_theta": 1e4}}
    got, _ = convert_pretrained(fields | {"rope_parameters": rope}, tensors)
    assert got == wanted


def test_an_equal_unembedding_is_tied_and_another_is_not():
    fields = configuration("qwen3")
    tensors = random_tensors(fields)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    assert convert_pretrained(fields, tensors)[0].tie_embeddings
    tensors["lm_head.weight"][3, 4] += 1
    config, model = convert_pretrained(fields, tensors)
    assert not config.tie_embeddings
    np.testing.assert_array_equal(model.unembedding.kernel[...], tensors["lm_head.weight"].T)


def test_buffers_of_old_checkpoints_are_passed_over():
    fields = configuration("mistral")
    tensors = random_tensors(fields)
    tensors["model.layers.3.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    convert_pretrained(fields, tensors)
    tensors["model.layers.3.self_attn.rotary_emb.other"] = np.ones(3, np.float32)
    with pytest.raises(ValueError, match=r"rotary_emb\.other is no part of the model"):
        convert_pretrained(fields, tensors)


LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", {"model_type": "mixtral"}, "model_type='mixtral'; it must be one of llama, mis"),
        ("llama", {"model_type": "gemma3", "text_config": {}}, "save its text model alone"),
        ("llama", {"hidden_act": "relu2"}, "hidden_act='relu2'; it must be one of silu, swish"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers=0; it must be an integer of at"),
        ("llama", {"head_dim": 5}, "head_dim=5; it must be even"),
        ("llama", {"rms_norm_eps": None}, "rms_norm_eps=None; it must be above 0"),
        ("llama", {"mlp_bias": 1}, "mlp_bias=1; it must be true or false"),
        ("llama", {"layer_types": ["full_attention"] * 4}, "model_type=llama has none"),
        ("llama", {"num_experts": 8}, "num_experts=8; it must be null: feed-forward networks have"),
        ("llama", {"quantization_config": {}}, r"quantization_config=\{\}; it must be null"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5; it must be 1: all"),
        ("llama", {"rope_scaling": {"type": "yarn"}}, "rope_type='yarn'; it must be default, lin"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "factor=None; it must be above 0"),
        ("llama", {"rope_scaling": [2.0]}, r"rope_scaling=\[2\.0\]; it must be an object, or null"),
        ("llama", {"rope_theta": 0}, "rope_theta=0; it must be above 0"),
        (
            "llama",
            {
                "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
                "rope_scaling": None,
            },
            "partial_rotary_factor=0.5; it must be 1",
        ),
        (
            "llama",
            {"rope_scaling": LINEAR | {"mscale": 2.0}},
            "rope_scaling has mscale, of which rope_type='linear' knows nothing",
        ),
        ("llama", {"rope_parameters": LINEAR}, "there must be one of them"),
        (
            "llama",
            {"rope_scaling": FIELDS["llama"]["rope_scaling"] | {"high_freq_factor": 0.5}},
            r"high_frequency_factor=0\.5; it must be above low_frequency_factor",
        ),
        ("mistral", {"sliding_window": 0}, "sliding_window=0; it must be an integer of at least 1"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types has 1 entries; num_hidden_lay"),
        ("qwen2", {"layer_types": ["chunked"] * 4}, "it must be a list of full_attention and sli"),
        (
            "qwen3",
            {"layer_types": ["sliding_attention"] * 4},
            "sliding_window is null and layer_types=",
        ),
        ("gemma", {"hidden_activation": "relu"}, "hidden_activation='relu'; it must be gelu_pyto"),
        ("gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping=0; it must be above 0"),
        (
            "gemma3_text",
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention=True; it must be false: attention is causal",
        ),
        (
            "gemma3_text",
            {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": None},
            "it must have one object for full_attention, one for sliding_attention",
        ),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": LINEAR}, "rope_scaling": None},
            "windows here have no scaled positions",
        ),
    ],
)
def test_what_no_model_has_is_refused_by_name(family, options, message):
    fields = configuration(family)
    with pytest.raises(ValueError, match=message):
        convert_pretrained(fields | options, random_tensors(fields))


def test_all_that_is_wrong_is_named_at_once():
    fields = configuration("gemma2", rms_norm_eps=0, head_dim=-1, rope_theta=-1)
    del fields["vocab_size"]
    with pytest.raises(ValueError, match=r"config\.json does not describe") as error:
        convert_pretrained(fields, {})
    for part in ("rms_norm_eps=0;", "head_dim=-1;", "rope_theta=-1;", "vocab_size is missing"):
        assert part in str(error.value)


def test_tensors_that_do_not_fit_are_named():
    fields = configuration("qwen2")
    tensors = random_tensors(fields)
    del tensors["model.layers.1.self_attn.q_proj.bias"]
    tensors["model.layers.1.self_attn.o_proj.bias"] = np.zeros(12, np.float32)
    with pytest.raises(ValueError, match="tensors do not fit") as error:
        convert_pretrained(fields, tensors)
    assert "model.layers.1.self_attn.q_proj.bias is missing" in str(error.value)
    assert "o_proj.bias is no part of the model" in str(error.value)


def test_xlstm_alone_is_read_by_its_own_functions():
    fields = configuration("llama")
    with pytest.raises(ValueError, match="model_type='llama'; it must be xlstm"):
        convert_xlstm(fields, random_tensors(fields))


def abstract(config):
    return nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))


def made_here(**options):
    defaults = {"vocab_size": 29, "features": 12, "depth": 2, "num_heads": 2, "mlp_features": 20}
    return LanguageModelConfig(**(defaults | {"pattern": ("attention",)} | options))


@pytest.mark.parametrize(
    ("options", "model_type"),
    [
        ({}, "llama"),
        ({"pattern": ("swa",)}, "mistral"),
        ({"qkv_bias": True}, "qwen2"),
        ({"qk_norm": True, "pattern": ("swa", "attention")}, "qwen3"),
        ({"norm_offset": 1.0, "embedding_scale": 12**0.5}, "gemma"),
        (
            {
                "norm_offset": 1.0,
                "embedding_scale": 12**0.5,
                "post_norms": True,
                "logits_soft_cap": 9.0,
                "attention_scale": 0.2,
            },
            "gemma2",
        ),
    ],
)
def test_the_first_family_that_fits_is_written(options, model_type, tmp_path):
    model = LanguageModel(made_here(**options), rngs=nnx.Rngs(0))
    save_pretrained(model, tmp_path / "ours")
    fields = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert fields["model_type"] == model_type
    _, again = load_pretrained(tmp_path / "ours")
    run = quick_jit(lambda model: model(jnp.arange(9)[None]))
    np.testing.assert_array_equal(run(again), run(model))


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        (
            {"pattern": ("phalanx",), "features": 16},
            {},
            "checkpoints have attention and swa alone, or mlstm alone",
        ),
        (
            {"pattern": ("swa", "mlstm"), "features": 16},
            {},
            "attention and swa alone, or mlstm alone",
        ),
        (
            {"qk_norm": True, "logits_soft_cap": 5.0},
            {},
            r"'qwen3' describes .* logits_soft_cap=None instead of 5\.0\. It comes nearest among",
        ),
        ({"qk_norm": True}, {"model_type": "llama"}, "'llama' .* qk_norm=False instead of True"),
        ({}, {"model_type": "gpt2"}, "model_type='gpt2'; it must be one of llama"),
        ({}, {"model_type": "xlstm"}, "model_type='xlstm'; it must be one of llama"),
        (
            {},
            {"fields": {"rope_theta": 5.0}},
            r"changes the model: rope_base=5\.0 instead of 10000",
        ),
        (
            {
                "norm_offset": 1.0,
                "embedding_scale": 12**0.5,
                "post_norms": True,
                "attention_scale": 0.3,
            },
            {"model_type": "gemma2"},
            r"attention_scale=0\.30151.* instead of 0\.3",
        ),
    ],
)
def test_models_that_no_checkpoint_describes_are_refused(options, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_pretrained(abstract(made_here(**options)), tmp_path / "ours", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_was_changed_keeps_what_is_no_arithmetic(tmp_path):
    """The same tensors with another base of the positions, and without windows."""
    fields = configuration("mistral", eos_token_id=7, made_up="of this file")
    source = write(tmp_path / "theirs", fields, random_tensors(fields))
    config, model = load_pretrained(source)
    for name, value in {"rope_base": 5.0, "pattern": ("attention",)}.items():
        changed = dataclasses.replace(config, **{name: value})
        changed = nnx.merge(nnx.split(abstract(changed))[0], nnx.state(model))
        save_pretrained(changed, tmp_path / name, source=source)
        written = json.loads((tmp_path / name / "config.json").read_text())
        assert (written["eos_token_id"], "made_up" in written) == (7, False)
        assert getattr(load_pretrained(tmp_path / name)[0], name) == value
        assert stored(tmp_path / name) == stored(source)


# Fields of published checkpoints, and how many numbers these have.
PUBLISHED = {
    "Llama-3.1-8B": (
        {
            **{"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096},
            **{"intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
            **{"num_key_value_heads": 8, "rope_theta": 500000.0, "pretraining_tp": 1},
            **{"rope_scaling": FIELDS["llama"]["rope_scaling"], "attention_bias": False},
            **{"mlp_bias": False, "attention_dropout": 0.0, "max_position_embeddings": 131072},
        },
        8_030_261_248,
        ("attention",),
    ),
    "Mistral-7B-v0.1": (
        {
            **{"model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096},
            **{"intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
            **{"num_key_value_heads": 8, "sliding_window": 4096, "torch_dtype": "bfloat16"},
        },
        7_241_732_096,
        ("swa",),
    ),
    "Qwen2.5-0.5B": (
        {
            **{"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896},
            **{"intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
            **{"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_theta": 1000000.0},
            **{"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 24},
        },
        494_032_768,
        ("attention",),
    ),
    "Qwen3-0.6B": (
        {
            **{"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024},
            **{"intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
            **{"num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
            **{"use_sliding_window": False, "sliding_window": None, "rope_scaling": None},
        },
        596_049_920,
        ("attention",),
    ),
    "gemma-2b": (
        {
            **{"model_type": "gemma", "vocab_size": 256000, "hidden_size": 2048},
            **{"intermediate_size": 16384, "num_hidden_layers": 18, "num_attention_heads": 8},
            **{"num_key_value_heads": 1, "head_dim": 256, "hidden_act": "gelu"},
        },
        2_506_172_416,
        ("attention",),
    ),
    "gemma-2-9b": (
        {
            **{"model_type": "gemma2", "vocab_size": 256000, "hidden_size": 3584},
            **{"intermediate_size": 14336, "num_hidden_layers": 42, "num_attention_heads": 16},
            **{"num_key_value_heads": 8, "head_dim": 256, "query_pre_attn_scalar": 256},
            **{"sliding_window": 4096, "cache_implementation": "hybrid"},
        },
        9_241_705_984,
        ("swa", "attention"),
    ),
    "gemma-3-1b": (
        {
            **{"model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152},
            **{"intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4},
            **{"num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256},
            **{"sliding_window": 512, "sliding_window_pattern": 6, "rope_theta": 1000000},
            **{"rope_local_base_freq": 10000, "rope_scaling": None, "eos_token_id": [1, 106]},
        },
        999_885_952,
        (*(("swa",) * 5 + ("attention",)) * 4, "swa", "swa"),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_as_many_numbers_as_they_have(name):
    fields, numbers, pattern = PUBLISHED[name]
    config = TRANSFORMERS[fields["model_type"]].config(fields)
    assert config.pattern == pattern
    assert num_parameters(abstract(config)) == numbers


def test_the_documentation_names_every_family():
    assert set(MODEL_TYPES) == {*FIELDS, "xlstm"}
    text = re.sub(r"\s+", " ", load_pretrained.__globals__["__doc__"])
    assert "Llama 2 and 3, Mistral, Qwen 2 and 3, Gemma 1, 2 and 3 (text) and xLSTM" in text
