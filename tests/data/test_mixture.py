"""Several prepared folders mixed by weight."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from data.batches import assert_same, random_documents, take, write_corpus

from swr_jax.data import DataConfig, make_dataset, open_corpus
from swr_jax.data.prepare import Preparation

# Corpora that a target tells apart, of short, long and middling documents.
CORPORA = {"a": (400, 10), "b": (40, 300), "c": (150, 60)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("mixture")
    made = {}
    for letter, (count, longest) in CORPORA.items():
        (root / f"{letter}_text").mkdir()
        lengths = np.random.default_rng(ord(letter)).integers(1, longest, count)
        source = write_corpus(root / f"{letter}_text", [letter * int(n) for n in lengths])
        with Preparation(source, root / letter) as preparation:
            preparation.run(workers=1)
        made[letter] = str(root / letter)
    return made


@pytest.fixture
def config(folders) -> DataConfig:
    return DataConfig(
        source=folders["a"],
        more_sources=(folders["b"], folders["c"]),
        weights=(1.0, 2.0, 1.0),
        sequence_length=32,
        batch_size=4,
        shuffle_tokens=1024,
        validation_fraction=0.1,
    )


def shares(batches) -> dict[str, float]:
    """Share of each corpus in the targets that are text."""
    counts = np.zeros(259)
    for batch in batches:
        counts += np.bincount(batch["targets"][batch["loss_weights"] == 1], minlength=259)
    counts = {letter: counts[ord(letter)] for letter in CORPORA}
    return {letter: count / sum(counts.values()) for letter, count in counts.items()}


def expected_shares(folders, weights) -> dict[str, float]:
    """Weights are shares of targets, the ends of documents included; this takes the ends away."""
    text = {}
    for letter, weight in zip(CORPORA, weights, strict=True):
        corpus = open_corpus(DataConfig(source=folders[letter], validation_fraction=0.1))
        tokens = sum(len(corpus.source[int(index)]) for index in corpus.train)
        text[letter] = weight * tokens / (tokens + len(corpus.train))
    return {letter: share / sum(text.values()) for letter, share in text.items()}


@pytest.mark.parametrize("weights", [(1.0, 2.0, 1.0), (0.05, 0.05, 0.9), (10, 1, 5)])
def test_tokens_come_in_the_proportion_of_the_weights(config, folders, weights):
    config = dataclasses.replace(
        config, weights=weights, sequence_length=1024, shuffle_tokens=1 << 17
    )
    found = shares(take(iter(make_dataset(config)), 100))  # several times through the smallest
    expected = expected_shares(folders, weights)
    for letter in CORPORA:
        assert found[letter] == pytest.approx(expected[letter], rel=0.05, abs=0.005)


def test_proportions_hold_from_the_beginning_on(config, folders):
    batches = take(iter(make_dataset(config)), 400)
    expected = expected_shares(folders, config.weights)
    for begin in range(0, 400, 50):
        found = shares(batches[begin : begin + 50])
        for letter in CORPORA:
            assert found[letter] == pytest.approx(expected[letter], abs=0.1)


def test_a_document_comes_again_only_after_all_others_of_its_source(tmp_path, folders, config):
    documents = random_documents(60, 30)
    with Preparation(write_corpus(tmp_path, documents), tmp_path / "t") as preparation:
        preparation.run(workers=1)
    config = dataclasses.replace(
        config,
        source=str(tmp_path / "t"),
        more_sources=(folders["b"],),
        weights=(1.0, 1.0),
        validation_fraction=0,
        shuffle_tokens=1,
        batch_size=1,
    )
    targets = np.concatenate([b["targets"].ravel() for b in take(iter(make_dataset(config)), 900)])
    pieces = np.split(targets, np.flatnonzero(targets == 257) + 1)[:-1]
    found = [bytes(piece[:-1].tolist()).decode() for piece in pieces]
    found = [text for text in found if set(text) != {"b"}]
    assert len(found) > 120
    for epoch in itertools.batched(found[: len(found) // 60 * 60], 60):
        assert sorted(epoch) == sorted(documents)
    assert found[:60] != found[60:120]


def test_order_is_a_function_of_the_seed(config):
    expected = take(iter(make_dataset(config)), 20)
    assert_same(take(iter(make_dataset(config)), 20), expected)
    other = take(iter(make_dataset(dataclasses.replace(config, seed=1))), 20)
    assert not all(
        np.array_equal(x["tokens"], y["tokens"]) for x, y in zip(expected, other, strict=True)
    )


def test_a_mixture_goes_on_with_another_number_of_hosts(config):
    expected = take(iter(make_dataset(config)), 40)
    state = None
    for begin, count in ((0, 2), (12, 1), (24, 4)):
        hosts = [
            iter(make_dataset(config, process_index=i, process_count=count)) for i in range(count)
        ]
        for index, host in enumerate(hosts):
            if state is not None:
                host.set_state(json.loads(json.dumps(state)))
            rows = slice(4 // count * index, 4 // count * (index + 1))
            for batch, whole in zip(take(host, 12), expected[begin : begin + 12], strict=True):
                np.testing.assert_array_equal(batch["tokens"], whole["tokens"][rows])
                np.testing.assert_array_equal(batch["targets"], whole["targets"][rows])
        state = hosts[-1].get_state()


def test_every_source_is_held_out_from_and_validated_on(config, folders):
    corpus = open_corpus(config)
    for letter, part in zip(CORPORA, corpus.by_source("validation"), strict=True):
        alone = open_corpus(DataConfig(source=folders[letter], validation_fraction=0.1))
        assert len(part) == len(alone.validation) == round(0.1 * CORPORA[letter][0])
        for index, other in zip(part, alone.validation, strict=True):
            np.testing.assert_array_equal(corpus.source[int(index)], alone.source[int(other)])
    found = shares(make_dataset(config, split="validation"))
    assert min(found.values()) > 0.1


def test_a_state_is_refused_when_the_folder_was_made_anew_with_other_documents(tmp_path):
    def batches(documents):
        with Preparation(write_corpus(tmp_path, documents), tmp_path / "t") as preparation:
            preparation.run(workers=1)
        config = DataConfig(source=str(tmp_path / "t"), sequence_length=8, batch_size=1)
        return iter(make_dataset(config))

    before = batches(["one text", "another text", "a third text"])
    next(before)
    state = before.get_state()
    for path in (tmp_path / "t").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"state was taken with .*: they must be equal"):
        batches(["one text", "something else", "a third text"]).set_state(state)


def test_text_cannot_be_mixed_before_it_is_prepared(config, tmp_path):
    text = write_corpus(tmp_path, ["a", "b", "c"])
    config = dataclasses.replace(config, more_sources=(text,), weights=(1.0, 1.0))
    with pytest.raises(ValueError, match=r"documents\.jsonl' is text, and sources are mixed by"):
        open_corpus(config)


@pytest.mark.parametrize(
    ("more_sources", "weights"),
    [(("b",), ()), (("b",), (1.0,)), (("b",), (1.0, 0.0)), ((), (1.0,)), (("b",), (1.0, -1.0))],
)
def test_weights_must_fit_the_sources(more_sources, weights):
    with pytest.raises(ValueError, match=r"weights=.* must be \d positive numbers"):
        DataConfig(more_sources=more_sources, weights=weights)
