"""xLSTM of the size of swax_1b, the baseline without attention: every mixer is mLSTM.

24 blocks at width 2048 with four heads, as published (arXiv 2503.13427), and the soft cap on the
logits that its 7-billion-parameter model has. Vocabulary as assumed for swax_1b: 50,304 tokens in
separate embedding and output matrices, 1.42 billion parameters altogether.
"""

from configs import swax_1b
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """swax_1b with mLSTM throughout; text and tokenizer as there."""
    config = swax_1b.get_config()
    config.model.pattern = ("mlstm",)
    config.model.logits_soft_cap = 30.0
    # No windows, so none to draw.
    config.window_schedule.sizes = ()
    config.window_schedule.probabilities = ()
    return config
