"""How a token is drawn from logits: options of a stream, and one function for many streams."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

_SEEDS = 2**63  # seeds are below this, so that they are whole numbers anywhere, JSON included


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the tokens of one stream are drawn; filters apply after the temperature, together.

    Attributes:
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: only the so many likeliest tokens; None: all.
        top_p: in (0, 1], only the likeliest tokens that together reach this probability, among
            those that `top_k` leaves; 1: all.
        min_p: in [0, 1], only tokens of at least this share of the likeliest one's probability;
            0: all.
        seed: token number n of a stream is drawn with a key that the seed and n alone decide.

    Raises:
        ValueError: a value out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self):
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(
                f"temperature={self.temperature}; it must be at least 0 (0: likeliest token)"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}; it must be at least 1, or None for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}; it must be above 0 and at most 1 (1: all)")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p}; it must be between 0 (all tokens) and 1")
        if not 0 <= self.seed < _SEEDS:
            raise ValueError(f"seed={self.seed}; it must be between 0 and 2**63 - 1")


DEFAULT = Sampling()
GREEDY = Sampling(temperature=0.0)


class SamplingArrays(struct.PyTreeNode):
    """The same for B streams, as arrays: one compiled step serves all values."""

    temperature: jax.Array  # [B] float32
    top_k: jax.Array  # [B] int32, 0 for all
    top_p: jax.Array  # [B] float32
    min_p: jax.Array  # [B] float32
    key: jax.Array  # [B, 2] uint32, data of each stream's PRNG key

    @classmethod
    def of(cls, streams: Sequence[Sampling]) -> "SamplingArrays":
        """Make the arrays of these streams."""

        def column(values: list, dtype: type) -> np.ndarray:
            return np.array(values, dtype)

        return cls(
            temperature=column([s.temperature for s in streams], np.float32),
            top_k=column([min(s.top_k or 0, 2**31 - 1) for s in streams], np.int32),
            top_p=column([s.top_p for s in streams], np.float32),
            min_p=column([s.min_p for s in streams], np.float32),
            key=column([(s.seed >> 32, s.seed & 0xFFFFFFFF) for s in streams], np.uint32),
        )


def sample(logits: jax.Array, options: SamplingArrays, drawn: jax.Array) -> jax.Array:
    """Draw the next token of every stream; what one draws depends on nothing of the others.

    Maths in float32. Noise belongs to token ids, and filters only forbid ids, so a stream draws
    the same whatever filters its neighbours need. What no stream needs is not computed.

    Args:
        logits: [B, V] float32.
        options: of B streams.
        drawn: [B] int32, tokens that each has drawn before.

    Returns:
        [B] int32.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    draws = options.temperature > 0
    filters = (options.top_k > 0) | (options.top_p < 1) | (options.min_p > 0)

    def drawn_tokens() -> jax.Array:
        # First the largest becomes 0, which the smallest temperature does not make infinite.
        scaled = logits - jnp.max(logits, axis=-1, keepdims=True)
        scaled = scaled / jnp.where(draws, options.temperature, 1)[:, None]
        allowed = jax.lax.cond(
            jnp.any(draws & filters),
            lambda: _allowed(scaled, options),
            lambda: jnp.ones(scaled.shape, bool),
        )

        def noise(key: jax.Array, number: jax.Array) -> jax.Array:
            key = jax.random.wrap_key_data(key, impl="threefry2x32")
            return jax.random.gumbel(jax.random.fold_in(key, number), logits.shape[-1:])

        noisy = jnp.where(allowed, scaled + jax.vmap(noise)(options.key, drawn), -jnp.inf)
        return jnp.where(draws, jnp.argmax(noisy, axis=-1).astype(jnp.int32), greedy)

    return jax.lax.cond(jnp.any(draws), drawn_tokens, lambda: greedy)


def _allowed(scaled: jax.Array, options: SamplingArrays) -> jax.Array:
    """Which tokens [B, V] the filters leave, of logits whose largest is 0."""
    vocabulary = scaled.shape[-1]
    values, order = jax.lax.top_k(scaled, vocabulary)  # sorted, the smaller id first among equals
    rank = jnp.arange(vocabulary)
    top_k = jnp.where(options.top_k > 0, options.top_k, vocabulary)[:, None]
    kept = rank < top_k
    probability = jax.nn.softmax(jnp.where(kept, values, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # 1 keeps all: a sum of rounded probabilities may reach 1 before its end.
    kept &= (before < options.top_p[:, None]) | (options.top_p >= 1)[:, None]
    kept &= values >= jnp.log(options.min_p)[:, None]
    rows = jnp.arange(scaled.shape[0])[:, None]
    return jnp.zeros(scaled.shape, bool).at[rows, order].set(kept | (rank == 0))


def check_vocabulary(options: Sampling, vocab_size: int) -> None:
    """Raise ValueError for a `top_k` that a vocabulary does not have."""
    if options.top_k is not None and options.top_k > vocab_size:
        raise ValueError(
            f"top_k={options.top_k}; it must be between 1 and the vocabulary's {vocab_size}"
        )
