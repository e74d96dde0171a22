"""Tokenizers in the folders of checkpoints: which tokens stand before and after a document."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from swr_jax.data import load_tokenizer

TEXT = "Hier ist Text.\n"


def write(folder, *, special, ordinary=(), **files):
    """A byte-level vocabulary with these tokens at its end, and files of JSON beside it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: number for number, name in enumerate([*alphabet, *ordinary])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return {name: tokenizer.token_to_id(name) for name in (*special, *ordinary)}


LLAMA = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>")
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
GEMMA = ("<pad>", "<eos>", "<bos>", "<end_of_turn>")


@pytest.mark.parametrize(
    ("special", "files", "wanted"),
    [
        # Llama 3, as pretrained and as it talks.
        (
            LLAMA,
            {"tokenizer_config": {"bos_token": LLAMA[0], "eos_token": LLAMA[1]}},
            (LLAMA[0], LLAMA[1], LLAMA[3]),
        ),
        (
            LLAMA,
            {
                "tokenizer_config": {"bos_token": {"content": LLAMA[0]}, "eos_token": LLAMA[2]},
                "config": {"eos_token_id": [257, 258]},
            },
            (LLAMA[0], LLAMA[2], LLAMA[3]),
        ),
        # Qwen names no beginning; its config.json has the end of the document before.
        (
            QWEN,
            {
                "tokenizer_config": {"bos_token": None, "eos_token": QWEN[2], "pad_token": QWEN[0]},
                "config": {"bos_token_id": 256, "eos_token_id": 258},
            },
            (QWEN[0], QWEN[2], QWEN[0]),
        ),
        (QWEN, {"tokenizer_config": {"eos_token": QWEN[2]}}, (QWEN[0], QWEN[2], QWEN[2])),
        # Gemma, by config.json alone, with a list of ends.
        (
            GEMMA,
            {"config": {"bos_token_id": 258, "eos_token_id": [257, 259], "pad_token_id": 256}},
            (GEMMA[2], GEMMA[1], GEMMA[0]),
        ),
        # Nothing said, or what the vocabulary has not: the usual names.
        (GEMMA, {}, (GEMMA[2], GEMMA[1], GEMMA[0])),
        (GEMMA, {"tokenizer_config": {"bos_token": "<s>"}}, (GEMMA[2], GEMMA[1], GEMMA[0])),
        (QWEN, {"config": {"eos_token_id": 9999}}, (QWEN[0], QWEN[0], QWEN[0])),
    ],
)
def test_documents_begin_and_end_as_the_folder_says(tmp_path, special, files, wanted):
    ids = write(tmp_path, special=special, **files)
    tokenizer = load_tokenizer(tmp_path)
    found = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    assert found == tuple(ids[name] for name in wanted)
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode(TEXT)]) == TEXT
    np.testing.assert_array_equal(
        tokenizer.encode(TEXT), load_tokenizer(tmp_path / "tokenizer.json").encode(TEXT)
    )


def test_ordinary_tokens_of_a_usual_name_are_text(tmp_path):
    """Gemma's vocabulary has the tags of HTML, <s> among them."""
    ids = write(tmp_path, special=GEMMA, ordinary=["<s>", "</s>"])
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = load_tokenizer(place)
        assert (tokenizer.bos_id, tokenizer.eos_id) == (ids["<bos>"], ids["<eos>"])


def test_the_fingerprint_is_the_files_until_documents_begin_otherwise(tmp_path):
    write(tmp_path, special=QWEN, config={"eos_token_id": 256})
    alone = load_tokenizer(tmp_path / "tokenizer.json").fingerprint
    assert load_tokenizer(tmp_path).fingerprint == alone
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 258}))
    assert load_tokenizer(tmp_path).fingerprint != alone


def test_folders_that_say_nothing_or_nonsense_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder without tokenizer\.json"):
        load_tokenizer(tmp_path)
    write(tmp_path, special=QWEN)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load_tokenizer(tmp_path)
