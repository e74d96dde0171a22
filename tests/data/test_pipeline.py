"""The data pipeline against a packer written with Python lists, and its promises one by one."""

import collections
import dataclasses
import itertools
import json
import math
import time

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swr_jax.data import DataConfig, corpus_statistics, make_dataset, open_corpus
from swr_jax.data.packing import PackingOptions, PackIterDataset

BOS, EOS, PAD = 256, 257, 258  # of the byte tokenizer
KEYS = ("tokens", "targets", "segment_ids", "positions", "loss_weights", "target_bytes")


def write_corpus(folder, documents) -> str:
    path = folder / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return str(path)


def random_documents(count, longest, seed=0) -> list[str]:
    rng = np.random.default_rng(seed)
    alphabet = list("abcdefghijklmnopqrstuvwxyz 中é👍")
    return ["".join(rng.choice(alphabet, rng.integers(1, longest))) for _ in range(count)]


@pytest.fixture
def config(tmp_path) -> DataConfig:
    """Sixty documents, one of them many rows long, and windows much smaller than the corpus."""
    documents = [*random_documents(59, 40), "long " * 100]
    return DataConfig(
        source=write_corpus(tmp_path, documents),
        sequence_length=16,
        batch_size=4,
        shuffle_tokens=256,
        validation_fraction=0.2,
    )


def oracle_batches(documents: list[bytes], batch_size: int, length: int) -> list[dict]:
    """Concatenate the pairs of all documents, cut into rows, pad the last batch."""
    pairs = []
    for number, document in enumerate(d for d in documents if d):
        ids = [BOS, *document, EOS]
        pairs += [(a, b, number) for a, b in itertools.pairwise(ids)]
    while len(pairs) % (batch_size * length):
        pairs.append((PAD, PAD, None))
    rows = []
    for begin in range(0, len(pairs), length):
        row = {key: [] for key in KEYS}
        seen = []
        for token, target, number in pairs[begin : begin + length]:
            if number is not None and number not in seen:
                seen.append(number)
                position = 0
            row["tokens"].append(token)
            row["targets"].append(target)
            row["segment_ids"].append(0 if number is None else len(seen))
            row["positions"].append(0 if number is None else position)
            row["loss_weights"].append(0.0 if number is None else 1.0)
            row["target_bytes"].append(int(target < 256))
            position += 1
        rows.append(row)
    return [
        {key: [row[key] for row in rows[begin : begin + batch_size]] for key in KEYS}
        for begin in range(0, len(rows), batch_size)
    ]


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert set(batch) == set(KEYS)
        for key in KEYS:
            np.testing.assert_array_equal(batch[key], other[key], err_msg=key)


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


# Resume


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def through_json(state):
    return json.loads(json.dumps(state))


@pytest.mark.parametrize("taken", [0, 1, 3, 4, 5, 11, 30])
@pytest.mark.parametrize("wrap", [False, True], ids=["plain", "prefetched"])
def test_an_iterator_goes_on_exactly_where_its_state_was_taken(config, taken, wrap):
    def fresh():
        dataset = make_dataset(config)
        if wrap:
            dataset = grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=3)
        return iter(dataset)

    iterator = fresh()
    take(iterator, taken)
    state = through_json(iterator.get_state())
    expected = take(iterator, 20)
    resumed = fresh()
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert_same(take(resumed, 20), expected)
    # Back in the same iterator, in the midst of its own prefetching.
    iterator.set_state(state)
    iterator.start_prefetch()
    assert through_json(iterator.get_state()) == state
    assert_same(take(iterator, 20), expected)


def test_a_state_of_a_resumed_iterator_is_good_too(config):
    expected = take(iter(make_dataset(config)), 30)
    given = []
    state = None
    for _ in range(10):
        iterator = iter(make_dataset(config))
        if state is not None:
            iterator.set_state(state)
        given += take(iterator, 3)
        state = through_json(iterator.get_state())
    assert_same(given, expected)


