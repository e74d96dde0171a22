"""Residual blocks, and stacks of them whose sequence mixers follow a repeating pattern.

`StackConfig.pattern` names the mixers, for every name in `MIXERS`. The blocks of one period of the
pattern are stacked over the periods and scanned, so compile time does not grow with depth.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from swr_jax.nn.attention import SlidingWindowAttention
from swr_jax.nn.feedforward import ACTIVATIONS, SwiGLU, rms_norm
from swr_jax.nn.gated_delta import GatedDeltaNet
from swr_jax.nn.mlstm import MLSTM
from swr_jax.nn.phalanx import Phalanx
from swr_jax.nn.rotary import RopeScaling

# What the backward pass finds stored of a period of blocks; the rest it computes again.
REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,  # everything stored, nothing computed again
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # results of projections
    "full": jax.checkpoint_policies.nothing_saveable,  # only what enters the period
}


@dataclass(frozen=True)
class PhalanxConfig:
    """Options of the "phalanx" mixer, with the meaning that `Phalanx` gives them."""

    head_dim: int = 16
    num_gate_heads: int | None = None
    block_size: int = 16
    lookback: int | None = 1
    global_heads: int = 0
    decay_max: float = 1.0
    fixed_decay: float | None = None
    pre_gate: bool = True
    post_gate: bool = True
    gate_activation: str | None = None


@dataclass(frozen=True)
class MLSTMConfig:
    """Options of the "mlstm" mixer, with the meaning that `MLSTM` gives them."""

    num_heads: int = 4
    qk_dim_factor: float = 0.5
    v_dim_factor: float = 1.0
    gate_soft_cap: float | None = 15.0
    head_norm: str = "layer"
    input_gate: str = "exp"
    chunk_size: int = 128


@dataclass(frozen=True)
class GatedDeltaConfig:
    """Options of the "gated_delta" mixer, with the meaning that `GatedDeltaNet` gives them."""

    num_heads: int = 4
    head_dim: int | None = None
    expand_v: float = 2.0
    conv_size: int = 4
    chunk_size: int = 64


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """Everything that decides the shape and the arithmetic of a stack of blocks.

    Raises:
      ValueError: a value out of range, or values that do not fit together.
    """

    # Model width M.
    features: int
    # Number of blocks, each a mixer and a feed-forward network; a multiple of len(pattern).
    depth: int
    # Mixer of each block of one period: names in MIXERS.
    pattern: tuple[str, ...] = ("phalanx", "attention")
    # Query heads of "attention" and "swa"; their features must be even.
    num_heads: int = 8
    # Features per head of "attention" and "swa"; None: features / num_heads.
    head_dim: int | None = None
    # Key/value heads of "attention" and "swa", a divisor of num_heads; None: num_heads.
    num_kv_heads: int | None = None
    # Tokens that "swa" sees, the current one included.
    window: int = 512
    # Whether queries, keys and values of "attention" and "swa" have biases.
    qkv_bias: bool = False
    # Whether their last projections have.
    output_bias: bool = False
    # Whether they put every head's queries and keys through an RMSNorm before rotating them.
    qk_norm: bool = False
    # What their logits are multiplied by; None: head_dim ** -0.5.
    attention_scale: float | None = None
    # Their logits become cap * tanh(logits / cap) before the softmax; None: left alone.
    attention_soft_cap: float | None = None
    # Hidden width of the feed-forward networks; None: mlp_ratio * features, rounded up to 64.
    mlp_features: int | None = None
    # Used where mlp_features is None: 8/3 makes SwiGLU's three matrices weigh 8 M^2.
    mlp_ratio: float = 8 / 3
    # What the gates of the feed-forward networks go through: a name in ACTIVATIONS.
    mlp_activation: str = "silu"
    # Whether the feed-forward networks have biases.
    mlp_bias: bool = False
    # Options of the "phalanx" mixer.
    phalanx: PhalanxConfig = field(default_factory=PhalanxConfig)
    # Options of the "mlstm" mixer, its own number of heads among them.
    mlstm: MLSTMConfig = field(default_factory=MLSTMConfig)
    # Options of the "gated_delta" mixer, likewise.
    gated_delta: GatedDeltaConfig = field(default_factory=GatedDeltaConfig)
    # Base of the wavelengths of the rotary embedding.
    rope_base: float = 10_000.0
    # The same for "swa" alone, which then is not scaled either; None: as "attention".
    rope_local_base: float | None = None
    # How frequencies of the rotary embedding are slowed down for long sequences; None: not at all.
    rope_scaling: RopeScaling | None = None
    # Whether an RMSNorm follows each mixer and feed-forward network too, before what it adds.
    post_norms: bool = False
    # RMSNorms of blocks, heads' queries and keys multiply by it plus their scale; Gemma's is 1.
    norm_offset: float = 0.0
    # Added to the mean square in every RMSNorm, to the variance in the norm of mLSTM's heads.
    norm_epsilon: float = 1e-6
    # What the backward pass computes again: a name in REMAT_POLICIES.
    remat: str = "none"
    # Dtype of activations; norms, rotary angles, softmax and recurrences stay float32.
    dtype: DTypeLike = "float32"
    # Dtype of parameters.
    param_dtype: DTypeLike = "float32"

    def __post_init__(self):
        # Lists from config files and any spelling of a dtype become the canonical value.
        object.__setattr__(self, "pattern", tuple(self.pattern))
        for name in ("dtype", "param_dtype"):
            dtype = jnp.dtype(getattr(self, name))
            if not jnp.issubdtype(dtype, jnp.floating):
                raise ValueError(f"{name}={dtype.name!r}; it must be a floating dtype")
            object.__setattr__(self, name, dtype)
        for name in ("features", "depth", "num_heads", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; it must be at least 1")
        if not self.pattern or any(name not in MIXERS for name in self.pattern):
            raise ValueError(
                f"pattern={self.pattern}; it must hold at least one name, each one of "
                f"{', '.join(sorted(MIXERS))}"
            )
        if self.depth % len(self.pattern):
            raise ValueError(
                f"depth={self.depth} is not a multiple of the {len(self.pattern)} mixers of "
                f"pattern={self.pattern}; choose a depth that the pattern fills"
            )
        if self.mlp_features is not None and self.mlp_features < 1:
            raise ValueError(f"mlp_features={self.mlp_features}; it must be at least 1, or None")
        if self.head_dim is not None and (self.head_dim < 2 or self.head_dim % 2):
            raise ValueError(
                f"head_dim={self.head_dim}; it must be even and at least 2, or None for features / "
                "num_heads"
            )
        for name in ("attention_scale", "attention_soft_cap", "rope_local_base"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name}={value}; it must be above 0, or None")
        if self.mlp_activation not in ACTIVATIONS:
            raise ValueError(
                f"mlp_activation={self.mlp_activation!r}; it must be one of "
                f"{', '.join(ACTIVATIONS)}"
            )
        if self.mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio={self.mlp_ratio}; it must be above 0")
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat={self.remat!r}; it must be one of {', '.join(REMAT_POLICIES)}")

    @property
    def hidden_features(self) -> int:
        """Hidden width of the feed-forward networks."""
        if self.mlp_features is not None:
            return self.mlp_features
        # Less a hair, so that 8/3 of a multiple of 24 does not round up to the next 64.
        return 64 * math.ceil(self.mlp_ratio * self.features / 64 - 1e-6)

    @property
    def heads_features(self) -> int:
        """Features of all query heads of "attention" and "swa" together."""
        return self.features if self.head_dim is None else self.num_heads * self.head_dim

    @property
    def num_periods(self) -> int:
        """How often the stack repeats its pattern."""
        return self.depth // len(self.pattern)


def _options(config: StackConfig, rngs: nnx.Rngs) -> dict[str, Any]:
    return {"dtype": config.dtype, "param_dtype": config.param_dtype, "rngs": rngs}


def _attention(config: StackConfig, window: int | None, rngs: nnx.Rngs) -> nnx.Module:
    local = window is not None and config.rope_local_base is not None
    return SlidingWindowAttention(
        config.features,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        window=window,
        rope_base=config.rope_local_base if local else config.rope_base,
        rope_scaling=None if local else config.rope_scaling,
        use_bias=config.output_bias,
        qkv_bias=config.qkv_bias,
        qk_norm=config.qk_norm,
        norm_epsilon=config.norm_epsilon,
        norm_offset=config.norm_offset,
        scale=config.attention_scale,
        logits_soft_cap=config.attention_soft_cap,
        **_options(config, rngs),
    )


def _phalanx(config: StackConfig, rngs: nnx.Rngs) -> nnx.Module:
    return Phalanx(config.features, **vars(config.phalanx), **_options(config, rngs))


def _mlstm(config: StackConfig, rngs: nnx.Rngs) -> nnx.Module:
    return MLSTM(
        config.features,
        **vars(config.mlstm),
        num_blocks=config.depth,
        norm_epsilon=config.norm_epsilon,
        **_options(config, rngs),
    )


def _gated_delta(config: StackConfig, rngs: nnx.Rngs) -> nnx.Module:
    return GatedDeltaNet(
        config.features,
        **vars(config.gated_delta),
        norm_epsilon=config.norm_epsilon,
        **_options(config, rngs),
    )


# Makes the mixer of a block from the configuration. A mixer maps x [B, T, M] to [B, T, M], keeps
# the state protocol of `SlidingWindowAttention`, and calls its last projection `output`. One whose
# state is large may have `advance` and `absorb`, for a call in two steps: see there.
MIXERS: dict[str, Callable[[StackConfig, nnx.Rngs], nnx.Module]] = {
    "attention": lambda config, rngs: _attention(config, None, rngs),
    "swa": lambda config, rngs: _attention(config, config.window, rngs),
    "phalanx": _phalanx,
    "mlstm": _mlstm,
    "gated_delta": _gated_delta,
}

# Mixers whose published initialisation already makes the last projection smaller with depth.
_SCALED_BY_ITSELF = frozenset({"mlstm"})


class Block(nnx.Module):
    """Pre-norm residual block: x + mixer(norm(x)), then x + feed-forward(norm(x)).

    With `config.post_norms` what is added goes through another norm first.

    Both last projections start smaller by sqrt(2 * depth), so that the residual stream of the
    whole model has a variance that does not grow with depth; that of mLSTM starts as published,
    smaller by the depth.

    Args:
      config: the model's configuration.
      mixer: a name in `MIXERS`.
      rngs: source of the `params` keys.
    """

    def __init__(self, config: StackConfig, mixer: str, *, rngs: nnx.Rngs):
        dtypes = {"dtype": config.dtype, "param_dtype": config.param_dtype}
        norm = {
            "epsilon": config.norm_epsilon,
            "offset": config.norm_offset,
            **dtypes,
            "rngs": rngs,
        }
        self.mixer_norm = rms_norm(config.features, **norm)
        self.mixer = MIXERS[mixer](config, rngs)
        self.mlp_norm = rms_norm(config.features, **norm)
        self.mlp = SwiGLU(
            config.features,
            config.hidden_features,
            activation=config.mlp_activation,
            use_bias=config.mlp_bias,
            **dtypes,
            rngs=rngs,
        )
        self.post_norms = config.post_norms
        if config.post_norms:
            self.mixer_post_norm = rms_norm(config.features, **norm)
            self.mlp_post_norm = rms_norm(config.features, **norm)
        last = [self.mlp.down]
        if mixer not in _SCALED_BY_ITSELF:
            last.append(self.mixer.output)
        for projection in last:
            projection.kernel[...] = projection.kernel[...] * (2 * config.depth) ** -0.5

    def __call__(self, x, *, positions=None, segment_ids=None, state):
        """Apply the block to x [B, T, M]; returns it and what `absorb` takes, None without."""
        options = {"positions": positions, "segment_ids": segment_ids}
        mixed = self.mixer_norm(x)
        if state is None:
            mixed = self.mixer(mixed, **options)
        else:
            advance = getattr(self.mixer, "advance", self.mixer)
            mixed, state = advance(mixed, **options, state=state)
        x = x + (self.mixer_post_norm(mixed) if self.post_norms else mixed)
        added = self.mlp(self.mlp_norm(x))
        return x + (self.mlp_post_norm(added) if self.post_norms else added), state

    def absorb(self, state, added):
        """Make the mixer's new state of the old one and what a call returned beside its output."""
        absorb = getattr(self.mixer, "absorb", None)
        return added if absorb is None else absorb(state, added)


