"""experiments/prepare_data.py: text once tokenised trains as the text itself does."""

import dataclasses
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tokenizers
from data.batches import random_documents
from pyarrow import parquet
from tokenizers import decoders, models, pre_tokenizers, trainers

from swr_jax.data import DataConfig, load_tokenizer, make_dataset, open_source, token_records
from swr_jax.data import prepare as prepare_module
from swr_jax.data.prepare import Preparation, PreparationError

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, ROOT / "experiments" / "prepare_data.py")
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def prepare(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that is not hidden."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


def write_lines(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return path


def copy(folder: Path, other: Path) -> Path:
    other.mkdir()
    for name, content in contents(folder).items():
        (other / name).write_bytes(content)
    return other


def flip_a_bit(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    documents = [f"文檔 {i}: " + "some words, " * (i % 9) for i in range(40)] + [""]
    return write_lines(tmp_path_factory.mktemp("text") / "documents.jsonl", documents)


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
    arguments = (f"--source={text}", f"--tokenizer={bpe}", f"--output={output}")
    done = prepare(*arguments, "--shard_mib=0.001", "--workers=2")
    assert done.returncode == 0, done.stderr
    assert "41 documents" in done.stdout
    assert "100%" in done.stderr  # the progress bar
    return output


# What is written


def test_records_hold_every_document_in_order(text, bpe, records):
    source, expected = open_source(str(records)), open_source(str(text))
    tokenizer = load_tokenizer(bpe)
    assert len(source) == len(expected) == 41
    for index in (*range(41), 7):
        np.testing.assert_array_equal(source[index], tokenizer.encode(expected[index]))
    assert len(list(records.glob("*.arrayrecord"))) == 3


def test_index_and_manifests_add_up(text, bpe, records):
    expected, tokenizer = open_source(str(text)), load_tokenizer(bpe)
    lengths = [len(tokenizer.encode(expected[index])) for index in range(41)]
    np.testing.assert_array_equal(np.diff(np.load(records / "index.npy")), lengths)
    metadata = json.loads((records / "metadata.json").read_text())
    assert (metadata["documents"], metadata["tokens"]) == (41, sum(lengths))
    assert metadata["text_bytes"] == sum(len(expected[index]) for index in range(41))
    manifests = [json.loads(path.read_text()) for path in sorted(records.glob("tokens-*.json"))]
    for key in ("documents", "tokens", "text_bytes"):
        assert sum(manifest[key] for manifest in manifests) == metadata[key]
    # The shards' origins join up to the whole file.
    ends = [0, *(manifest["to"]["byte"] for manifest in manifests)]
    assert [manifest["from"]["byte"] for manifest in manifests] == ends[:-1]
    assert ends[-1] == text.stat().st_size
    assert {manifest["fingerprint"] for manifest in manifests} == {tokenizer.fingerprint}


# The records that it compares with were made by two.
@pytest.mark.parametrize("workers", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_the_number_of_workers_does_not_show(text, bpe, records, tmp_path, workers):
    with Preparation(
        str(text), tmp_path / "t", tokenizer=str(bpe), shard_bytes=1048
    ) as preparation:
        outcome = preparation.run(workers=workers)
    assert (outcome.made, outcome.kept, outcome.damaged) == (preparation.num_shards, 0, [])
    assert contents(tmp_path / "t") == contents(records)


def test_every_format_gives_the_same_tokens(bpe, tmp_path):
    documents = random_documents(50, 60)
    parts = {"a": documents[:30], "b": documents[30:]}
    for kind in ("text", "jsonl", "gzip", "parquet"):
        (tmp_path / kind).mkdir()
    for number, document in enumerate(documents):
        (tmp_path / "text" / f"{number:03}.txt").write_text(document)
    for name, part in parts.items():
        lines = write_lines(tmp_path / "jsonl" / f"{name}.jsonl", part).read_bytes()
        lines = b"\xef\xbb\xbf" + lines.replace(b"\n", b"\n \n")  # byte order mark, blank lines
        (tmp_path / "jsonl" / f"{name}.jsonl").write_bytes(lines)
        (tmp_path / "gzip" / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines))
        # FineWeb-Edu's schema has these among its columns.
        table = pa.table({"text": part, "id": part, "score": [3.5] * len(part)})
        parquet.write_table(table, tmp_path / "parquet" / f"{name}.parquet", row_group_size=7)
    tokenizer = load_tokenizer(bpe)
    for kind in ("text", "jsonl", "gzip", "parquet"):
        output = tmp_path / f"{kind}_tokens"
        with Preparation(
            str(tmp_path / kind), output, tokenizer=str(bpe), shard_bytes=500
        ) as preparation:
            preparation.run(workers=1)
        records = open_source(str(output))
        assert len(records) == 50
        for index, document in enumerate(documents):
            np.testing.assert_array_equal(records[index], tokenizer.encode(document))


@pytest.mark.parametrize("shard_bytes", [1, 2, 7, 30, 31, 10**6])
def test_lines_are_whole_wherever_a_file_is_cut(tmp_path, shard_bytes):
    documents = ["", "a", "bb" * 20, "", "é👍", "c"]
    source = write_lines(tmp_path / "d.jsonl", documents)
    with Preparation(str(source), tmp_path / "t", shard_bytes=shard_bytes) as preparation:
        preparation.run(workers=1)
    records = open_source(str(tmp_path / "t"))
    assert [bytes(records[i].tolist()).decode() for i in range(len(records))] == documents


def test_large_vocabularies_take_four_bytes():
    assert token_records.token_dtype(65_536) == np.dtype("<u2")
    assert token_records.token_dtype(65_537) == np.dtype("<u4")


def test_progress_adds_up_to_the_source(text, tmp_path):
    for kind, source in (("jsonl", text), ("text", text)):
        told = []
        with Preparation(str(source), tmp_path / kind, kind=kind, shard_bytes=100) as preparation:
            preparation.run(workers=1, advance=told.append)
        assert sum(told) == preparation.size == text.stat().st_size


# Training on it


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


def test_training_with_another_tokenizer_is_refused(records):
    config = DataConfig(source=str(records))
    with pytest.raises(ValueError, match=r"tokenizer='bytes' is not the one.*tokenizer\.json'"):
        make_dataset(config)


# Stopping and going on


def test_killed_at_any_time_it_goes_on_to_the_same_files(bpe, tmp_path):
    rng = np.random.default_rng(0)
    words = np.array(random_documents(500, 12))
    documents = [" ".join(rng.choice(words, 400)) for _ in range(300)]
    source = write_lines(tmp_path / "d.jsonl", documents)
    options = (f"--source={source}", f"--tokenizer={bpe}", "--shard_mib=0.02", "--workers=2")
    output = tmp_path / "tokens"
    process = subprocess.Popen(
        [*COMMAND, *options, f"--output={output}"], env=ENVIRONMENT, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while len(list(output.glob("tokens-*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done_before = {p: p.stat().st_mtime_ns for p in output.glob("*.arrayrecord")}
    assert not (output / "metadata.json").exists()
    with pytest.raises(ValueError, match=r"metadata\.json cannot be read.*run it again to go on"):
        open_source(str(output))

    def same(folder: Path):
        return Preparation(str(source), folder, tokenizer=str(bpe), shard_bytes=int(0.02 * 2**20))

    with same(output) as preparation:
        outcome = preparation.run(workers=1)
    assert 3 <= outcome.kept < preparation.num_shards == outcome.kept + outcome.made
    kept = [p for p, time_ns in done_before.items() if p.stat().st_mtime_ns == time_ns]
    assert len(kept) >= 3
    with same(tmp_path / "whole") as preparation:
        preparation.run(workers=1)
    assert contents(output) == contents(tmp_path / "whole")
    assert not list(output.glob(".*.part"))


@pytest.mark.slow
def test_a_worker_that_has_nothing_left_to_do_is_no_dead_one(tmp_path):
    (tmp_path / "text").mkdir()
    write_lines(tmp_path / "text" / "a.jsonl", ["short"])
    long = gzip.compress(b'{"text": "long"}\n' * 100_000)  # takes seconds, and is one piece
    (tmp_path / "text" / "b.jsonl.gz").write_bytes(long)
    with Preparation(str(tmp_path / "text"), tmp_path / "t", shard_bytes=20) as preparation:
        outcome = preparation.run(workers=2)
    assert (preparation.num_shards, outcome.made) == (2, 2)
    assert len(open_source(str(tmp_path / "t"))) == 100_001


@pytest.mark.slow
def test_a_worker_that_dies_is_told(text, tmp_path, monkeypatch):
    # Killed from outside, as the kernel does for want of memory.
    killed = []

    def kill_one(_):
        if not killed:
            (child, *_rest) = prepare_module.multiprocessing.active_children()
            killed.append(child.pid)
            os.kill(child.pid, signal.SIGKILL)

    with (
        Preparation(str(text), tmp_path / "t", shard_bytes=50) as preparation,
        pytest.raises(PreparationError, match=r"a worker died \(exit code -9.*go on"),
    ):
        preparation.run(workers=2, advance=kill_one)
    with Preparation(str(text), tmp_path / "t", shard_bytes=50) as preparation:
        assert preparation.run(workers=1).made > 0
    assert len(open_source(str(tmp_path / "t"))) == 41


def test_two_cannot_work_in_one_folder(text, tmp_path):
    with (
        Preparation(str(text), tmp_path / "t"),
        pytest.raises(PreparationError, match="another process prepares"),
    ):
        Preparation(str(text), tmp_path / "t")


def test_another_preparation_does_not_go_on_in_the_folder(text, bpe, records, tmp_path):
    with pytest.raises(PreparationError, match=r"fingerprint was 'sha256.*, is now 'bytes'"):
        Preparation(str(text), records, shard_bytes=1048)
    with pytest.raises(PreparationError, match=r"shard_bytes was 1048, is now 99"):
        Preparation(str(text), records, tokenizer=str(bpe), shard_bytes=99)
    changed = write_lines(tmp_path / "documents.jsonl", ["something else"])
    with pytest.raises(PreparationError, match="listing_sha256 was"):
        Preparation(str(changed), records, tokenizer=str(bpe), shard_bytes=1048)


# Damage


def test_a_flipped_bit_is_found_named_and_mended(text, bpe, records, tmp_path):
    folder = copy(records, tmp_path / "t")
    shards = sorted(folder.glob("*.arrayrecord"))
    open_source(str(folder)).verify()
    flip_a_bit(shards[1], 300)
    done = prepare(f"--output={folder}", "--verify")
    assert done.returncode == 1
    assert f"is damaged: {shards[1].name};" in done.stderr
    config = DataConfig(source=str(folder), tokenizer=str(bpe))
    with pytest.raises(ValueError, match=rf"is damaged: {shards[1].name} have not the SHA-256"):
        make_dataset(config)  # before the first step
    with Preparation(str(text), folder, tokenizer=str(bpe), shard_bytes=1048) as preparation:
        outcome = preparation.run(workers=1)
    assert (outcome.made, outcome.damaged) == (1, ["tokens-00001-of-00003"])
    assert contents(folder) == contents(records)


@pytest.mark.parametrize("name", ["index.npy", "tokens-00000-of-00003.lengths.npy"])
def test_a_flipped_bit_of_the_index_is_found(records, tmp_path, name):
    folder = copy(records, tmp_path / "t")
    flip_a_bit(folder / name, 132)
    with pytest.raises(ValueError, match=rf"is damaged: {name} have not"):
        open_source(str(folder)).verify()


def test_unverified_a_damaged_record_is_named_when_it_is_read(bpe, records, tmp_path):
    folder = copy(records, tmp_path / "t")
    shard = folder / "tokens-00001-of-00003.arrayrecord"
    flip_a_bit(shard, 150)
    config = DataConfig(
        source=str(folder), tokenizer=str(bpe), verify=False, sequence_length=8, batch_size=1
    )
    with pytest.raises(
        ValueError, match=r"tokens-00001-of-00003\.arrayrecord, record 0 is damaged"
    ):
        list(make_dataset(config, epochs=1))


def test_ids_beyond_the_vocabulary_are_refused(records, tmp_path):
    folder = copy(records, tmp_path / "t")
    metadata = json.loads((folder / "metadata.json").read_text())
    (folder / "metadata.json").write_text(json.dumps(metadata | {"vocab_size": 200}))
    with pytest.raises(ValueError, match=r"record 0 is damaged: it holds id \d+ of a vocabulary"):
        open_source(str(folder))[0]


def test_a_tokenizer_that_leaves_its_vocabulary_is_refused(text, tmp_path, monkeypatch):
    tokenizer = load_tokenizer("bytes")
    tokenizer.vocab_size = 100
    monkeypatch.setattr(prepare_module, "load_tokenizer", lambda _: tokenizer)
    with (
        Preparation(str(text), tmp_path / "t") as preparation,
        pytest.raises(PreparationError, match=r"gave the id \d+, its vocabulary has 100"),
    ):
        preparation.run(workers=1)


def test_an_unfinished_folder_is_refused(records, tmp_path):
    for shard in records.glob("*.arrayrecord"):
        (tmp_path / shard.name).symlink_to(shard)
    with pytest.raises(ValueError, match=r"metadata\.json cannot be read.*prepare_data\.py"):
        open_source(str(tmp_path))
    (tmp_path / "metadata.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match=r"has format 'other', must be 'swr_jax tokens 2'"):
        open_source(str(tmp_path))
    only_begun = tmp_path / "begun"
    only_begun.mkdir()
    (only_begun / "preparation.json").write_text("{}")
    with pytest.raises(ValueError, match=r"begun.metadata\.json cannot be read"):
        open_source(str(only_begun))


def test_missing_and_cut_shards_are_named(records, tmp_path):
    folder = copy(records, tmp_path / "t")
    first, *_, last = sorted(folder.glob("*.arrayrecord"))
    with pytest.raises(ValueError, match=rf"shards missing \['{first.name}'"):
        open_source(str(last))
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(ValueError, match=rf"{last.name} has 1000 bytes, metadata\.json says"):
        open_source(str(folder))
    last.unlink()
    with pytest.raises(ValueError, match=rf"shards missing \['{last.name}'\]"):
        open_source(str(folder))


def test_a_bad_document_is_named_and_the_shards_before_it_stay(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", ["good"] * 20)
    path.write_text(path.read_text() + '{"body": "x"}\n')
    with (
        Preparation(str(path), tmp_path / "t", shard_bytes=100) as preparation,
        pytest.raises(ValueError, match=r"d\.jsonl:21 has \['body'\]: it must be an object"),
    ):
        preparation.run(workers=1)
    assert len(list((tmp_path / "t").glob("tokens-*.json"))) == preparation.num_shards - 1
    assert not list((tmp_path / "t").glob(".*.part"))


def test_errors_are_one_line_that_names_the_cause(text, tmp_path, records):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    done = prepare(f"--source={text}", f"--output={tmp_path}/full")
    assert done.returncode == 1
    assert done.stderr.startswith("prepare_data: ")
    assert "is not empty: name a new folder" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(contents(tmp_path / "full")) == ["mine.txt"]
    with pytest.raises(ValueError, match="source='nowhere' does not exist"):
        Preparation("nowhere", tmp_path / "a")
    with pytest.raises(PreparationError, match="holds tokens already"):
        Preparation(str(records), tmp_path / "b")
    with pytest.raises(PreparationError, match="shard_bytes=0 must be at least 1"):
        Preparation(str(text), tmp_path / "c", shard_bytes=0)
