"""Perplexity and bits per byte by position in the context: whether a model uses what it has read.

Held-out documents follow one another in one stream, each between the tokens that begin and end it,
cut into streams of T tokens that start anywhere in a document. Position t is the number of tokens
that the model has seen when it names the next one. If loss goes on falling with position, context
is used; if it rises beyond the lengths of training, the model does not bear such lengths.

Intervals are bootstrapped over pieces of up to 4,096 neighbouring tokens, taken as independent,
which pieces of one document are not quite. Fewer than 8 pieces give no interval.
"""

import itertools
import math

import numpy as np

from swr_jax.data import Corpus
from swr_jax.eval.errors import TaskError
from swr_jax.eval.intervals import bootstrap_ratio
from swr_jax.eval.streaming import Progress, Streamer, ignore

_PIECE = 4096


def text_stream(corpus: Corpus, *, split: str, tokens: int) -> np.ndarray:
    """Join documents of a split, in order, until there are `tokens` tokens (fewer if it ends)."""
    begin, end = corpus.tokenizer.bos_id, corpus.tokenizer.eos_id
    parts, total = [], 0
    for index in corpus.indices(split):
        ids = np.asarray(corpus.tokens(corpus.source[int(index)]), np.int32)
        parts.append(np.concatenate([[begin], ids, [end]]).astype(np.int32))
        total += len(parts[-1])
        if total >= tokens:
            break
    return np.concatenate(parts)[:tokens]


def cut_streams(stream: np.ndarray, *, length: int, count: int) -> np.ndarray:
    """Rows [count, length + 1] of a stream, evenly spread; fewer where they would overlap.

    Neighbouring rows may share one token, the target of the first and the beginning of the next.

    Raises:
        TaskError: the stream is too short for one row.
    """
    if len(stream) < length + 1:
        raise TaskError(
            f"the text has {len(stream):,} tokens; a context of length={length:,} needs one more "
            "than its length: name more text"
        )
    count = min(count, (len(stream) - 1) // length)
    starts = np.linspace(0, len(stream) - 1 - length, count).astype(np.int64)
    return np.stack([stream[start : start + length + 1] for start in starts])


def position_ranges(length: int) -> list[tuple[int, int]]:
    """Cut positions 1 … length into ranges [low, high) that end before powers of two from 16 on."""
    edges = itertools.takewhile(lambda edge: edge < length, (16 << n for n in itertools.count()))
    return list(itertools.pairwise([1, *edges, length + 1]))


def perplexity_by_position(
    streamer: Streamer,
    rows: np.ndarray,
    token_bytes: np.ndarray,
    *,
    progress: Progress = ignore,
) -> dict:
    """Score rows [N, T + 1] and gather the losses by position; sums are float64.

    Args:
        streamer: the model.
        rows: as `cut_streams` gives them.
        token_bytes: bytes of text of each token of the vocabulary.
        progress: as for `Streamer.score`.

    Returns:
        `streams`, `tokens`; `all` and `ranges`: loss (nats per token), perplexity, bits_per_byte
        (all nats, those of special tokens too, over bytes of text) and its 95 % interval
        (`interval`, None for too few pieces), of all positions and of each range (`from`, `to`).
    """
    found = streamer.score(list(rows), progress=progress)
    nats = -np.stack([scores.log_probs for scores in found]).astype(np.float64)
    sizes = token_bytes[rows[:, 1:]].astype(np.float64)
    length = nats.shape[1]
    return {
        "streams": len(rows),
        "tokens": int(nats.size),
        "all": _summary(nats, sizes),
        "ranges": [
            {
                "from": low,
                "to": high - 1,
                **_summary(nats[:, low - 1 : high - 1], sizes[:, low - 1 : high - 1]),
            }
            for low, high in position_ranges(length)
        ],
    }


def _summary(nats: np.ndarray, sizes: np.ndarray) -> dict:
    starts = np.arange(0, nats.shape[1], _PIECE)
    piece_bits, piece_bytes = (
        np.add.reduceat(x, starts, axis=1).reshape(-1) for x in (nats / math.log(2), sizes)
    )
    total_bytes = sizes.sum()
    loss = float(nats.mean())
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": float(piece_bits.sum() / total_bytes) if total_bytes else None,
        "interval": bootstrap_ratio(piece_bits, piece_bytes) if total_bytes else None,
    }
