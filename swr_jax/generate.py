"""Text from a trained model, token by token, each computed from the model's state alone."""

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from swr_jax.nn.language_model import LanguageModel

if TYPE_CHECKING:
    from swr_jax.data.tokenizers import Tokenizer

# Tokens decoded by one call of the compiled loop: few enough that text comes in a steady stream,
# enough that the cost of starting a computation hardly counts.
_CHUNK = 8


def generate_tokens(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    key: jax.Array | None = None,
) -> Iterator[int]:
    """Yields up to `max_tokens` ids that continue `prompt`.

    The prompt is read once; after that a token costs the same however long the text is (but for
    what full attention reads of its cache). Logits and sampling are float32.

    Args:
        model: a language model.
        prompt: ids, at least one (an empty text starts from the tokenizer's `bos_id`).
        max_tokens: number of ids to yield.
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: samples among the `top_k` likeliest tokens only; None: among all.
        key: PRNG key of the samples; None: that of seed 0.

    Raises:
        ValueError: for an empty prompt, or numbers out of range.
    """
    if len(prompt) == 0:
        raise ValueError("prompt is empty: start with the tokenizer's bos_id")
    if max_tokens < 0:
        raise ValueError(f"max_tokens={max_tokens}; it must be at least 0")
    if temperature < 0:
        raise ValueError(f"temperature={temperature}; it must be at least 0 (0: likeliest token)")
    vocab_size = model.config.vocab_size
    if top_k is not None and not 1 <= top_k <= vocab_size:
        raise ValueError(f"top_k={top_k}; it must be between 1 and the vocabulary's {vocab_size}")
    return _tokens(model, prompt, max_tokens, temperature, top_k, key)


def _tokens(
    model: LanguageModel,
    prompt: Sequence[int],
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    key: jax.Array | None,
) -> Iterator[int]:
    graphdef, params = nnx.split(model)
    key = jax.random.key(0) if key is None else key
    chunks = -(-max_tokens // _CHUNK)
    state = model.init_state(1, max_length=len(prompt) + chunks * _CHUNK)
    logits, state = _prefill(graphdef, params, jnp.asarray(prompt, jnp.int32)[None], state)
    for chunk in range(chunks):
        tokens, logits, state = _decode(
            graphdef, params, logits, state, jax.random.fold_in(key, chunk), temperature, top_k
        )
        yield from np.asarray(tokens)[: max_tokens - chunk * _CHUNK].tolist()


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="state")
def _prefill(
    graphdef: nnx.GraphDef, params: nnx.State, tokens: jax.Array, state: Any
) -> tuple[jax.Array, Any]:
    """Reads tokens [1, T]; returns the next token's logits [V] and the state."""
    logits, state = nnx.merge(graphdef, params)(tokens, state=state)
    return logits[0, -1], state


@functools.partial(
    jax.jit,
    static_argnames=("graphdef", "temperature", "top_k"),
    donate_argnames=("logits", "state"),
)
def _decode(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    logits: jax.Array,
    state: Any,
    key: jax.Array,
    temperature: float,
    top_k: int | None,
) -> tuple[jax.Array, jax.Array, Any]:
    """Samples `_CHUNK` tokens one after the other, beginning with `logits` [V]."""
    model = nnx.merge(graphdef, params)

    def step(carry: tuple[jax.Array, Any], key: jax.Array) -> tuple[tuple[jax.Array, Any], Any]:
        logits, state = carry
        token = _sample(logits, key, temperature, top_k)
        logits, state = model(token[None, None], state=state)
        return (logits[0, -1], state), token

    keys = jax.random.split(key, _CHUNK)
    (logits, state), tokens = jax.lax.scan(step, (logits, state), keys)
    return tokens, logits, state


def _sample(logits: jax.Array, key: jax.Array, temperature: float, top_k: int | None) -> jax.Array:
    if temperature == 0:
        return jnp.argmax(logits).astype(jnp.int32)
    if top_k is None:
        return jax.random.categorical(key, logits / temperature).astype(jnp.int32)
    values, tokens = jax.lax.top_k(logits, top_k)
    return tokens[jax.random.categorical(key, values / temperature)].astype(jnp.int32)


def generate_text(
    model: LanguageModel,
    tokenizer: "Tokenizer",
    prompt: str = "",
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    key: jax.Array | None = None,
) -> Iterator[str]:
    """Yields the text that continues `prompt`, piece by piece, in whole characters.

    The prompt is read as the beginning of a document. Ends at the model's end-of-document token or
    after `max_tokens`, whichever comes first. Arguments as for `generate_tokens`.
    """
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt).tolist()]
    decoder = tokenizer.stream_decoder()
    for token in ids:
        # The prompt is not repeated, but what follows may complete its last character.
        decoder.push(token)
    tokens = generate_tokens(
        model, ids, max_tokens=max_tokens, temperature=temperature, top_k=top_k, key=key
    )
    for token in tokens:
        if token == tokenizer.eos_id:
            break
        if piece := decoder.push(token):
            yield piece
    if rest := decoder.flush():
        yield rest
