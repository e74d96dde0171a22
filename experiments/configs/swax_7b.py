"""SWAX of 7 billion parameters: swax_1b, wider and deeper, with more of the short windows.

32 mixers at width 4096 and three short windows in four, as in arXiv 2509.24552; eight mLSTM heads
as in xLSTM-7B. The vocabulary and what else is not published are assumed as in swax_1b: with
50,304 tokens in separate embedding and output matrices the parameters are 6.86 billion.
"""

from configs import swax_1b
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Width 4096, 32 blocks; text, tokenizer and the number of tokens as for swax_1b."""
    config = swax_1b.get_config()
    model = config.model
    model.features = 4096
    model.depth = 32
    model.num_heads = 32  # of 128 features each
    model.mlstm.num_heads = 8  # of 256 features per key, 512 per value

    config.window_schedule.probabilities = (0.75, 0.25)
    return config
