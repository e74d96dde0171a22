"""Rotary position embedding, and how its frequencies are slowed down for long sequences."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

SCALINGS = ("linear", "llama3")


@dataclass(frozen=True)
class RopeScaling:
    """How the frequencies of a rotary embedding are slowed down, as in published checkpoints.

    Raises:
      ValueError: a value out of range, or values that do not fit together.
    """

    # "linear": every frequency is divided by the factor (arXiv 2306.15595). "llama3": only those
    # that turn less than low_frequency_factor times within original_length tokens, those that turn
    # more than high_frequency_factor times stay, and in between one goes over into the other
    # (Llama 3.1, arXiv 2407.21783).
    kind: str
    # What frequencies are divided by.
    factor: float
    # Of "llama3" only, as are the two that follow.
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    # Tokens per sequence before the stretch.
    original_length: int = 8192

    def __post_init__(self):
        if self.kind not in SCALINGS:
            raise ValueError(f"kind={self.kind!r}; it must be one of {', '.join(SCALINGS)}")
        for name in ("factor", "low_frequency_factor", "original_length"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}; it must be above 0")
        if not self.high_frequency_factor > self.low_frequency_factor:
            raise ValueError(
                f"high_frequency_factor={self.high_frequency_factor}; it must be above "
                f"low_frequency_factor={self.low_frequency_factor}"
            )


def rotary_frequencies(head_dim: int, *, base: float, scaling: RopeScaling) -> np.ndarray:
    """Angles per token of the pairs of features, scaled: float64 [head_dim / 2]."""
    half = head_dim // 2
    frequency = base ** (-np.arange(half, dtype=np.float64) / half)
    slow = frequency / scaling.factor
    if scaling.kind == "linear":
        return slow
    turns = scaling.original_length * frequency / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept * frequency + (1 - kept) * slow


def rotary_embedding(
    x: jax.Array,
    positions: jax.Array,
    *,
    base: float = 10_000.0,
    scaling: RopeScaling | None = None,
) -> jax.Array:
    """Turn pairs of features by angles proportional to the position (arXiv 2104.09864).

    Feature i is paired with feature i + Dh / 2 and turned by position * base ** (-2 i / Dh), or as
    `scaling` changes that. Computed in float32.

    Args:
      x: queries or keys [B, T, N, Dh], Dh even.
      positions: [B, T] int32.
      base: wavelength base.
      scaling: of the frequencies; None: none.

    Returns:
      [B, T, N, Dh], dtype of `x`.
    """
    half = x.shape[-1] // 2
    if scaling is None:
        frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    else:
        frequency = jnp.asarray(
            rotary_frequencies(x.shape[-1], base=base, scaling=scaling), jnp.float32
        )
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    out = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return out.astype(x.dtype)
