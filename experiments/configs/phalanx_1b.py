"""The 1:1 Phalanx hybrid of 1.3 billion parameters, for GPUs and TPUs.

Needs a tokenizer and text: --config.data.tokenizer=tokenizer.json --config.data.source=FOLDER
(FineWeb-Edu's Parquet files, say, or better the token records that experiments/prepare_data.py
makes of them).
"""

from configs import default
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Width 2048, 24 blocks, 8192 tokens per row, 0.5 million tokens per update."""
    config = default.get_config()
    config.steps = 190_000  # 100 billion tokens
    config.z_loss = 1e-4
    config.log_every = 20
    config.eval_every = 1000
    config.eval_batches = 16
    config.checkpoint_every = 1000
    config.keep_checkpoints = 3
    config.sample_prompt = "The "

    model = config.model
    model.pattern = ("phalanx", "attention")
    model.features = 2048
    model.depth = 24
    model.num_heads = 16  # of 128 features each
    model.rope_base = 500_000.0  # for rows of thousands of tokens
    model.remat = "full"  # a row's activations do not fit otherwise
    model.dtype = "bfloat16"

    data = config.data
    data.source = "data/fineweb_edu"
    data.tokenizer = "data/tokenizer.json"
    data.sequence_length = 8192
    data.batch_size = 64
    data.validation_fraction = 0.001

    optimizer = config.optimizer
    optimizer.learning_rate = 3e-4
    optimizer.warmup_steps = 2000

    # Parameters and optimizer state are spread over all devices.
    config.mesh.data = 1
    config.mesh.fsdp = -1
    return config
