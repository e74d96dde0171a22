"""Transformer++ of the size of phalanx_1b: every mixer is full attention."""

from configs import phalanx_1b
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """phalanx_1b with attention throughout; text and tokenizer as there."""
    config = phalanx_1b.get_config()
    config.model.pattern = ("attention",)
    return config
