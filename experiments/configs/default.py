"""What all configurations share; each file beside this one changes what makes its model."""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference


def optional(value: Any) -> FieldReference:
    """A value that may also be None, in overrides too: --config.model.phalanx.lookback=None."""
    return FieldReference(value, field_type=object)


def get_config() -> ConfigDict:
    """A small byte-level model on the text that comes with Python: trains on a laptop's CPU."""
    config = ConfigDict()

    # --- run ---------------------------------------------------------------------------------
    config.steps = 300  # optimizer updates
    config.seed = 0  # of the initial parameters and of sampling; the data has its own
    config.accumulation = 1  # micro-batches per update: more of them need less memory
    config.z_loss = 0.0  # weight of (log Z)^2 in the loss; 1e-4 keeps bfloat16 logits small
    config.log_every = 10  # steps between metrics lines
    config.eval_every = 100  # steps between evaluations on the validation split
    config.eval_batches = 16  # batches of the validation split, always the same ones
    config.checkpoint_every = 100  # steps between checkpoints; there is always one at the end
    config.keep_checkpoints = 2  # older ones are deleted
    config.sample_prompt = "def "  # text that the sample at the end continues
    config.sample_tokens = 300  # its length; 0 for no sample
    config.sample_temperature = 0.8  # below 1 likelier text, 0 the likeliest token always

    # --- model -------------------------------------------------------------------------------
    config.model = model = ConfigDict()
    model.vocab_size = optional(None)  # None: as many ids as the tokenizer has
    model.features = 128  # width of the residual stream
    model.depth = 4  # blocks, each one mixer and one feed-forward network
    model.pattern = ("phalanx", "attention")  # mixers, repeated over the depth
    model.num_heads = 4  # attention heads
    model.num_kv_heads = optional(None)  # None: num_heads; fewer share keys and values
    model.head_dim = optional(None)  # features per attention head; None: features / num_heads
    model.window = 64  # tokens that "swa" sees, its own included
    model.qkv_bias = False  # biases of attention's queries, keys and values
    model.output_bias = False  # bias of attention's last projection
    model.qk_norm = False  # RMSNorm of every head's queries and keys
    model.attention_scale = optional(None)  # of attention's logits; None: head_dim ** -0.5
    model.attention_soft_cap = optional(None)  # like logits_soft_cap, of attention's logits
    model.mlp_ratio = 8 / 3  # feed-forward width over features, rounded up to a multiple of 64
    model.mlp_features = optional(None)  # feed-forward width itself; None: by the ratio
    model.mlp_activation = "silu"  # of the feed-forward gates; or "gelu", "gelu_tanh"
    model.mlp_bias = False  # biases of the feed-forward networks
    model.tie_embeddings = True  # one matrix for embedding and output
    model.logits_soft_cap = optional(None)  # cap * tanh(logits / cap); None: logits as they are
    model.embedding_scale = 1.0  # what embedded tokens are multiplied by
    model.rope_base = 10_000.0  # longest wavelength of the rotary embedding, roughly
    model.rope_local_base = optional(None)  # the same for "swa" alone
    model.rope_scaling = optional(None)  # options of RopeScaling, as a dictionary; None: none
    model.post_norms = False  # RMSNorm after each mixer and feed-forward network too
    model.norm_offset = 0.0  # norms multiply by it plus their scale
    model.norm_epsilon = 1e-6  # added to the mean square in RMSNorm
    model.remat = "none"  # recomputed in the backward pass: "none", "dots" or "full"
    model.dtype = "float32"  # of activations; "bfloat16" on GPUs and TPUs
    model.param_dtype = "float32"  # of parameters and optimizer state

    model.phalanx = phalanx = ConfigDict()
    phalanx.head_dim = 16  # features that share one decay
    phalanx.num_gate_heads = optional(None)  # None: a gate per head; fewer are shared
    phalanx.block_size = 16  # tokens per block of the sliding-window recurrence
    phalanx.lookback = optional(1)  # blocks before its own that a token sees; None: all
    phalanx.global_heads = 0  # heads that carry state over the whole sequence
    phalanx.decay_max = 1.0  # upper bound of the learned decay
    phalanx.fixed_decay = optional(None)  # the same decay always; None: a learned one
    phalanx.pre_gate = True  # gate before the recurrence
    phalanx.post_gate = True  # gate after it
    phalanx.gate_activation = optional(None)  # of the post-gate: not set, "silu" or "sigmoid"

    model.mlstm = mlstm = ConfigDict()
    mlstm.num_heads = 4  # heads, each with a matrix memory; attention has its own number
    mlstm.qk_dim_factor = 0.5  # width of queries and keys, all heads together, over features
    mlstm.v_dim_factor = 1.0  # width of values and output gate likewise
    mlstm.gate_soft_cap = optional(15.0)  # bound of the gates' pre-activations; None: none
    mlstm.head_norm = "layer"  # norm of each head's output: "layer" or "rms"
    mlstm.input_gate = "exp"  # or "sigmoid"
    mlstm.chunk_size = 128  # tokens taken at a time; changes speed, not results

    model.gated_delta = gated_delta = ConfigDict()
    gated_delta.num_heads = 4  # heads, each with a matrix memory
    gated_delta.head_dim = optional(None)  # features of a key; None: features / (2 num_heads)
    gated_delta.expand_v = 2.0  # features of a value over those of a key
    gated_delta.conv_size = 4  # tokens that the short convolutions see
    gated_delta.chunk_size = 64  # tokens that XLA takes at a time; changes no result

    # --- data --------------------------------------------------------------------------------
    config.data = data = ConfigDict()
    data.source = "python"  # Python's own library, or a file, folder or pattern
    data.kind = "auto"  # by suffix; or "text", "jsonl", "parquet", "arrayrecord"
    data.text_field = "text"  # field of JSON lines, column of Parquet
    data.more_sources = ()  # prepared folders to mix with source, as ("code/", "maths/")
    data.weights = ()  # of source and each of these: shares of the tokens, as (0.7, 0.2, 0.1)
    data.tokenizer = "bytes"  # or a tokenizer.json, or a SentencePiece .model
    data.verify = True  # compare a prepared folder with its SHA-256 before the first step
    data.sequence_length = 256  # tokens per row
    data.batch_size = 16  # rows per update, over all processes
    data.seed = 0  # of the order of documents
    data.validation_fraction = 0.05  # share of the documents held out
    data.shuffle_tokens = 1 << 22  # rows are shuffled among about so many tokens
    data.read_threads = 4  # threads that read and tokenise

    # --- optimizer: AdamW --------------------------------------------------------------------
    config.optimizer = optimizer = ConfigDict()
    optimizer.learning_rate = 3e-3  # at its peak, after the warm-up
    optimizer.warmup_steps = 30  # steps up to the peak; a cosine leads down from there
    optimizer.final_fraction = 0.1  # learning rate at the end, over the peak
    optimizer.beta1 = 0.9  # memory of the gradient
    optimizer.beta2 = 0.95  # memory of its square
    optimizer.epsilon = 1e-8  # added to the root of that
    optimizer.weight_decay = 0.1  # of matrices; norms, gates and biases have none
    optimizer.clip_norm = optional(1.0)  # longest gradient let through; None: any

    # --- window schedule: every update trains at a size drawn for it ---------------------------
    config.window_schedule = schedule = ConfigDict()
    schedule.option = "window"  # the model's option that is drawn; or "phalanx.block_size"
    schedule.sizes = ()  # tokens, as (128, 2048); the longest must be the model's; (): no draws
    schedule.probabilities = ()  # of each size, as (0.5, 0.5)
    schedule.anneal = "switch"  # at the end the longest always; "linear": ever more often
    schedule.anneal_fraction = 0.1  # share of the steps that count as the end

    # --- guard: updates with NaN, infinity or a spike of the loss -------------------------------
    config.guard = guard = ConfigDict()
    guard.action = "stop"  # "skip" leaves such an update out, "rollback" returns to a checkpoint
    guard.spike_factor = optional(None)  # a loss above so many times its average; None: none is
    guard.memory = 100  # updates that this average reaches back over
    guard.max_in_a_row = 10  # left out one after the other, before the run stops
    guard.max_rollbacks = 3  # returns in the whole run, before it stops

    # --- distillation: a model made of a trained one, with new mixers in the place of attention ---
    config.distill = distill = ConfigDict()
    distill.teacher = ""  # folder of the trained model's run; "": none, training from scratch
    distill.teacher_step = optional(None)  # of its newest checkpoint; None: any, kept when resumed
    distill.train = "new"  # what is updated: the "new" mixers or "all"
    distill.kept_rate = 0.1  # with "all": learning rate of what is the teacher's, over the new's
    distill.init = "average"  # how Phalanx starts: from attention's projections, or "fresh"
    distill.hidden = 10.0  # weight of the relative distance of new layers' outputs
    distill.logits = 1.0  # weight of the divergence of predictions
    distill.cross_entropy = 1.0  # weight of the ordinary loss
    distill.temperature = 1.0  # of predictions in the divergence

    # --- mesh: the product of the four is the number of devices --------------------------------
    config.mesh = mesh = ConfigDict()
    mesh.data = -1  # copies of the model; -1: as many as devices are left
    mesh.fsdp = 1  # devices that share the parameters of one copy, each with its own rows
    mesh.tensor = 1  # devices that share heads, feed-forward width and vocabulary
    mesh.sequence = 1  # devices that share every sequence
    return config
