"""Draws follow the distribution that temperature and filters define, each stream by itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swr_jax.generate import GREEDY, Sampling
from swr_jax.generate.sampling import SamplingArrays, sample

VOCABULARY, DRAWS = 12, 4000
LOGITS = np.random.default_rng(0).normal(0, 2, VOCABULARY).astype(np.float32)

draw = jax.jit(sample)


def distribution(logits: np.ndarray, options: Sampling) -> np.ndarray:
    """What a token should be drawn from, token by token in plain Python, float64."""
    logits = np.asarray(logits, np.float64) / options.temperature
    weights = {token: np.exp(x - logits.max()) for token, x in enumerate(logits)}
    order = sorted(weights, key=lambda token: -weights[token])
    order = order[: options.top_k]
    total, reached, kept = sum(weights[token] for token in order), 0.0, []
    for token in order:
        if kept and reached / total >= options.top_p:
            break
        kept.append(token)
        reached += weights[token]
    kept = [token for token in kept if weights[token] >= options.min_p]
    found = np.zeros(len(logits))
    found[kept] = [weights[token] for token in kept]
    return found / found.sum()


@pytest.mark.parametrize(
    "options",
    [
        Sampling(seed=1),
        Sampling(temperature=0.3),
        Sampling(temperature=2.5, top_k=4),
        Sampling(top_p=0.7),
        Sampling(temperature=1.7, min_p=0.1),
        Sampling(temperature=1.7, top_k=7, top_p=0.8, min_p=0.05, seed=9),
    ],
    ids=str,
)
def test_frequencies_are_the_probabilities(options):
    logits = jnp.broadcast_to(LOGITS, (DRAWS, VOCABULARY))
    found = np.asarray(draw(logits, SamplingArrays.of([options] * DRAWS), jnp.arange(DRAWS)))
    expected = distribution(LOGITS, options)
    counts = np.bincount(found, minlength=VOCABULARY)
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(expected))
    deviation = np.sqrt(DRAWS * expected * (1 - expected))
    assert (np.abs(counts - DRAWS * expected) <= 4.5 * deviation + 1e-9).all()


@settings(deadline=None, max_examples=40)
@given(
    temperature=st.floats(0.05, 5),
    top_k=st.none() | st.integers(1, VOCABULARY),
    top_p=st.floats(0.05, 1),
    min_p=st.floats(0, 0.9),
    seed=st.integers(0, 2**63 - 1),
)
def test_no_draw_is_forbidden(temperature, top_k, top_p, min_p, seed):
    options = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    logits = jnp.broadcast_to(LOGITS, (32, VOCABULARY))
    found = np.asarray(draw(logits, SamplingArrays.of([options] * 32), jnp.arange(32)))
    # A filter's edge may fall on a token either way, by rounding.
    edge = {
        "top_p": min(1.0, top_p + 1e-5),
        "min_p": max(0.0, min_p - 1e-5),
    }
    allowed = distribution(LOGITS, dataclasses.replace(options, **edge))
    assert (allowed[found] > 0).all()


def test_a_draw_depends_on_seed_and_number_and_nothing_of_the_neighbours():
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(size=(4, VOCABULARY)), jnp.float32)
    options = [Sampling(seed=3), GREEDY, Sampling(top_p=0.5, seed=4), Sampling(top_k=3, seed=3)]
    numbers = jnp.asarray([0, 5, 17, 3], jnp.int32)
    together = np.asarray(draw(logits, SamplingArrays.of(options), numbers))
    for row, each in enumerate(options):
        alone = draw(logits[row : row + 1], SamplingArrays.of([each]), numbers[row : row + 1])
        assert together[row] == alone[0]
        for other in range(4):
            moved = np.roll(np.arange(4), other)
            rolled = SamplingArrays.of([options[i] for i in moved])
            found = np.asarray(draw(logits[moved], rolled, numbers[moved]))
            assert found[list(moved).index(row)] == together[row]
    flat = jnp.zeros((64, VOCABULARY))
    options = SamplingArrays.of([Sampling(seed=3)] * 64)
    assert len(set(np.asarray(draw(flat, options, jnp.arange(64))).tolist())) == VOCABULARY
    assert len(set(np.asarray(draw(flat, options, jnp.zeros(64, jnp.int32))).tolist())) == 1
    seeds = SamplingArrays.of([Sampling(seed=seed << 32) for seed in range(64)])
    assert len(set(np.asarray(draw(flat, seeds, jnp.zeros(64, jnp.int32))).tolist())) > 6


def test_extremes_are_greedy():
    logits = jnp.asarray(LOGITS)[None]
    for options in (
        Sampling(temperature=1e-30),
        Sampling(top_k=1),
        Sampling(top_p=1e-6),
        Sampling(min_p=1.0),
        GREEDY,
    ):
        assert (
            draw(logits, SamplingArrays.of([options]), jnp.zeros(1, jnp.int32)) == LOGITS.argmax()
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0; it must be at least 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0; it must be at least 1"),
        ({"top_p": 0.0}, "top_p=0.0; it must be above 0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"min_p": -0.1}, "min_p=-0.1; it must be between"),
        ({"seed": -1}, "seed=-1; it must be between 0"),
        ({"seed": 2**63}, "seed="),
    ],
)
def test_errors_name_option_and_rule(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
