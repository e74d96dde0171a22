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

from configs import default
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Width 2048, 24 blocks, 16,384 tokens per row, 0.5 million tokens per update."""
    config = default.get_config()
    config.steps = 286_000  # 150 billion tokens
    config.z_loss = 1e-4
    config.log_every = 20
    config.eval_every = 1000
    config.eval_batches = 16
    config.checkpoint_every = 1000
    config.keep_checkpoints = 3
    config.sample_prompt = "The "

    model = config.model
    model.vocab_size = 50_304
    model.tie_embeddings = False
    model.pattern = ("swa", "mlstm")
    model.features = 2048
    model.depth = 24
    model.num_heads = 16  # of 128 features each
    model.window = 2048
    model.mlstm.num_heads = 4  # of 256 features per key, 512 per value
    model.remat = "full"  # a row's activations do not fit otherwise
    model.dtype = "bfloat16"

    schedule = config.window_schedule
    schedule.sizes = (128, 2048)
    schedule.probabilities = (0.5, 0.5)

    data = config.data
    data.source = "data/fineweb_edu"
    data.tokenizer = "data/tokenizer.json"
    data.sequence_length = 16_384
    data.batch_size = 32
    data.validation_fraction = 0.001

    optimizer = config.optimizer
    optimizer.learning_rate = 3e-4
    optimizer.warmup_steps = 2000

    # Parameters and optimizer state are spread over all devices.
    config.mesh.data = 1
    config.mesh.fsdp = -1
    return config
