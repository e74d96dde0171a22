"""xLSTM checkpoints as `LanguageModel`s, against a forward pass written out in NumPy."""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import xlstm_checkpoint as checkpoint
from flax import nnx

from swr_jax.generate import generate_tokens
from swr_jax.nn import num_parameters
from swr_jax.nn.convert import convert_xlstm, load_xlstm

VOCABULARY = 61
LENGTH = 40


def sample(length=LENGTH):
    return np.random.default_rng(length).integers(0, VOCABULARY, (2, length))


@functools.partial(jax.jit, static_argnums=0)
def compiled(definition, variables, tokens, state):
    return nnx.merge(definition, variables)(tokens, state=state)


def run(model, tokens, state=None):
    return compiled(*nnx.split(model), jnp.asarray(tokens, jnp.int32), state)


def relative_error(got, wanted):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    return np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2))


@pytest.fixture
def small():
    fields = checkpoint.configuration(hidden_size=24, embedding_dim=24)
    return fields, checkpoint.random_tensors(fields)


@pytest.mark.parametrize(
    ("options", "shards"),
    [
        ({}, 1),
        ({"weight_mode": "fused"}, 3),
        ({"tie_word_embeddings": True, "num_heads": 1, "gate_soft_cap": 2.0}, 2),
        # 0.345 * 96 = 33.12 features of keys are 33; 1.5 * 96 of values.
        ({"qk_dim_factor": 0.345, "v_dim_factor": 1.5, "output_logit_soft_cap": None}, 1),
        ({"ffn_proj_factor": 1.3, "norm_eps": 1e-2, "gate_soft_cap": None}, 1),
    ],
)
def test_logits_are_those_of_the_checkpoint(options, shards, tmp_path):
    fields = checkpoint.configuration(**options)
    tensors = checkpoint.random_tensors(fields)
    config, model = load_xlstm(checkpoint.write(tmp_path, fields, tensors, shards))
    wanted = checkpoint.logits(fields, tensors, sample())
    assert relative_error(run(model, sample()), wanted) <= 1e-5
    assert model.config == config
    assert num_parameters(model) == sum(x.size for x in tensors.values())


def test_streams_continue_where_they_stand(tmp_path):
    fields = checkpoint.configuration()
    tensors = checkpoint.random_tensors(fields)
    _, model = load_xlstm(checkpoint.write(tmp_path, fields, tensors))
    wanted = checkpoint.logits(fields, tensors, sample())
    state, start = model.init_state(2, max_length=LENGTH), 0
    for length in (19, 1, 1, LENGTH - 21):
        part = slice(start, start + length)
        got, state = run(model, sample()[:, part], state)
        assert relative_error(got, wanted[:, part]) <= 1e-5
        start += length


def test_generates_the_likeliest_tokens(tmp_path):
    fields = checkpoint.configuration()
    tensors = checkpoint.random_tensors(fields)
    _, model = load_xlstm(checkpoint.write(tmp_path, fields, tensors))
    text = sample(7)[:1]
    got = list(generate_tokens(model, text[0].tolist(), max_tokens=9, temperature=0))
    for _ in range(9):
        token = checkpoint.logits(fields, tensors, text)[:, -1].argmax(axis=-1)
        text = np.concatenate([text, token[None]], axis=1)
    assert got == text[0, 7:].tolist()


@pytest.mark.parametrize("stored", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_parameters_have_the_dtype_asked_for(stored, param_dtype, tmp_path):
    fields = checkpoint.configuration(hidden_size=24, embedding_dim=24)
    tensors = checkpoint.random_tensors(fields, dtype=stored)
    folder = checkpoint.write(tmp_path, fields, tensors)
    config, model = load_xlstm(folder, dtype="bfloat16", param_dtype=param_dtype)
    assert config.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(param_dtype)}
    mixer = model.periods[0].mixer
    for block in range(2):
        name = f"backbone.blocks.{block}.mlstm_layer.q.weight"
        np.testing.assert_array_equal(
            mixer.query.kernel[block], tensors[name].astype(jnp.dtype(param_dtype)).T
        )


def test_axes_keep_their_logical_names(small):
    _, model = convert_xlstm(*small)
    assert model.periods[0].mixer.query.kernel.out_sharding == ("layers", "embed", "heads")
    assert model.embedding.out_sharding == ("vocab", "embed")


class Recorded:
    """A tensor that counts how often each of its rows is read."""

    def __init__(self, array):
        self.array = array
        self.shape, self.dtype = array.shape, array.dtype
        self.reads = np.zeros(len(array), int)

    def __getitem__(self, rows):
        self.reads[rows] += 1
        return self.array[rows]


@pytest.mark.parametrize("mode", ["single", "fused"])
def test_every_row_is_read_once(mode):
    fields = checkpoint.configuration(weight_mode=mode, hidden_size=24, embedding_dim=24)
    tensors = checkpoint.random_tensors(fields)
    recorded = {name: Recorded(x) for name, x in tensors.items()}
    convert_xlstm(fields, recorded)
    for name, tensor in recorded.items():
        assert set(tensor.reads) == {1}, name


