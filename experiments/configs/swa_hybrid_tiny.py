"""The hybrid that phalanx_tiny is compared with: sliding-window attention in Phalanx's place."""

from configs import default
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The shared defaults with windowed and full attention in turn."""
    config = default.get_config()
    config.model.pattern = ("swa", "attention")
    config.model.window = 64  # tokens, a quarter of a row
    return config
