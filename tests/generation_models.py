"""Small models that the tests of generation share, and what a full forward pass says of them."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from swr_jax.nn.language_model import LanguageModel, LanguageModelConfig

VOCABULARY = 259


@functools.cache
def make_model(*pattern: str, seed: int = 3, window: int = 7, features: int = 32) -> LanguageModel:
    config = LanguageModelConfig(
        vocab_size=VOCABULARY,
        features=features,
        depth=2,
        pattern=pattern,
        num_heads=2,
        window=window,
    )
    return LanguageModel(config, rngs=nnx.Rngs(seed))


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, length).tolist() for length in lengths]


def likeliest(model: LanguageModel, rows: Sequence[tuple[list[int], list[int]]]) -> list[list[int]]:
    """The argmax of one pass over prompt and answer, in every place of each answer.

    The model is causal, so what pads the rows at their end changes nothing.
    """
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    padded = np.zeros((len(rows), longest), np.int32)
    for tokens, (prompt, answer) in zip(padded, rows, strict=True):
        tokens[: len(prompt) + len(answer)] = [*prompt, *answer]
    graphdef, params = nnx.split(model)
    forward = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens))
    best = np.argmax(np.asarray(forward(params, padded)), axis=-1)
    return [
        row[len(prompt) - 1 : len(prompt) + len(answer) - 1].tolist()
        for row, (prompt, answer) in zip(best, rows, strict=True)
    ]
