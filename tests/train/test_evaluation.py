"""Bits per byte, exactly, for the model and for the unigram baseline."""

import collections
import math

import jax
import numpy as np
import pytest
from flax import nnx

from swr_jax.data import open_corpus
from swr_jax.train.config import MeshConfig
from swr_jax.train.evaluation import evaluate, unigram_bits_per_byte, validation_batches
from swr_jax.train.metrics import likelihood
from swr_jax.train.sharding import batch_sharding, make_mesh
from swr_jax.train.state import init_state, make_blueprint
from swr_jax.train.step import make_eval_step


def test_likelihood_of_a_fair_coin_per_byte_is_one_bit():
    values = likelihood(nats=1000 * math.log(2), weight=500, target_bytes=1000)
    assert values["bits_per_byte"] == pytest.approx(1.0)
    assert values["loss"] == pytest.approx(2 * math.log(2))
    assert values["perplexity"] == pytest.approx(4.0)


def test_evaluation_is_the_sum_over_documents(config):
    """The oracle runs the model over each validation document alone, in one unpacked row."""
    corpus = open_corpus(config.data)
    mesh = make_mesh(MeshConfig())
    blueprint = make_blueprint(config, mesh)
    params = init_state(config, blueprint).params
    batches = validation_batches(config.data, corpus, count=10**6)
    values = evaluate(make_eval_step(blueprint, mesh), params, batches, batch_sharding(mesh))

    nats, targets, size = 0.0, 0, 0
    rows = collections.defaultdict(list)
    for batch in batches:
        for row in zip(*(batch[k] for k in ("tokens", "targets", "segment_ids")), strict=True):
            for segment in set(row[2].tolist()) - {0}:
                inside = row[2] == segment
                rows[int(inside.sum())].append((row[0][inside], row[1][inside]))
    model = nnx.merge(blueprint.graphdef, params)
    for pieces in rows.values():
        tokens, wanted = (np.stack(column) for column in zip(*pieces, strict=True))
        logits = np.asarray(jax.jit(model)(tokens), np.float64)
        log_z = np.log(np.exp(logits).sum(-1))
        nats += (log_z - np.take_along_axis(logits, wanted[..., None], -1)[..., 0]).sum()
        targets += wanted.size
    size = sum(len(corpus.source[int(i)]) for i in corpus.validation)
    assert values["loss"] == pytest.approx(nats / targets, rel=1e-5)
    assert values["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_unigram_is_scored_on_the_same_batches(config):
    corpus = open_corpus(config.data)
    batches = validation_batches(config.data, corpus, count=2)
    counts = collections.Counter(range(259))  # one for each id
    for index in corpus.train:
        counts.update(corpus.source[int(index)])
        counts[corpus.tokenizer.eos_id] += 1
    total = sum(counts.values())
    bits = size = 0
    for batch in batches:
        for target, weight, length in zip(
            batch["targets"].flat,
            batch["loss_weights"].flat,
            batch["target_bytes"].flat,
            strict=True,
        ):
            bits -= float(weight) * math.log2(counts[int(target)] / total)
            size += int(length)
    assert unigram_bits_per_byte(corpus, batches) == pytest.approx(bits / size, rel=1e-9)
