"""Tokenizers: exact round trips in many scripts, byte counts, and streams of whole characters."""

# ruff: noqa: RUF001 - Chinese punctuation is meant

import itertools
import json
import sys

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from swr_jax.data import load_tokenizer

TEXTS = {
    "english": "The quick brown fox\n\tjumps  over 13 lazy dogs.",
    "chinese": "子曰：「學而時習之，不亦說乎？有朋自遠方來，不亦樂乎？」",
    "mixed": "GPU 上的 réseau récurrent — шов ﷽ हिन्दी 日本語テキスト 한국어 👩‍👩‍👧‍👦 🏳️‍🌈",
    "combining": "e\u0301 versus \u00e9, \u200b\ufeff and \U0010ffff",
    "controls": "\x00\x01\r\n\x7f\u2028",
    "specials": "<|endoftext|> and </s> are text here",
    "empty": "",
}


@pytest.fixture(scope="module")
def byte_level_bpe(tmp_path_factory) -> str:
    """A byte-level BPE with merges inside and across the bytes of Chinese characters."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXTS["english"], TEXTS["chinese"]] * 10, trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def metaspace_bpe(tmp_path_factory) -> str:
    """A vocabulary of Llama 2's kind: `▁` for spaces, unknown characters as bytes."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]],
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXTS["english"]] * 10, trainer)
    # The trainer marks the byte pieces special; published vocabularies keep them ordinary.
    settings = json.loads(tokenizer.to_str())
    settings["added_tokens"] = settings["added_tokens"][:3]
    path = tmp_path_factory.mktemp("metaspace") / "tokenizer.json"
    path.write_text(json.dumps(settings))
    return str(path)


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter([TEXTS["english"].split("\n")[0], TEXTS["chinese"]] * 20),
        model_prefix=str(folder / "small"),
        vocab_size=400,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return str(folder / "small.model")


@pytest.fixture(params=["bytes", "byte_level_bpe"])
def exact_tokenizer(request):
    """The tokenizers that promise an exact round trip of any text."""
    name = request.param
    return load_tokenizer(name if name == "bytes" else request.getfixturevalue(name))


@pytest.mark.parametrize("name", TEXTS)
def test_round_trip_is_exact(exact_tokenizer, name):
    ids = exact_tokenizer.encode(TEXTS[name])
    assert ids.dtype == np.int32
    assert exact_tokenizer.decode(ids) == TEXTS[name]


@given(text=st.text())
def test_round_trip_of_any_text(byte_level_bpe, text):
    for tokenizer in (load_tokenizer("bytes"), _cached(byte_level_bpe)):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@given(content=st.binary())
def test_bytes_that_are_no_text_round_trip_and_display(content):
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(content)
    assert tokenizer.decode_bytes(ids) == content
    assert tokenizer.decode(ids) == content.decode("utf-8", "replace")


@pytest.mark.parametrize("name", TEXTS)
def test_token_bytes_sum_to_the_length_of_the_text(exact_tokenizer, name):
    ids = exact_tokenizer.encode(TEXTS[name])
    assert exact_tokenizer.token_bytes[ids].sum() == len(TEXTS[name].encode())


def test_special_tokens_stand_for_no_text(exact_tokenizer):
    for special in (exact_tokenizer.bos_id, exact_tokenizer.eos_id, exact_tokenizer.pad_id):
        assert exact_tokenizer.token_bytes[special] == 0
        assert exact_tokenizer.decode([special, *exact_tokenizer.encode("a"), special]) == "a"
        assert special not in exact_tokenizer.encode(TEXTS["specials"])


@pytest.mark.parametrize("name", ["chinese", "mixed", "combining"])
def test_a_stream_cut_anywhere_prints_whole_characters_only(exact_tokenizer, name):
    text = TEXTS[name]
    ids = exact_tokenizer.encode(text)
    for cut in range(len(ids) + 1):
        stream = exact_tokenizer.stream_decoder()
        printed = "".join(stream.push(i) for i in ids[:cut])
        # Truncated output is a prefix of the text: no half character has been shown.
        assert text.startswith(printed)
        rest = "".join(stream.push(i) for i in ids[cut:])
        assert printed + rest == text
        assert stream.flush() == ""


def test_a_stream_gives_each_character_with_its_last_byte():
    stream = load_tokenizer("bytes").stream_decoder()
    assert [stream.push(i) for i in "é中👍".encode()] == ["", "é", "", "", "中", "", "", "", "👍"]


def test_what_stays_unfinished_is_flushed_as_a_replacement_character():
    tokenizer = load_tokenizer("bytes")
    stream = tokenizer.stream_decoder()
    assert [stream.push(i) for i in [*b"a", *"中".encode()[:2]]] == ["a", "", ""]
    assert stream.flush() == "\ufffd"
    assert tokenizer.decode([*b"a", 0xFF, *b"b", 0xE4, *b"c"]) == "a\ufffdb\ufffdc"


