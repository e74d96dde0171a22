"""Sliding-window recurrences in JAX: operators, Flax NNX layers and a sharded trainer."""

from swr_jax import nn, ops
from swr_jax.ops import *  # noqa: F403
from swr_jax.ops import __all__ as _operators

__version__ = "0.1.0"
__all__ = ["nn", "ops", *_operators]
