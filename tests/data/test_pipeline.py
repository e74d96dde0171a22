"""The data pipeline against a packer written with Python lists, and its promises one by one."""

import collections
import dataclasses
import itertools
import math

import grain
import numpy as np
import pytest
from data.batches import (
    BOS,
    EOS,
    KEYS,
    PAD,
    assert_same,
    oracle_batches,
    write_corpus,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from swr_jax.data import DataConfig, corpus_statistics, make_dataset, open_corpus
from swr_jax.data.packing import PackingOptions, PackIterDataset


def documents_of(config, split) -> list[bytes]:
    corpus = open_corpus(config)
    return [corpus.source[int(index)] for index in corpus.indices(split)]


def pair_counts(batches) -> collections.Counter:
    counts = collections.Counter()
    for batch in batches:
        valid = batch["loss_weights"] == 1
        pairs = zip(batch["tokens"][valid].tolist(), batch["targets"][valid].tolist(), strict=True)
        counts.update(pairs)
    return counts


# Packing


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=12),
    length=st.integers(1, 17),
    batch_size=st.integers(1, 4),
    window=st.integers(1, 3),
)
def test_packing_is_concatenation_cut_into_rows(lengths, length, batch_size, window):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 256, n).astype(np.uint8).tobytes() for n in [*lengths, 1]]
    pairs = [np.array([BOS, *document, EOS], np.int32) for document in documents]
    options = PackingOptions(batch_size, length, window, None, 0, 1, PAD, len(pairs))
    token_bytes = np.array([1] * 256 + [0] * 3, np.int32)
    dataset = PackIterDataset(
        grain.MapDataset.source(pairs).to_iter_dataset(), options, token_bytes
    )
    assert_same(list(dataset), oracle_batches(documents, batch_size, length))


def test_validation_is_one_pass_in_order(config):
    dataset = make_dataset(config, split="validation")
    expected = oracle_batches(documents_of(config, "validation"), 4, 16)
    assert len(expected) > 2
    assert_same(list(dataset), expected)


def test_types_of_a_batch(config):
    batch = next(iter(make_dataset(config)))
    for key in KEYS:
        assert batch[key].dtype == (np.float32 if key == "loss_weights" else np.int32)
        assert batch[key].shape == (4, 16)


def test_every_token_and_end_is_a_target_once_per_epoch(config):
    once = collections.Counter()
    for document in documents_of(config, "train"):
        once.update(itertools.pairwise([BOS, *document, EOS]))
    assert pair_counts(make_dataset(config, epochs=1)) == once
    twice = collections.Counter({pair: 2 * count for pair, count in once.items()})
    assert pair_counts(make_dataset(config, epochs=2)) == twice


def test_segments_are_pieces_of_single_documents(config):
    texts = [bytes(d) for d in documents_of(config, "train")]
    wholes = ["".join(map(chr, [BOS, *text, EOS])) for text in texts]
    for batch in make_dataset(config, epochs=1):
        for row in range(4):
            segment_ids = batch["segment_ids"][row]
            for segment in range(1, segment_ids.max() + 1):
                inside = segment_ids == segment
                tokens, targets = batch["tokens"][row][inside], batch["targets"][row][inside]
                piece = "".join(map(chr, [*tokens, targets[-1]]))
                assert tokens[1:].tolist() == targets[:-1].tolist()
                assert any(piece in whole for whole in wholes)
                assert batch["positions"][row][inside].tolist() == list(range(len(tokens)))


def test_target_bytes_sum_to_the_text(config):
    total = sum(int(b["target_bytes"].sum()) for b in make_dataset(config, epochs=1))
    assert total == sum(map(len, documents_of(config, "train")))


# Order


@pytest.fixture(params=[1, 1 << 22], ids=["no_row_shuffle", "row_shuffle"])
def one_row_documents(request, tmp_path) -> DataConfig:
    """Each document fills exactly one row; with windows of one row the order is the documents'."""
    documents = [f"doc{index:04d}" for index in range(60)]
    return DataConfig(
        source=write_corpus(tmp_path, documents),
        sequence_length=8,
        batch_size=1,
        seed=3,
        shuffle_tokens=request.param,
    )


def first_rows(config, count) -> list[str]:
    iterator = iter(make_dataset(config))
    return [bytes(next(iterator)["targets"][0, :-1].tolist()).decode() for _ in range(count)]


def test_each_epoch_holds_every_document_in_another_order(one_row_documents):
    documents = sorted(d.decode() for d in documents_of(one_row_documents, "train"))
    assert len(documents) == 57
    rows = first_rows(one_row_documents, 3 * 57)
    epochs = [rows[:57], rows[57:114], rows[114:]]
    for epoch in epochs:
        assert sorted(epoch) == documents
        assert epoch != documents
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_seed_decides_the_order_and_nothing_else(one_row_documents):
    rows = first_rows(one_row_documents, 57)
    assert rows == first_rows(one_row_documents, 57)
    other = first_rows(dataclasses.replace(one_row_documents, seed=4), 57)
    assert other != rows
    assert sorted(other) == sorted(rows)
    # The next seed is not this seed's next epoch.
    assert other != first_rows(one_row_documents, 114)[57:]


def test_rows_of_a_long_document_are_spread_over_the_window(tmp_path):
    documents = [chr(ord("a") + index) * 1000 for index in range(20)]
    config = DataConfig(source=write_corpus(tmp_path, documents), sequence_length=10, batch_size=8)
    batch = next(iter(make_dataset(config)))
    assert len(set(batch["targets"][:, 0].tolist())) >= 4