def make_periods(config: StackConfig, *, rngs: nnx.Rngs) -> nnx.List:
    """Make the blocks of one period of the pattern, each stacked over the periods.

    Every parameter has a leading axis of `config.num_periods`, whose logical name is "layers".
    """

    @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
    def periods(key):
        layer_rngs = nnx.Rngs(params=key)
        return nnx.List([Block(config, mixer, rngs=layer_rngs) for mixer in config.pattern])

    return periods(jax.random.split(rngs.params(), config.num_periods))


def init_periods_state(
    periods: nnx.List, config: StackConfig, batch: int, *, max_length: int | None
) -> tuple[Any, ...]:
    """Make the state of all blocks before any token.

    Args:
      periods: what `make_periods` returned.
      config: the stack's configuration.
      batch: number of streams B.
      max_length: tokens that a stream may reach; only "attention" needs it.

    Returns:
      A tuple over the pattern of mixer states, each stacked over the periods.
    """
    state = tuple(block.mixer.init_state(batch, max_length=max_length) for block in periods)
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (config.num_periods, *x.shape)), state)


def apply_periods(
    periods: nnx.List,
    config: StackConfig,
    x: jax.Array,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    state: Any = None,
) -> tuple[jax.Array, Any]:
    """Apply all blocks to x [B, T, M], one period after the other in a scan.

    Args:
      periods: what `make_periods` returned.
      config: the stack's configuration.
      x: [B, T, M].
      positions: [B, T] int32, position within the document.
      segment_ids: [B, T] int32; tokens of different segments never see each other.
      state: what `init_periods_state` or an earlier call returned, to continue a stream.

    Returns:
      [B, T, M], and the new state; without a state the second has no meaning.
    """
    definition, variables = nnx.split(periods)

    def apply_period(x, variables_and_state):
        variables, states = variables_and_state
        blocks = nnx.merge(definition, variables)
        states = [None] * len(blocks) if states is None else states
        added = []
        for block, block_state in zip(blocks, states, strict=True):
            x, of_block = block(x, positions=positions, segment_ids=segment_ids, state=block_state)
            added.append(of_block)
        return x, tuple(added)

    if (policy := REMAT_POLICIES[config.remat]) is not None:
        # Inside a scan XLA cannot merge the two computations, so no barrier is needed.
        apply_period = jax.checkpoint(apply_period, policy=policy, prevent_cse=False)
    x, added = jax.lax.scan(apply_period, x, (variables, state))
    if state is None:
        return x, added
    # Out here, where a large state is one array, which is written to in place.
    return x, tuple(
        None if old is None else jax.vmap(block.absorb)(old, new)
        for block, old, new in zip(periods, state, added, strict=True)
    )
