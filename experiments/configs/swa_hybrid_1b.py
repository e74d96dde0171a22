"""The hybrid that phalanx_1b is compared with: windows of 512 tokens in Phalanx's place."""

from configs import phalanx_1b
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """phalanx_1b with windowed and full attention in turn; text and tokenizer as there."""
    config = phalanx_1b.get_config()
    config.model.pattern = ("swa", "attention")
    config.model.window = 512
    return config
