"""Generation from the state alone gives what the full forward pass would, and text stays whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from swr_jax.data import ByteTokenizer
from swr_jax.generate import generate_text, generate_tokens
from swr_jax.nn.language_model import LanguageModel, LanguageModelConfig


def make_model(*pattern: str) -> LanguageModel:
    config = LanguageModelConfig(
        vocab_size=259, features=32, depth=2, pattern=pattern, num_heads=2, window=7
    )
    return LanguageModel(config, rngs=nnx.Rngs(3))


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return make_model("phalanx", "attention")


@pytest.mark.parametrize(
    "pattern",
    [
        ("phalanx", "attention"),
        pytest.param(("swa", "phalanx"), marks=pytest.mark.slow),
        ("swa", "mlstm"),
        pytest.param(("mlstm", "swa"), marks=pytest.mark.slow),
        pytest.param(("mlstm",), marks=pytest.mark.slow),
        pytest.param(("swa", "gated_delta"), marks=pytest.mark.slow),
    ],
)
def test_greedy_is_the_argmax_of_the_full_forward_pass_token_by_token(pattern):
    model = make_model(*pattern)
    prompt = np.random.default_rng(0).integers(0, 256, 21).tolist()
    generated = list(generate_tokens(model, prompt, max_tokens=19, temperature=0))

    # One forward pass of everything, causal, scores every position as if it came last.
    logits = jax.jit(model)(jnp.asarray([prompt + generated]))[0]
    assert generated == np.argmax(logits[len(prompt) - 1 : -1], axis=-1).tolist()
    assert len(set(generated)) > 1


def test_max_tokens_cuts_anywhere(model):
    full = list(generate_tokens(model, [1, 2, 3], max_tokens=16, temperature=0))
    for n in (0, 1, 7, 8, 9):
        assert list(generate_tokens(model, [1, 2, 3], max_tokens=n, temperature=0)) == full[:n]


def test_a_seed_gives_one_text_and_another_seed_another(model):
    def tokens(seed: int) -> list[int]:
        key = jax.random.key(seed)
        return list(generate_tokens(model, [1, 2, 3], max_tokens=16, key=key))

    assert tokens(0) == tokens(0)
    assert tokens(0) != tokens(1)


def test_top_k_samples_among_the_likeliest_only(model):
    greedy = list(generate_tokens(model, [1, 2, 3], max_tokens=8, temperature=0))
    assert list(generate_tokens(model, [1, 2, 3], max_tokens=8, top_k=1)) == greedy

    likeliest = np.argsort(jax.jit(model)(jnp.asarray([[1, 2, 3]]))[0, -1])[-3:]
    first = {
        next(generate_tokens(model, [1, 2, 3], max_tokens=1, top_k=3, key=jax.random.key(seed)))
        for seed in range(30)
    }
    assert first == set(likeliest.tolist())


def test_samples_follow_the_softmax_at_the_temperature(model):
    """The mean log-likelihood of samples is minus the entropy of what they are drawn from."""
    logits = np.asarray(jax.jit(model)(jnp.asarray([[1, 2, 3]]))[0, -1], np.float64)

    def softmax(logits: np.ndarray) -> np.ndarray:
        return np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()

    expected, hotter = softmax(logits / 0.1), softmax(logits)
    scores = np.log(expected)
    keys = [jax.random.key(seed) for seed in range(300)]
    options = {"max_tokens": 1, "temperature": 0.1}
    draws = [next(generate_tokens(model, [1, 2, 3], key=key, **options)) for key in keys]

    mean = expected @ scores
    error = np.sqrt(expected @ (scores - mean) ** 2 / len(draws))
    assert abs(np.mean(scores[draws]) - mean) < 4 * error
    assert abs(hotter @ scores - mean) > 8 * error  # another temperature would be noticed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "prompt is empty"),
        ({"max_tokens": -1}, "max_tokens=-1"),
        ({"temperature": -0.5}, "temperature=-0.5"),
        ({"top_k": 0}, "top_k=0; it must be between 1 and the vocabulary's 259"),
    ],
)
def test_errors_name_argument_and_rule(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate_tokens(model, **({"prompt": [1], "max_tokens": 1} | arguments))


def scripted(monkeypatch: pytest.MonkeyPatch, ids: list[int]) -> list:
    """Makes generation give `ids`; returns a list that gets the prompts."""
    prompts = []

    def fake(model, prompt, **options):
        prompts.append(prompt)
        return iter(ids)

    monkeypatch.setattr("swr_jax.generate.text.generate_tokens", fake)
    return prompts


def test_text_comes_in_whole_characters(monkeypatch):
    text = "aé窗🪟."
    scripted(monkeypatch, list(text.encode()))
    pieces = list(generate_text(None, ByteTokenizer(), "x", max_tokens=100))
    assert pieces == list(text)


def test_text_ends_with_the_document_and_shows_a_cut_character_as_such(monkeypatch):
    tokenizer = ByteTokenizer()
    scripted(monkeypatch, [*b"ab\xe7\xaa", tokenizer.eos_id, *b"cd"])
    assert (
        "".join(generate_text(None, tokenizer, "x", max_tokens=100))
        == "ab\N{REPLACEMENT CHARACTER}"
    )


def test_an_empty_prompt_is_the_beginning_of_a_document(monkeypatch):
    tokenizer = ByteTokenizer()
    prompts = scripted(monkeypatch, [])
    list(generate_text(None, tokenizer, "", max_tokens=1))
    list(generate_text(None, tokenizer, "é", max_tokens=1))
    assert prompts == [[tokenizer.bos_id], [tokenizer.bos_id, 0xC3, 0xA9]]
