"""Loss, perplexity and bits per byte on held-out text, and the same of a model without context."""

import itertools
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding

from swr_jax.data import Corpus, DataConfig, make_dataset
from swr_jax.train.metrics import likelihood
from swr_jax.train.sharding import put_batch
from swr_jax.train.step import Batch, Metrics, Params


def validation_batches(
    config: DataConfig, corpus: Corpus, *, count: int
) -> list[dict[str, np.ndarray]]:
    """The first `count` validation batches (fewer if there are fewer), rows of all processes."""
    return list(itertools.islice(make_dataset(config, split="validation", corpus=corpus), count))


def evaluate(
    eval_step: Callable[[Params, Batch], Metrics],
    params: Params,
    batches: Sequence[Mapping[str, np.ndarray]],
    sharding: NamedSharding,
) -> dict[str, float]:
    """`likelihood` of all `batches` together; each batch summed in float32, the sums in float64."""
    pending = [eval_step(params, put_batch(_own_rows(batch), sharding)) for batch in batches]
    sums = [jax.device_get(metrics) for metrics in pending]
    return likelihood(
        sum(float(s["nats"]) for s in sums),
        sum(float(s["weight"]) for s in sums),
        sum(int(s["target_bytes"]) for s in sums),
    )


def _own_rows(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    index, count = jax.process_index(), jax.process_count()
    return {name: np.split(value, count)[index] for name, value in batch.items()}


def unigram_bits_per_byte(
    corpus: Corpus, batches: Sequence[Mapping[str, np.ndarray]], *, max_documents: int = 4096
) -> float:
    """Bits per byte on `batches` of a model that knows only how frequent each token is.

    Frequencies are counted in at most `max_documents` training documents, evenly spread, plus one
    count for every token; float64. The batches are the ones that the trained model is scored on.
    """
    indices = corpus.indices("train")
    chosen = indices[:: -(-len(indices) // max_documents)]
    counts = np.ones(corpus.tokenizer.vocab_size)
    counts[corpus.tokenizer.eos_id] += len(chosen)
    for index in chosen:
        ids = corpus.tokens(corpus.source[int(index)])
        counts += np.bincount(ids, minlength=len(counts))
    bits = -np.log2(counts / counts.sum())
    total_bits = sum(float(np.sum(b["loss_weights"] * bits[b["targets"]])) for b in batches)
    return total_bits / max(sum(int(np.sum(b["target_bytes"])) for b in batches), 1)