# Split


def test_splits_are_disjoint_complete_and_stable(config):
    corpus = open_corpus(config)
    assert len(corpus.validation) == 12
    both = np.concatenate([corpus.train, corpus.validation])
    np.testing.assert_array_equal(np.sort(both), np.arange(60))
    for other in (config, dataclasses.replace(config, seed=9, sequence_length=5)):
        np.testing.assert_array_equal(open_corpus(other).validation, corpus.validation)
    # A smaller share is part of the larger one.
    smaller = open_corpus(dataclasses.replace(config, validation_fraction=0.1)).validation
    assert len(smaller) == 6
    assert set(smaller) < set(corpus.validation)
    # And not a run of neighbours.
    assert np.ptp(corpus.validation) > 30


def test_validation_has_at_least_one_document_unless_it_is_switched_off(config):
    tiny = dataclasses.replace(config, validation_fraction=1e-6)
    assert len(open_corpus(tiny).validation) == 1
    none = dataclasses.replace(config, validation_fraction=0)
    assert len(open_corpus(none).train) == 60
    with pytest.raises(ValueError, match=r"split='validation' is empty: validation_fraction"):
        make_dataset(none, split="validation")


def test_a_corpus_of_one_document_cannot_be_split(tmp_path):
    config = DataConfig(source=write_corpus(tmp_path, ["only one"]))
    with pytest.raises(ValueError, match=r"split='train' is empty.*1 document"):
        make_dataset(config)
    whole = dataclasses.replace(config, validation_fraction=0, sequence_length=9, batch_size=1)
    batch = next(iter(make_dataset(whole)))
    assert bytes(batch["targets"][0, :-1].tolist()) == b"only one"


# Processes


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_the_rows_of_one_global_batch(config, split, process_count):
    whole = list(make_dataset(config, split=split, epochs=1))
    parts = [
        list(
            make_dataset(
                config, split=split, process_index=i, process_count=process_count, epochs=1
            )
        )
        for i in range(process_count)
    ]
    assert {len(part) for part in parts} == {len(whole)}
    stacked = [
        {key: np.concatenate([batch[key] for batch in batches]) for key in KEYS}
        for batches in zip(*parts, strict=True)
    ]
    assert_same(stacked, whole)


# Bad input


def test_an_error_in_a_document_reaches_the_reader(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "good"}\n' * 5 + "{bad\n")
    config = DataConfig(source=str(path), validation_fraction=0)
    with pytest.raises(ValueError, match=r"d\.jsonl:6 is not valid JSON"):
        next(iter(make_dataset(config)))


@pytest.mark.parametrize("epochs", [None, 1])
def test_a_corpus_of_empty_documents_is_refused(tmp_path, epochs):
    config = DataConfig(source=write_corpus(tmp_path, [""] * 30))
    with pytest.raises(ValueError, match="every document is empty"):
        next(iter(make_dataset(config, epochs=epochs)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 0}, "sequence_length=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0 must be at least 0 and below 1"),
        ({"seed": -1}, "seed=-1 must not be negative"),
    ],
)
def test_bad_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "split='test' must be 'train' or 'validation'"),
        ({"process_count": 3}, "batch_size=4 must be a multiple of process_count=3"),
        ({"process_index": 2, "process_count": 2}, r"process_index=2 must be in \[0, 2\)"),
        ({"epochs": 0}, "epochs=0 must be at least 1, or None"),
    ],
)
def test_bad_arguments_are_refused(config, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_dataset(config, **arguments)


# Statistics


def test_unigram_bits_per_byte(config):
    train = collections.Counter()
    for document in documents_of(config, "train"):
        train.update([*document, EOS])
    total, bits, num_bytes, tokens = sum(train.values()), 0.0, 0, 0
    for document in documents_of(config, "validation"):
        num_bytes += len(document)
        for target in [*document, EOS]:
            bits -= math.log2((train[target] + 1) / (total + 259))
            tokens += 1
    statistics = corpus_statistics(config)
    assert statistics.unigram_bits_per_byte == pytest.approx(bits / num_bytes, rel=1e-12)
    assert (statistics.train_documents, statistics.train_tokens) == (48, total)
    assert statistics.train_bytes == total - 48
    assert (statistics.validation_documents, statistics.validation_tokens) == (12, tokens)
    assert statistics.validation_bytes == num_bytes
    # The tokens are the targets of one epoch, so a model's loss is measured over the same.
    weights = [b["loss_weights"].sum() for b in make_dataset(config, split="validation")]
    assert sum(weights) == tokens


def test_statistics_of_some_documents(config):
    some = corpus_statistics(config, max_documents=5)
    assert (some.train_documents, some.validation_documents) == (5, 5)
    assert some.train_tokens < corpus_statistics(config).train_tokens
    with pytest.raises(ValueError, match="max_documents=0 must be at least 1"):
        corpus_statistics(config, max_documents=0)


def test_the_embedded_corpus_trains_and_validates():
    config = DataConfig(sequence_length=128, batch_size=4)
    statistics = corpus_statistics(config)
    assert 4.0 < statistics.unigram_bits_per_byte < 5.5  # English and Python as bytes
    assert 0.01 < statistics.validation_bytes / statistics.train_bytes < 0.2
    batch = next(iter(make_dataset(config)))
    assert (batch["loss_weights"] == 1).all()