def test_an_unembedding_that_is_there_is_used(small):
    """As transformers does: tie_word_embeddings ties nothing where a checkpoint has both."""
    fields, tensors = small
    config, model = convert_xlstm(fields | {"tie_word_embeddings": True}, tensors)
    assert not config.tie_embeddings
    np.testing.assert_array_equal(model.unembedding.kernel[...], tensors["lm_head.weight"].T)


def test_absent_fields_have_the_defaults_of_the_format(small):
    fields, tensors = small
    wanted, _ = convert_xlstm(fields, tensors)
    sizes = ("model_type", "vocab_size", "embedding_dim", "num_blocks", "num_heads")
    got, _ = convert_xlstm({name: fields[name] for name in sizes}, tensors)
    assert got == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama'; it must be xlstm"),
        ({"use_bias": True}, "use_bias=True; it must be false"),
        ({"weight_mode": "both"}, "weight_mode='both'; it must be single or fused"),
        ({"eps": 1e-3}, r"eps=0.001; it must be in \[0, 1e-05\]"),
        ({"use_bias": True, "eps": -1.0}, r"eps=-1.0; it must be in .*; use_bias=True; it"),
        ({"embedding_dim": 48}, "hidden_size=24, embedding_dim=48; they must be equal"),
        ({"num_blocks": 3}, "num_hidden_layers=2, num_blocks=3; they must be equal"),
        ({"num_heads": 3.0}, "num_heads=3.0; it must be an integer of at least 1"),
        ({"hidden_size": 0, "embedding_dim": 0}, "hidden_size=0; it must be an integer of at"),
        ({"norm_eps": None}, "norm_eps=None; it must be above 0"),
    ],
)
def test_fields_that_no_model_has_are_named(small, options, message):
    fields, tensors = small
    with pytest.raises(ValueError, match=message):
        convert_xlstm(fields | options, tensors)


def test_heads_that_do_not_divide_are_named():
    fields = checkpoint.configuration(num_heads=5)
    with pytest.raises(ValueError, match="positive multiple of num_heads=5"):
        convert_xlstm(fields, checkpoint.random_tensors(fields))


def test_absent_sizes_are_named(small):
    fields, tensors = small
    del fields["num_heads"]
    with pytest.raises(ValueError, match="num_heads is missing"):
        convert_xlstm(fields, tensors)


def test_tensors_that_do_not_fit_are_all_named(small):
    fields, tensors = small
    block = "backbone.blocks.1"
    del tensors[f"{block}.mlstm_layer.k.weight"]
    tensors[f"{block}.mlstm_layer.k.bias"] = np.zeros(12, np.float32)
    tensors[f"{block}.norm_ffn.weight"] = np.zeros(25, np.float32)
    tensors["backbone.blocks.2.norm_ffn.weight"] = np.zeros(24, np.float32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int8)
    with pytest.raises(ValueError, match="tensors do not fit") as error:
        convert_xlstm(fields, tensors)
    wanted = [
        f"{block}.mlstm_layer.k.weight is missing",
        f"{block}.mlstm_layer.k.bias is no part of the model that config.json describes",
        f"{block}.norm_ffn.weight has shape (25,) instead of (24,)",
        "backbone.blocks.2.norm_ffn.weight is no part of the model that config.json describes",
        "lm_head.weight has dtype int8, which is not a floating one",
    ]
    assert sorted(str(error.value).removeprefix("tensors do not fit: ").split("; ")) == sorted(
        wanted
    )


def test_without_tied_embeddings_the_unembedding_is_missed(small):
    fields, tensors = small
    del tensors["lm_head.weight"]
    with pytest.raises(ValueError, match=r"lm_head\.weight is missing"):
        convert_xlstm(fields, tensors)


def test_an_index_that_does_not_fit_its_files_is_refused(small, tmp_path):
    folder = checkpoint.write(tmp_path, *small, shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    moved, lost = "backbone.embeddings.weight", "backbone.out_norm.weight"
    files = set(index["weight_map"].values())
    (other,) = files - {index["weight_map"][moved]}
    index["weight_map"][moved] = other
    del index["weight_map"][lost]
    index["weight_map"]["more"] = other
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="does not fit its files") as error:
        load_xlstm(folder)
    for part in (f"{moved} is in", f"{lost} is in", f"more is not in {other}"):
        assert part in str(error.value)


def test_files_that_are_missing_or_broken_are_named(small, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_xlstm(tmp_path)
    folder = checkpoint.write(tmp_path, *small)
    (folder / "model.safetensors").write_bytes(b"no tensors at all")
    with pytest.raises(ValueError, match=r"model\.safetensors is no safetensors file"):
        load_xlstm(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_xlstm(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json has no weight_map"):
        load_xlstm(folder)
    for text, message in (("{", "is not JSON"), ("[]", "holds list and not a JSON object")):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=rf"config\.json {message}"):
            load_xlstm(folder)


def test_a_missing_package_is_named(small, tmp_path, monkeypatch):
    folder = checkpoint.write(tmp_path, *small)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'swr_jax\[convert\]'"):
        load_xlstm(folder)
