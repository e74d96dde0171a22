"""SWAX of 1.4 billion parameters: windowed attention and mLSTM in turn, with stochastic windows.

Shape and schedule of arXiv 2509.24552: 24 mixers at width 2048, no global attention; windows of
128 or 2048 tokens, drawn for each batch, 2048 in the last tenth. Not published, and assumed here:
the vocabulary, 50,304 tokens with separate embedding and output matrices as in xLSTM-7B (with these
the parameters are 1.42 billion; tied they would be 1.32), attention heads of 128 features, four
mLSTM heads as in the xLSTM of this size, attention before mLSTM, and half a million tokens per
update.

Needs a tokenizer of at most that vocabulary, and text:
--config.data.tokenizer=tokenizer.json --config.data.source=FOLDER
"""

from configs import phalanx_1b
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """phalanx_1b with other mixers, 16,384 tokens per row, 0.5 million tokens per update."""
    config = phalanx_1b.get_config()
    config.steps = 286_000  # 150 billion tokens

    model = config.model
    model.vocab_size = 50_304
    model.tie_embeddings = False
    model.pattern = ("swa", "mlstm")
    model.window = 2048
    model.rope_base = 10_000.0  # no attention reaches further than its window
    model.mlstm.num_heads = 4  # of 256 features per key, 512 per value

    schedule = config.window_schedule
    schedule.sizes = (128, 2048)
    schedule.probabilities = (0.5, 0.5)

    config.data.sequence_length = 16_384
    config.data.batch_size = 32
    return config
