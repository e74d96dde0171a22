"""SWAX with stochastic windows (arXiv 2509.24552), small enough for a laptop's CPU."""

from configs import default
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Windowed attention and mLSTM in turn; every update draws a window of 16 or of 256 tokens."""
    config = default.get_config()
    config.model.pattern = ("swa", "mlstm")
    config.model.window = 256  # that of evaluation: the longest of those drawn
    config.window_schedule.sizes = (16, 256)  # as far apart as the published 128 and 2048
    config.window_schedule.probabilities = (0.5, 0.5)
    config.data.sequence_length = 512
    config.data.batch_size = 8
    return config
