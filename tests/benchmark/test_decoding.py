"""Suite `decode`: what it refuses to time, how contexts are filled, what it writes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swr_jax.benchmark import decoding, plots, timing
from swr_jax.benchmark.oracle import OracleError
from swr_jax.benchmark.plots import decode as pictures
from swr_jax.nn.attention import AttentionState


@pytest.fixture(scope="module")
def models():
    return decoding.make_models(decoding.TINY)


@pytest.fixture(autouse=True)
def allocator(monkeypatch):
    """Leaves this process's as it is."""
    monkeypatch.setattr(timing, "keep_freed_memory", lambda: False)


def caches(stream):
    state = stream._streams.state
    return [x for x in state if isinstance(x, AttentionState)]


def test_a_model_that_decodes_something_else_is_not_timed(models, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("timed although a check is red")

    monkeypatch.setattr(timing, "measure", refuse)
    monkeypatch.setattr(decoding, "generate_batch", lambda *_, **__: iter([[1, 2]] * 16))
    with pytest.raises(OracleError, match=r"transformer\+\+, 21 tokens of prompt: token 0"):
        list(decoding.run(decoding.TINY, models))


def test_a_filled_cache_decodes_what_a_cache_of_repeated_tokens_would(models):
    """One layer's cache after a prompt repeated is the repeated cache, but for positions."""
    context = decoding.TINY.contexts[1]
    stream = decoding.Stream(models["transformer++"], context, decoding.TINY)
    (cache,) = caches(stream)
    read = decoding.TINY.prompt
    assert np.asarray(cache.position).tolist() == [[context]] * decoding.TINY.depth
    keys = np.asarray(cache.keys)[:, :, :context]
    assert np.abs(keys).min(axis=(-1, -2)).max() > 0
    np.testing.assert_array_equal(keys[:, :, read : 2 * read], keys[:, :, :read])
    assert (np.asarray(cache.segment_ids)[:, :, :context] == 0).all()
    for _ in range(3):  # steps write the slot after the context, and stay there
        tokens = stream()
    (after,) = caches(stream)
    assert np.asarray(after.position).tolist() == [[context]] * decoding.TINY.depth
    assert jnp.isfinite(after.keys).all()
    assert 0 <= int(tokens[0, 0]) < 259


def test_states_of_windows_and_recurrences_do_not_grow(models):
    sizes = {
        name: [
            decoding.Stream(model, context, decoding.TINY).state_bytes
            for context in decoding.TINY.contexts
        ]
        for name, model in models.items()
    }
    added = decoding.TINY.contexts[1] - decoding.TINY.contexts[0]
    # Keys and values of 32 features, and the segment, of every token of a full attention layer.
    per_token = 4 * (2 * 32 + 1)
    assert {name: long - short for name, (short, long) in sizes.items()} == {
        "transformer++": 2 * added * per_token,
        "swa_hybrid": added * per_token,
        "swax": 0,
        "phalanx": 0,
    }


def test_records_have_rates_and_bytes_and_a_picture(models, tmp_path):
    rows = list(decoding.run(decoding.TINY, models))
    assert [row["tokens"] for row in rows] == list(decoding.TINY.contexts)
    for row in rows:
        assert set(row["contestants"]) == set(row["state_bytes"]) == set(decoding.PATTERNS)
        for name, contestant in row["contestants"].items():
            rate, ms = contestant["tokens_per_second"], contestant["milliseconds"]
            assert rate["median"] == pytest.approx(1e3 / ms["median"])
            assert 0 < rate["lower"] <= rate["median"] <= rate["upper"]
            parameters = jax.tree.leaves(models[name].periods)
            assert row["parameter_bytes"][name] == 4 * row["parameters"][name] > len(parameters)
    record = {
        "suite": "decode",
        "section": "context",
        "environment": {"device": "d", "cores": 1, "jax": "0", "commit": "c"},
        "protocol": {"shapes": "tiny"},
        "measurements": json.loads(json.dumps(rows)),
    }
    assert plots.draw(record, tmp_path / "p.png").stat().st_size > 10_000
    assert set(pictures._LINES) == set(decoding.PATTERNS)
