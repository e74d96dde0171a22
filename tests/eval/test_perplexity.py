"""Losses by position are counted as a plain loop counts them."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from swr_jax.data import ByteTokenizer, DataConfig, open_corpus
from swr_jax.eval.perplexity import (
    cut_streams,
    perplexity_by_position,
    position_ranges,
    text_stream,
)


class Pretender:
    """Gives each token a log-probability that depends on position and token alone."""

    def score(self, rows, *, progress):
        progress(sum(len(row) - 1 for row in rows))
        return [
            SimpleNamespace(
                log_probs=np.array(
                    [-1.0 / t - row[t] / 100 for t in range(1, len(row))], np.float32
                )
            )
            for row in rows
        ]


def test_sums_by_position_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    rows = rng.integers(259, size=(40, 101))
    sizes = ByteTokenizer().token_bytes
    told = []
    found = perplexity_by_position(Pretender(), rows, sizes, progress=told.append)
    assert (found["streams"], found["tokens"], sum(told)) == (40, 4000, 4000)
    assert [(r["from"], r["to"]) for r in found["ranges"]] == [
        *((1, 15), (16, 31), (32, 63), (64, 100)),
    ]
    for part in (*found["ranges"], {"from": 1, "to": 100, **found["all"]}):
        nats, total, count = 0.0, 0, 0
        for row in rows:
            for t in range(part["from"], part["to"] + 1):
                nats += 1.0 / t + row[t] / 100
                total += row[t] < 256  # special tokens are no text, but cost bits all the same
                count += 1
        assert part["loss"] == pytest.approx(nats / count, rel=1e-6)
        assert part["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-6)
        assert part["bits_per_byte"] == pytest.approx(nats / math.log(2) / total, rel=1e-6)
        low, high = part["interval"]
        assert low < part["bits_per_byte"] < high
        assert high - low < 0.5


@pytest.mark.parametrize("length", [16, 17, 100, 128, 131_072])
def test_ranges_cut_all_positions(length):
    ranges = position_ranges(length)
    assert [t for low, high in ranges for t in range(low, high)] == list(range(1, length + 1))
    assert all(high >= 16 and high & (high - 1) == 0 for _, high in ranges[:-1])


def test_streams_are_spread_over_the_text_and_share_no_target():
    stream = np.arange(1000)
    for length, count in ((100, 3), (100, 50), (999, 2)):
        rows = cut_streams(stream, length=length, count=count)
        assert len(rows) == min(count, 999 // length)
        targets = rows[:, 1:].reshape(-1)
        assert len(set(targets)) == len(targets)
        assert rows[0, 0] == 0
        assert len(rows) == 1 or rows[-1, -1] == 999
        assert (np.diff(rows, axis=1) == 1).all()
    with pytest.raises(ValueError, match="the text has 1,000 tokens; a context of length=1,000"):
        cut_streams(stream, length=1000, count=1)


def test_documents_follow_one_another_between_their_ends(tmp_path):
    for number in range(200):
        (tmp_path / f"{number:03}.txt").write_text(f"document {number}")
    corpus = open_corpus(DataConfig(source=str(tmp_path), validation_fraction=0.1))
    stream = text_stream(corpus, split="validation", tokens=10**6)
    documents = np.split(stream, np.flatnonzero(stream == 256)[1:])
    assert len(documents) == 20
    texts = [bytes(ids[1:-1].astype(np.uint8)).decode() for ids in documents]
    held_out = [corpus.source[int(i)].decode() for i in corpus.indices("validation")]
    assert texts == held_out
    assert all(ids[-1] == 257 for ids in documents)
    assert np.array_equal(text_stream(corpus, split="validation", tokens=50), stream[:50])
