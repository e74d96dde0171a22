"""The 1:1 Phalanx hybrid, small enough to train on a laptop's CPU in a few minutes."""

from configs import default
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The shared defaults as they are: a mixer in two is Phalanx, the other full attention."""
    config = default.get_config()
    config.model.pattern = ("phalanx", "attention")
    return config
