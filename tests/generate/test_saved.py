"""A stream that stopped, or was saved and loaded, goes on as if it had not."""

import json
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from generation_models import VOCABULARY, likeliest, make_model, prompts

from swr_jax.generate import GREEDY, Sampling, SavedStreamError, TokenStream, generate_tokens
from swr_jax.nn.language_model import LanguageModel, LanguageModelConfig

PATTERN = ("phalanx", "attention")
SAMPLING = Sampling(temperature=0.9, top_p=0.9, seed=11)
PATTERNS = [
    PATTERN,
    pytest.param(("swa", "mlstm"), marks=pytest.mark.slow),
    pytest.param(("swa", "gated_delta"), marks=pytest.mark.slow),
]


def stream_of(model, prompt) -> TokenStream:
    stream = TokenStream(model, max_length=128, chunk_size=16)
    stream.read(prompt)
    return stream


@pytest.mark.parametrize("pattern", PATTERNS)
def test_saved_and_loaded_it_goes_on_to_the_bit(pattern, tmp_path):
    model, (prompt,) = make_model(*pattern), prompts(41)
    whole = list(stream_of(model, prompt).generate(max_tokens=30, sampling=SAMPLING))

    stream = stream_of(model, prompt)
    first = list(stream.generate(max_tokens=13, sampling=SAMPLING))
    stream.save(tmp_path / "stream.npz")
    again = TokenStream.load(tmp_path / "stream.npz", model, chunk_size=16)
    assert again.length == stream.length == 54
    assert first + list(again.generate(max_tokens=17, sampling=SAMPLING)) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["stream.npz"]


def test_room_that_is_made_later_changes_nothing():
    model, (prompt,) = make_model("swa", "attention"), prompts(41)
    whole = TokenStream(model, max_length=300, chunk_size=16)
    whole.read(prompt)
    expected = list(whole.generate(max_tokens=255, sampling=SAMPLING))
    stream = stream_of(model, prompt)
    found = list(stream.generate(max_tokens=87, sampling=SAMPLING))
    stream.reserve(100)
    assert stream.max_length == 128
    stream.reserve(300)  # more slots than there were
    assert found + list(stream.generate(max_tokens=168, sampling=SAMPLING)) == expected


def test_what_is_read_and_generated_in_turns_is_one_stream():
    model, (first, second) = make_model(*PATTERN), prompts(20, 9)
    stream = stream_of(model, first)
    half = list(stream.generate(max_tokens=5, sampling=GREEDY))
    stream.read(second)
    rest = list(stream.generate(max_tokens=6, sampling=GREEDY))
    assert [half, rest] == likeliest(model, [(first, half), (first + half + second, rest)])


def test_it_stands_after_the_token_that_ended_it():
    model, (prompt,) = make_model(*PATTERN), prompts(20)
    full = list(generate_tokens(model, prompt, max_tokens=20, temperature=0, chunk_size=16))
    stream = stream_of(model, prompt)
    end = full[4]
    cut = full.index(end) + 1
    assert list(stream.generate(max_tokens=20, sampling=GREEDY, eos_id=end)) == full[:cut]
    assert stream.length == 20 + cut
    assert list(stream.generate(max_tokens=20 - cut, sampling=GREEDY)) == full[cut:]


def test_bfloat16_states_keep_their_bits(tmp_path):
    config = LanguageModelConfig(
        vocab_size=VOCABULARY, features=32, depth=2, pattern=PATTERN, num_heads=2, dtype="bfloat16"
    )
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    stream = stream_of(model, prompts(20)[0])
    stream.save(tmp_path / "s")
    again = TokenStream.load(tmp_path / "s", model, chunk_size=16)
    keys = [s._streams.state[1].keys for s in (stream, again)]
    assert keys[0].dtype == keys[1].dtype == jnp.bfloat16
    np.testing.assert_array_equal(*(np.asarray(k).view(np.uint16) for k in keys))
    tokens = [list(s.generate(max_tokens=9, sampling=GREEDY)) for s in (stream, again)]
    assert tokens[0] == tokens[1]


def test_files_of_other_models_and_damaged_ones_are_refused(tmp_path):
    model, (prompt,) = make_model(*PATTERN), prompts(20)
    path = tmp_path / "s.npz"
    stream_of(model, prompt).save(path)
    with pytest.raises(SavedStreamError, match=r"of another model \(features: 32, not 64"):
        TokenStream.load(path, make_model(*PATTERN, features=64))
    with pytest.raises(SavedStreamError, match="other weights"):
        TokenStream.load(path, make_model(*PATTERN, seed=4))
    with pytest.raises(FileNotFoundError):
        TokenStream.load(tmp_path / "none", model)

    def changed(change, name: str):
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / name, "w") as target:
            for item in source.namelist():
                change(target, item, source.read(item))
        return tmp_path / name

    def without_logits(target, item, data):
        if item != "logits.npy":
            target.writestr(item, data)

    with pytest.raises(SavedStreamError, match="has nothing as logits"):
        TokenStream.load(changed(without_logits, "missing"), model)
    np.savez(tmp_path / "other.npz", header=np.array(json.dumps({"format": 2})))
    with pytest.raises(SavedStreamError, match="is not of format 1"):
        TokenStream.load(tmp_path / "other.npz", model)
    np.savez(tmp_path / "bare.npz", header=np.array(json.dumps({"format": 1, "length": 3})))
    with pytest.raises(SavedStreamError, match="lacks config, dtypes, max_length, weights"):
        TokenStream.load(tmp_path / "bare.npz", model)
    whole = path.read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text").write_text(json.dumps({"format": 1}))
    np.savez(tmp_path / "pickled.npz", header=np.array({"format": 1}, dtype=object))
    for name in ("cut", "text", "pickled.npz"):
        with pytest.raises(SavedStreamError, match="is no stream that was saved"):
            TokenStream.load(tmp_path / name, model)


def test_room_is_checked_where_attention_needs_it():
    model, (prompt,) = make_model(*PATTERN), prompts(20)
    with pytest.raises(ValueError, match=r"tokens after 0 exceed max_length=16"):
        TokenStream(model, max_length=16).read(prompt)
    stream = stream_of(model, prompt)
    with pytest.raises(ValueError, match=r"109 tokens after 20 exceed max_length=128"):
        stream.generate(max_tokens=109)
    with pytest.raises(ValueError, match="the stream is empty"):
        TokenStream(model).generate(max_tokens=1)
    stream.reserve(129)
    assert stream.max_length == 129
    assert len(list(stream.generate(max_tokens=1))) == 1
    recurrent = TokenStream(make_model("phalanx"), max_length=16, chunk_size=16)
    recurrent.read(prompt)  # a state of constant size has no end
    assert len(list(recurrent.generate(max_tokens=3))) == 3