def test_a_state_can_be_taken_and_set_while_packing_is_under_way():
    class SlowDocuments:
        def __len__(self):
            return 200

        def __getitem__(self, index):
            time.sleep(0.002)
            return np.array([BOS, *range(index.__index__() % 200), EOS], np.int32)

    options = PackingOptions(2, 16, 4, 0, 0, 1, PAD, 200)
    read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    documents = grain.MapDataset.source(SlowDocuments()).to_iter_dataset(read)
    dataset = PackIterDataset(documents, options, np.ones(259, np.int32))
    expected = take(iter(dataset), 12)
    iterator = iter(dataset)
    start = iterator.get_state()
    iterator.start_prefetch()
    time.sleep(0.02)  # the first window is being packed
    assert iterator.get_state() == start
    take(iterator, 5)  # the second window is in use, the third being packed
    state = iterator.get_state()
    iterator.set_state(state)
    assert_same(take(iterator, 7), expected[5:])
    iterator.set_state(start)
    assert_same(take(iterator, 12), expected)


def test_the_end_is_restored_too(config):
    iterator = iter(make_dataset(config, split="validation"))
    batches = list(iterator)
    before_end = iter(make_dataset(config, split="validation"))
    take(before_end, len(batches))
    for finished in (iterator, before_end):
        resumed = iter(make_dataset(config, split="validation"))
        resumed.set_state(through_json(finished.get_state()))
        assert list(resumed) == []


def test_a_failure_leaves_the_state_of_the_last_batch(tmp_path):
    path = tmp_path / "d.jsonl"
    good = [json.dumps({"text": text}) + "\n" for text in random_documents(40, 30)]
    path.write_text("".join([*good, "{bad}\n"]))
    config = DataConfig(
        source=str(path),
        sequence_length=8,
        batch_size=2,
        shuffle_tokens=64,
        validation_fraction=0,
        seed=1,
    )
    iterator = iter(make_dataset(config))
    states = [iterator.get_state()]
    # A generator, because the states before the failure are what matters.
    with pytest.raises(ValueError, match="is not valid JSON"):
        states.extend(iterator.get_state() for _ in iterator)
    assert len(states) > 5
    assert iterator.get_state() == states[-1]
    # Once the line is mended, the run goes on as if nothing had been wrong.
    path.write_text("".join([*good, json.dumps({"text": "good"}) + "\n"]))
    mended = iter(make_dataset(config))
    mended.set_state(states[-1])
    expected = take(iter(make_dataset(config)), len(states) + 9)
    assert_same(take(mended, 10), expected[-10:])


@pytest.mark.parametrize("change", [{"batch_size": 2}, {"sequence_length": 8}, {"seed": 1}])
def test_a_state_of_other_batches_is_refused(config, change):
    state = through_json(iter(make_dataset(config)).get_state())
    other = iter(make_dataset(dataclasses.replace(config, **change)))
    with pytest.raises(ValueError, match=r"state was taken with .*: they must be equal"):
        other.set_state(state)


def test_the_number_of_processes_may_change_on_the_way(config):
    whole = iter(make_dataset(config))
    take(whole, 6)
    half = iter(make_dataset(config, process_index=1, process_count=2))
    half.set_state(through_json(whole.get_state()))
    for batch, part in zip(take(whole, 8), take(half, 8), strict=True):
        for key in KEYS:
            np.testing.assert_array_equal(part[key], batch[key][2:])


def test_state_goes_through_a_checkpoint_on_disk(config, tmp_path):
    iterator = iter(make_dataset(config))
    take(iterator, 7)
    handler = grain.checkpoint.CheckpointHandler()
    handler.save(tmp_path, item=iterator)
    expected = take(iterator, 5)
    resumed = handler.restore(tmp_path, item=iter(make_dataset(config)))
    assert_same(take(resumed, 5), expected)


def test_threads_change_nothing(config):
    expected = take(iter(make_dataset(config)), 20)
    many = dataclasses.replace(config, read_threads=13)
    assert_same(take(iter(make_dataset(many)), 20), expected)


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
