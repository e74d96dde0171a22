"""Flax NNX layers and models."""

from swr_jax.nn.attention import SlidingWindowAttention
from swr_jax.nn.blocks import GatedDeltaConfig, MLSTMConfig, PhalanxConfig
from swr_jax.nn.feedforward import SwiGLU, rms_norm
from swr_jax.nn.gated_delta import GatedDeltaNet
from swr_jax.nn.language_model import LanguageModel, LanguageModelConfig, num_parameters
from swr_jax.nn.mlstm import MLSTM
from swr_jax.nn.phalanx import Phalanx
from swr_jax.nn.rotary import RopeScaling
from swr_jax.nn.swap import swap_mixers
from swr_jax.nn.swax import SWAX

__all__ = [
    "MLSTM",
    "SWAX",
    "GatedDeltaConfig",
    "GatedDeltaNet",
    "LanguageModel",
    "LanguageModelConfig",
    "MLSTMConfig",
    "Phalanx",
    "PhalanxConfig",
    "RopeScaling",
    "SlidingWindowAttention",
    "SwiGLU",
    "num_parameters",
    "rms_norm",
    "swap_mixers",
]
