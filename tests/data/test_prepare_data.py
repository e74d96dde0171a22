"""experiments/prepare_data.py: text once tokenised trains as the text itself does."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from swr_jax.data import DataConfig, load_tokenizer, make_dataset, open_source
from swr_jax.data.token_records import write_token_records

ROOT = Path(__file__).parents[2]


def prepare(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "experiments" / "prepare_data.py", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    documents = [f"文檔 {i}: " + "some words, " * (i % 9) for i in range(40)] + [""]
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return path


@pytest.fixture(scope="module")
def bpe(text, tmp_path_factory) -> Path:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(text)], trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def records(text, bpe, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("records") / "tokens"
    done = prepare(f"--source={text}", f"--tokenizer={bpe}", f"--output={output}", "--num_shards=3")
    assert done.returncode == 0, done.stderr
    assert "41 documents" in done.stdout
    assert "41/41" in done.stderr  # the progress bar
    return output


def test_records_hold_every_document_in_order(text, bpe, records):
    source, expected = open_source(str(records)), open_source(str(text))
    tokenizer = load_tokenizer(bpe)
    assert len(source) == len(expected) == 41
    for index in (*range(41), 7):
        np.testing.assert_array_equal(source[index], tokenizer.encode(expected[index]))
    metadata = json.loads((records / "metadata.json").read_text())
    assert metadata["tokens"] == sum(len(source[index]) for index in range(41))
    assert sorted(metadata["shards"].values()) == [13, 14, 14]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_batches_are_those_of_the_text(text, bpe, records, split):
    config = DataConfig(
        source=str(text), tokenizer=str(bpe), sequence_length=12, batch_size=2, shuffle_tokens=100
    )
    from_records = dataclasses.replace(config, source=str(records))
    batches = [list(make_dataset(c, split=split, epochs=1)) for c in (config, from_records)]
    assert len(batches[0]) == len(batches[1]) > 1
    for one, other in zip(*batches, strict=True):
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)
    total_bytes = sum(int(batch["target_bytes"].sum()) for batch in batches[0])
    assert total_bytes > sum(int(batch["loss_weights"].sum()) for batch in batches[0])


def test_training_with_another_tokenizer_is_refused(records, bpe):
    config = DataConfig(source=str(records))
    with pytest.raises(ValueError, match=r"tokenizer='bytes' is not the one.*tokenizer\.json'"):
        make_dataset(config)


def test_an_unfinished_folder_is_refused(records, tmp_path):
    for shard in records.glob("*.arrayrecord"):
        (tmp_path / shard.name).symlink_to(shard)
    with pytest.raises(ValueError, match=r"metadata\.json cannot be read.*prepare_data\.py"):
        open_source(str(tmp_path))
    (tmp_path / "metadata.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match=r"has format 'other', must be 'swr_jax tokens 1'"):
        open_source(str(tmp_path))


def test_a_damaged_shard_is_named(records, tmp_path):
    for file in records.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = next(iter(sorted(tmp_path.glob("*.arrayrecord"))))
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(ValueError, match=rf"{shard.name} is not an ArrayRecord file"):
        open_source(str(tmp_path))


def test_large_vocabularies_take_four_bytes(tmp_path):
    documents = [np.array([0, 65_536, 100_000], np.int32), np.array([], np.int32)]
    for vocab_size, dtype in ((65_536, "<u2"), (65_537, "<u4")):
        folder = tmp_path / str(vocab_size)
        metadata = write_token_records(
            folder,
            [ids % vocab_size for ids in documents],
            num_documents=2,
            num_shards=1,
            tokenizer="t",
            fingerprint="f",
            vocab_size=vocab_size,
        )
        assert metadata["dtype"] == dtype
        source = open_source(str(folder))
        for index, ids in enumerate(documents):
            np.testing.assert_array_equal(source[index], ids % vocab_size)


def test_errors_are_one_line_that_names_the_cause(text, tmp_path, records):
    for arguments, message in [
        (["--source=nowhere", f"--output={tmp_path}/a"], "source='nowhere' does not exist"),
        ([f"--source={text}", f"--output={records}"], "is not empty: name a new folder"),
        ([f"--source={text}", f"--output={tmp_path}/b", "--num_shards=99"], "num_shards=99"),
        ([f"--source={records}", f"--output={tmp_path}/c"], "holds tokens already"),
    ]:
        done = prepare(*arguments)
        assert done.returncode == 1
        assert message in done.stderr
        assert done.stderr.startswith("prepare_data: ")
        assert done.stderr.count("\n") == 1
    assert list(itertools.chain(*(p.iterdir() for p in tmp_path.iterdir()))) == []
