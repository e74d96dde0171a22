"""A decoder-only language model whose sequence mixers follow a repeating pattern.

`LanguageModelConfig.pattern` names the mixers: ("attention",) is Transformer++,
("phalanx", "attention") the one-to-one hybrid, and so on for every name in `MIXERS`. The blocks of
one period of the pattern are stacked over the periods and scanned, so compile time does not grow
with depth.

Sharding names. Every parameter carries one logical name per axis, to be mapped to mesh axes by
whoever places the model:

    abstract = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    with nnx.logical_axis_rules((("embed", "fsdp"), ("mlp", "tensor"), ...)):
        specs = nnx.get_partition_spec(nnx.state(abstract))   # a PartitionSpec per parameter

Without rules the specs hold the logical names themselves; `variable.out_sharding` is the same
tuple. Names: "vocab" (embedding rows), "embed" (model width), "heads" and "kv_heads" (all features
of all heads), "mlp" (hidden width), "layers" (leading axis of everything stacked over periods), and
None for an axis never worth splitting (norm scales). Rules must cover every name that appears.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from swr_jax.nn.blocks import StackConfig, apply_periods, init_periods_state, make_periods
from swr_jax.nn.common import linear, sharding_metadata
from swr_jax.nn.feedforward import rms_norm

_VOCABULARY_INIT = nnx.initializers.normal(stddev=0.02)


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig(StackConfig):
    """Everything that decides the shape and the arithmetic of a `LanguageModel`.

    Raises:
      ValueError: a value out of range, or values that do not fit together.
    """

    # Number of tokens V of the vocabulary.
    vocab_size: int
    # Whether the output projection is the embedding, transposed.
    tie_embeddings: bool = True
    # What embedded tokens are multiplied by before the first block, in `dtype`.
    embedding_scale: float = 1.0
    # Logits, always float32, become cap * tanh(logits / cap); None: left alone.
    logits_soft_cap: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size={self.vocab_size}; it must be at least 1")
        if not self.embedding_scale > 0:
            raise ValueError(f"embedding_scale={self.embedding_scale}; it must be above 0")
        if self.logits_soft_cap is not None and self.logits_soft_cap <= 0:
            raise ValueError(
                f"logits_soft_cap={self.logits_soft_cap}; it must be above 0, or None for no cap"
            )


class LanguageModel(nnx.Module):
    """Decoder-only language model: tokens in, logits of the next token out.

    Initialisation: kernels are truncated normal with variance 1 / fan-in (last projections of
    blocks smaller, see `Block`); embedding and unembedding are normal with standard deviation 0.02.
    That is small beside what the blocks add to the residual stream, on purpose: with a tied
    embedding at the blocks' own scale, the untrained model would predict its input token again
    with a logit of about sqrt(M). As it is, the first loss is close to log V, tied or not.

    Args:
      config: shape and arithmetic.
      rngs: source of the `params` keys.
    """

    def __init__(self, config: LanguageModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = nnx.Param(
            _VOCABULARY_INIT(
                rngs.params(), (config.vocab_size, config.features), config.param_dtype
            ),
            **sharding_metadata("vocab", "embed"),
        )
        self.periods = make_periods(config, rngs=rngs)
        self.norm = rms_norm(
            config.features,
            epsilon=config.norm_epsilon,
            offset=config.norm_offset,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        if not config.tie_embeddings:
            self.unembedding = linear(
                config.features,
                config.vocab_size,
                ("embed", "vocab"),
                kernel_init=_VOCABULARY_INIT,
                dtype=config.dtype,
                param_dtype=config.param_dtype,
                rngs=rngs,
            )

    def init_state(self, batch: int, *, max_length: int) -> Any:
        """Make the state before any token.

        Args:
          batch: number of streams B.
          max_length: tokens that a stream may reach, prompt included; only "attention" needs it.

        Returns:
          A tuple over the pattern of mixer states, each stacked over the periods.
        """
        return init_periods_state(self.periods, self.config, batch, max_length=max_length)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        state: Any = None,
    ) -> jax.Array | tuple[jax.Array, Any]:
        """Compute the logits of the token after each token.

        Args:
          tokens: [B, T] integers in [0, vocab_size).
          positions: [B, T] int32, position within the document, for rotary embedding only; None:
            counted from the first token of the stream.
          segment_ids: [B, T] int32; tokens of different segments never see each other.
          state: what `init_state` or an earlier call returned, to continue a stream.

        Returns:
          float32 [B, T, V]; with a state, a pair of it and the new state.

        Raises:
          ValueError: tokens of wrong rank or dtype.
        """
        options = {"positions": positions, "segment_ids": segment_ids, "state": state}
        if state is None:
            return self.logits(self.hidden(tokens, **options))
        hidden, state = self.hidden(tokens, **options)
        return self.logits(hidden), state

    def hidden(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        state: Any = None,
    ) -> jax.Array | tuple[jax.Array, Any]:
        """Compute what `logits` reads: [B, T, M] in `config.dtype`; arguments as for a call."""
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"tokens has shape {tokens.shape} and dtype {tokens.dtype}; "
                "it must be integers [batch, time]"
            )
        config = self.config
        x = jnp.take(self.embedding[...], tokens, axis=0).astype(config.dtype)
        if config.embedding_scale != 1.0:
            x *= jnp.asarray(config.embedding_scale, config.dtype)
        x, new_state = apply_periods(
            self.periods,
            config,
            x,
            positions=positions,
            segment_ids=segment_ids,
            state=state,
        )
        x = self.norm(x)
        return x if state is None else (x, new_state)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Compute float32 logits [B, T, V] from `hidden` [B, T, M].

        Products are taken in `config.dtype` and accumulated in float32.
        """
        if self.config.tie_embeddings:
            kernel = self.embedding[...].T
        else:
            kernel = self.unembedding.kernel[...]
        logits = jnp.matmul(
            hidden, kernel.astype(self.config.dtype), preferred_element_type=jnp.float32
        )
        if (cap := self.config.logits_soft_cap) is not None:
            logits = cap * jnp.tanh(logits / cap)
        return logits


def num_parameters(model: nnx.Module) -> int:
    """Count the numbers in all parameters of a model, abstract (`nnx.eval_shape`) or not."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
