"""Data that cannot be trained on end a run before its first step, and the file is named."""

import dataclasses
import json
import shutil

import pytest

from swr_jax.data.prepare import Preparation
from swr_jax.train.loop import train

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def prepared(corpus_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "tokens"
    with Preparation(str(corpus_folder), folder) as preparation:
        preparation.run(workers=1)
    return folder


def a_flipped_bit(folder):
    shard = max(folder.glob("*.arrayrecord"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)


def a_missing_shard(folder):
    max(folder.glob("*.arrayrecord")).unlink()


def a_cut_shard(folder):
    shard = max(folder.glob("*.arrayrecord"))
    shard.write_bytes(shard.read_bytes()[:-100])


def another_format(folder):
    path = folder / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": "parquet"}))


def no_metadata(folder):
    (folder / "metadata.json").unlink()


def metadata_that_are_no_json(folder):
    (folder / "metadata.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (a_flipped_bit, r"is damaged: tokens-.*\.arrayrecord"),
        (a_missing_shard, r"tokens-.*\.arrayrecord"),
        (a_cut_shard, r"tokens-.*\.arrayrecord"),
        (another_format, r"metadata.json has format 'parquet', must be"),
        (no_metadata, r"metadata.json"),
        (metadata_that_are_no_json, r"metadata.json is not valid JSON"),
    ],
)
def test_a_damaged_folder_of_tokens(prepared, config, tmp_path, damage, message):
    folder = tmp_path / "tokens"
    shutil.copytree(prepared, folder)
    damage(folder)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=str(folder)))
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tokens_of_another_tokenizer(prepared, config, tmp_path):
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["window block"], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    data = dataclasses.replace(
        config.data, source=str(prepared), tokenizer=str(tmp_path / "tokenizer.json")
    )
    with pytest.raises(ValueError, match=r"tokenizer"):
        train(dataclasses.replace(config, data=data), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_that_the_tokens_leave(prepared, config, tmp_path):
    small = dataclasses.replace(config.model, vocab_size=100)
    data = dataclasses.replace(config.data, source=str(prepared))
    with pytest.raises(ValueError, match=r"model.vocab_size=100 must be at least the 259 ids"):
        train(dataclasses.replace(config, model=small, data=data), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_text_of_another_schema(config, tmp_path):
    lines = tmp_path / "documents.jsonl"
    lines.write_text('{"text": "fine"}\n{"content": "no text"}\n' * 5)
    data = dataclasses.replace(config.data, source=str(lines))
    with pytest.raises(ValueError, match=r"documents.jsonl:\d+ has \['content'\].*'text'"):
        train(dataclasses.replace(config, data=data), tmp_path / "run")
    assert not (tmp_path / "run").exists()
