"""Transformer++ of the size of phalanx_tiny: every mixer is full attention."""

from configs import default
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The shared defaults with attention throughout."""
    config = default.get_config()
    config.model.pattern = ("attention",)
    return config
