"""Ids that continue prompts: of one stream, or of several with prompts of different lengths."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np
from flax import nnx

from swr_jax.generate.sampling import DEFAULT, Sampling, SamplingArrays, check_vocabulary
from swr_jax.generate.streams import check_chunk, decode, new_streams, read_prompts, room
from swr_jax.nn.language_model import LanguageModel

# Tokens decoded by one call of the compiled loop: few enough that text comes in a steady stream,
# enough that the cost of starting a computation hardly counts.
_STRIDE = 8
CHUNK_SIZE = 512  # tokens of a prompt that are read at once


def generate_tokens(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    key: jax.Array | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> Iterator[int]:
    """Yields up to `max_tokens` ids that continue `prompt`.

    The prompt is read once, in chunks; after that a token costs the same however long the text is
    (but for what full attention reads of its cache). Logits and sampling are float32.

    Args:
        model: a language model.
        prompt: ids, at least one (an empty text starts from the tokenizer's `bos_id`).
        max_tokens: number of ids to yield.
        temperature, top_k, top_p, min_p: as in `Sampling`.
        key: PRNG key of the samples; None: that of seed 0.
        chunk_size: tokens of the prompt that are read at once; a power of two of at least 16.

    Raises:
        ValueError: for an empty prompt, or numbers out of range.
    """
    vocab_size = model.config.vocab_size
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}; it must be between 1 and the vocabulary's {vocab_size}")
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    options = _check(model, [prompt], max_tokens, [sampling], chunk_size)
    if key is not None:
        data = jax.random.key_data(key)
        # Generators with larger keys give two words of their own.
        options = options.replace(
            key=(data if data.shape == (2,) else jax.random.bits(key, (2,)))[None]
        )
    return (row[0] for row in _batches(model, [prompt], max_tokens, options, chunk_size))


def generate_batch(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling | Sequence[Sampling] = DEFAULT,
    eos_id: int | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> Iterator[list[int | None]]:
    """Yields the next id of every stream, side by side, until all have ended.

    A prompt of any length gives what it gives alone: it is never padded, and draws depend on the
    stream's own seed and token number only. Streams of the same seed and prompt draw the same.

    Args:
        model: a language model.
        prompts: ids of each stream, at least one.
        max_tokens: most ids of a stream.
        sampling: of all streams, or of each.
        eos_id: the id after which a stream has ended; None: only `max_tokens` ends it.
        chunk_size: tokens of the prompts that are read at once; a power of two of at least 16.

    Yields:
        One entry per stream, None for those that have ended.

    Raises:
        ValueError: no prompt or an empty one, or numbers out of range.
    """
    if isinstance(sampling, Sampling):
        sampling = [sampling] * len(prompts)
    if len(sampling) != len(prompts):
        raise ValueError(
            f"sampling has {len(sampling)} entries for {len(prompts)} prompts; give one for all, "
            "or one for each"
        )
    options = _check(model, prompts, max_tokens, sampling, chunk_size)
    return _until(_batches(model, prompts, max_tokens, options, chunk_size), len(prompts), eos_id)


def _check(model, prompts, max_tokens, sampling, chunk_size) -> SamplingArrays:
    if not prompts:
        raise ValueError("prompts is empty: give at least one")
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("prompt is empty: start with the tokenizer's bos_id")
    if max_tokens < 0:
        raise ValueError(f"max_tokens={max_tokens}; it must be at least 0")
    for each in sampling:
        check_vocabulary(each, model.config.vocab_size)
    check_chunk(chunk_size)
    return SamplingArrays.of(sampling)


def _batches(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    options: SamplingArrays,
    chunk_size: int,
) -> Iterator[list[int]]:
    graphdef, params = nnx.split(model)
    calls = -(-max_tokens // _STRIDE)
    longest = max(map(len, prompts)) + calls * _STRIDE
    streams = new_streams(model, len(prompts), max_length=room(longest))
    streams = read_prompts(graphdef, params, streams, prompts, chunk_size=chunk_size)
    for call in range(calls):
        tokens, streams = decode(graphdef, params, streams, options, steps=_STRIDE)
        yield from np.asarray(tokens)[: max_tokens - call * _STRIDE].tolist()


def _until(rows: Iterator[list[int]], width: int, eos_id: int | None) -> Iterator[list[int | None]]:
    ended = [False] * width
    for row in rows:
        shown = [None if over else token for over, token in zip(ended, row, strict=True)]
        yield shown
        ended = [over or token == eos_id for over, token in zip(ended, row, strict=True)]
        if all(ended):
            return