@given(ids=st.lists(st.integers(-5, 500)))
def test_any_ids_can_be_streamed_and_give_what_decode_gives(byte_level_bpe, ids):
    for tokenizer in (load_tokenizer("bytes"), _cached(byte_level_bpe)):
        stream = tokenizer.stream_decoder()
        streamed = "".join(stream.push(i) for i in ids) + stream.flush()
        assert streamed == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["english", "chinese", "mixed", "specials"])
@pytest.mark.parametrize("kind", ["byte_level_bpe", "metaspace_bpe"])
def test_ids_and_text_agree_with_the_hugging_face_library(request, kind, name):
    path = request.getfixturevalue(kind)
    theirs = tokenizers.Tokenizer.from_file(path)
    theirs.encode_special_tokens = True
    ours = load_tokenizer(path)
    ids = ours.encode(TEXTS[name])
    assert ids.tolist() == theirs.encode(TEXTS[name], add_special_tokens=False).ids
    assert ours.decode(ids) == theirs.decode(ids.tolist()) == TEXTS[name]


def test_special_tokens_are_found_by_name(byte_level_bpe, metaspace_bpe):
    bpe = load_tokenizer(byte_level_bpe)
    assert (bpe.bos_id, bpe.eos_id, bpe.pad_id) == (0, 0, 1)
    metaspace = load_tokenizer(metaspace_bpe)
    assert (metaspace.bos_id, metaspace.eos_id, metaspace.pad_id) == (1, 2, 2)


def test_a_vocabulary_without_special_tokens_gets_one(tmp_path):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([], trainer)
    tokenizer.save(str(tmp_path / "plain.json"))
    plain = load_tokenizer(tmp_path / "plain.json")
    assert (plain.bos_id, plain.eos_id, plain.pad_id, plain.vocab_size) == (256, 256, 256, 257)
    assert plain.token_bytes.tolist() == [1] * 256 + [0]


def test_metaspace_counts_spaces_and_byte_pieces(metaspace_bpe):
    tokenizer = load_tokenizer(metaspace_bpe)
    ids = tokenizer.encode("fox 中")
    # The document's first space is the tokenizer's own; the rest is the text.
    assert tokenizer.token_bytes[ids].sum() == len(" fox 中".encode())


@pytest.mark.parametrize("name", ["english", "chinese", "mixed"])
def test_sentencepiece_agrees_with_its_library(sentencepiece_model, name):
    theirs = sentencepiece.SentencePieceProcessor(model_file=sentencepiece_model)
    ours = load_tokenizer(sentencepiece_model)
    ids = ours.encode(TEXTS[name])
    assert ids.tolist() == theirs.EncodeAsIds(TEXTS[name])
    assert ours.decode(ids) == theirs.Decode(ids.tolist()) == TEXTS[name]
    assert ours.token_bytes[ids].sum() == len(TEXTS[name].encode()) + 1  # the first space
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_id(), theirs.eos_id())
    assert (ours.token_bytes[ours.bos_id], ours.token_bytes[theirs.unk_id()]) == (0, 0)


def test_undecodable_bytes_are_read_as_replacement_characters(byte_level_bpe, sentencepiece_model):
    for name in (byte_level_bpe, sentencepiece_model):
        tokenizer = load_tokenizer(name)
        assert tokenizer.decode(tokenizer.encode(b"a\xff\xfeb")) == "a\ufffd\ufffdb"


def test_lone_surrogates_become_replacement_characters(exact_tokenizer):
    assert exact_tokenizer.decode(exact_tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_fingerprints_tell_tokenizers_apart(byte_level_bpe, metaspace_bpe, sentencepiece_model):
    names = ["bytes", byte_level_bpe, metaspace_bpe, sentencepiece_model]
    for one, other in itertools.combinations(names, 2):
        assert load_tokenizer(one).fingerprint != load_tokenizer(other).fingerprint
    for name in names:
        assert load_tokenizer(name).fingerprint == load_tokenizer(name).fingerprint


def test_errors_name_the_tokenizer_and_the_way_out(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer='gpt2' must be 'bytes'.*json.*model"):
        load_tokenizer("gpt2")
    for name in ("missing.json", "missing.model"):
        with pytest.raises(ValueError, match=rf"{name}' cannot be read: No such file"):
            load_tokenizer(tmp_path / name)
    for name, what in [("bad.json", "Hugging Face"), ("bad.model", "SentencePiece")]:
        (tmp_path / name).write_bytes(b"\xff{}")
        with pytest.raises(ValueError, match=rf"{name}' is not a {what}"):
            load_tokenizer(tmp_path / name)


@pytest.mark.parametrize(
    ("package", "name"), [("tokenizers", "t.json"), ("sentencepiece", "t.model")]
)
def test_a_missing_package_is_named_with_how_to_install_it(monkeypatch, package, name):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"'{package}': pip install 'swr_jax\[text\]'"):
        load_tokenizer(name)


_LOADED = {}


def _cached(path: str):
    if path not in _LOADED:
        _LOADED[path] = load_tokenizer(path)
    return _LOADED[path]
