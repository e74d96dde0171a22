"""Streams in chunks say what one pass over all says, in memory that does not grow with length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from swr_jax.eval.streaming import Streamer, bounded_attention
from swr_jax.nn.language_model import LanguageModel, LanguageModelConfig

VOCABULARY = 61
RECURRENT = ("phalanx", "mlstm", "gated_delta")


def make_model(*pattern: str, **options) -> LanguageModel:
    config = LanguageModelConfig(
        vocab_size=VOCABULARY,
        features=16,
        depth=2,
        pattern=pattern,
        num_heads=2,
        **({"window": 7} | options),
    )
    return LanguageModel(config, rngs=nnx.Rngs(1))


def texts(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(VOCABULARY, size=length).tolist() for length in lengths]


@pytest.fixture(scope="module")
def hybrid() -> LanguageModel:
    return make_model("phalanx", "attention")


def logits_of(model: LanguageModel, rows: list[list[int]]) -> list[np.ndarray]:
    """Logits of every row by one pass over all; what is padded comes later and changes nothing."""
    padded = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for tokens, row in zip(padded, rows, strict=True):
        tokens[: len(row)] = row
    logits = np.asarray(jax.jit(model)(padded), np.float64)
    return [x[: len(row)] for x, row in zip(logits, rows, strict=True)]


PATTERNS = [
    ("phalanx", "attention"),
    pytest.param(("swa", "mlstm"), marks=pytest.mark.slow),
    pytest.param(("swa", "gated_delta"), marks=pytest.mark.slow),
    pytest.param(("phalanx", "swa"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_scores_are_those_of_one_pass_over_everything(pattern):
    model, rows, counts = make_model(*pattern), texts(2, 75, 33, 49, 17), []
    found = Streamer(model, chunk_size=32, batch_size=3).score(rows, progress=counts.append)
    assert sum(counts) == sum(len(row) - 1 for row in rows)
    for row, scores, logits in zip(rows, found, logits_of(model, rows), strict=True):
        log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        expected = log_probs[np.arange(len(row) - 1), row[1:]]
        np.testing.assert_allclose(scores.log_probs, expected, rtol=1e-5, atol=1e-5)
        assert scores.predicted.tolist() == logits[:-1].argmax(axis=-1).tolist()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_answers_side_by_side_are_the_likeliest_tokens_of_each_prompt_alone(pattern):
    model, prompts, counts = make_model(*pattern), texts(1, 59, 16, 35, 3), []
    streamer = Streamer(model, chunk_size=16, batch_size=3)
    answers = streamer.generate(prompts, max_tokens=20, progress=counts.append)
    assert sum(counts) == sum(map(len, prompts))
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    for prompt, answer, logits in zip(prompts, answers, logits_of(model, rows), strict=True):
        assert answer == logits[len(prompt) - 1 : -1].argmax(axis=-1).tolist()
        assert len(answer) == 20


def test_answers_end_when_all_are_over(hybrid):
    streamer, prompts = Streamer(hybrid, chunk_size=16, batch_size=3), texts(8) * 3
    full = streamer.generate(prompts, max_tokens=48)[0]
    ended = streamer.generate(prompts, max_tokens=48, is_over=lambda ids: full[20] in ids)
    assert all(answer == full[: len(answer)] for answer in ended)
    assert len(ended[0]) in (16, 32)  # looked at every 16 tokens


@pytest.mark.parametrize(
    "pattern",
    [("phalanx", "swa"), *(pytest.param((m,), marks=pytest.mark.slow) for m in RECURRENT)],
)
def test_memory_does_not_depend_on_length(pattern):
    streamer = Streamer(make_model(*pattern, window=64), chunk_size=64)
    short, long = (streamer.memory(2, length) for length in (1024, 131_072))
    assert short == long
    assert short["state"] > 0
    assert short["temporary"] > 0


def test_memory_of_streams_shorter_than_a_chunk(hybrid):
    streamer = Streamer(hybrid, chunk_size=512, batch_size=2)
    assert streamer.memory(2, 16)["temporary"] < streamer.memory(2, 512)["temporary"]


def test_the_cache_of_full_attention_grows_unless_it_is_bounded(hybrid):
    short, long = (Streamer(hybrid, chunk_size=64).memory(2, n) for n in (1024, 131_072))
    assert long["state"] > 60 * short["state"]
    streamer = Streamer(bounded_attention(hybrid, 64), chunk_size=64)
    assert streamer.memory(2, 131_072)["state"] < short["state"]


def test_one_program_reads_streams_of_every_length():
    streamer = Streamer(make_model("phalanx", "swa"), chunk_size=64, batch_size=1)
    for length in (64, 64 * 300):
        (scores,) = streamer.score(texts(length + 1))
        assert np.isfinite(scores.log_probs).all()
        assert len(scores.log_probs) == length
    assert len(streamer._programs) == 1


def test_bounded_attention_sees_its_window_and_no_further(hybrid):
    bounded = bounded_attention(hybrid, 8)
    assert bounded.config.pattern == ("phalanx", "swa")
    tokens = jnp.asarray(texts(60))

    @jax.jit
    def logits(tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        return hybrid(tokens), bounded(tokens)

    full, short = logits(tokens)
    np.testing.assert_allclose(short[:, :8], full[:, :8], atol=1e-5)
    moved = [
        np.abs(new - old).max(axis=-1)[0]
        for new, old in zip(logits(tokens.at[0, 0].add(1)), (full, short), strict=True)
    ]
    reach = 31 + 7  # the recurrence's window of two blocks, then attention's
    assert (moved[0] > 0).all()
    assert (moved[1][: 31 + 1] > 0).all()
    assert (moved[1][reach + 1 :] == 0).all()


def test_bounded_attention_keeps_its_positions():
    """A base for windows, of which the model has none, is not that of its full attention."""
    model = make_model("attention", rope_base=50.0, rope_local_base=10_000.0)
    tokens = jnp.asarray(texts(8))
    run = jax.jit(lambda model: model(tokens))
    np.testing.assert_allclose(run(bounded_attention(model, 8)), run(model), atol=1e-6)
    with pytest.raises(ValueError, match=r"rope_local_base=50\.0; the model's windowed attention"):
        bounded_attention(make_model("swa", "attention", rope_local_base=50.0), 7)


def test_errors_name_argument_and_rule(hybrid):
    with pytest.raises(ValueError, match="chunk_size=24; it must be a power of two"):
        Streamer(hybrid, chunk_size=24)
    with pytest.raises(ValueError, match="batch_size=0"):
        Streamer(hybrid, batch_size=0)
    streamer = Streamer(hybrid)
    with pytest.raises(ValueError, match="row 1 has 1 tokens"):
        streamer.score([[1, 2], [3]])
    with pytest.raises(ValueError, match="a prompt is empty"):
        streamer.generate([[1], []], max_tokens=1)
    with pytest.raises(ValueError, match="max_tokens=0"):
        streamer.generate([[1]], max_tokens=0)
    with pytest.raises(ValueError, match="window=8; the model's own windowed attention has 7"):
        bounded_attention(make_model("swa", "attention"), 8)
