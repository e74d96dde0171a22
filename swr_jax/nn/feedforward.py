"""The position-wise half of a block: root-mean-square norm and gated feed-forward network."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from swr_jax.nn.common import linear, sharding_metadata

# What the gate of a feed-forward network goes through.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nnx.silu,
    "gelu": lambda x: nnx.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nnx.gelu(x, approximate=True),
}


def rms_norm(
    features: int,
    *,
    epsilon: float = 1e-6,
    offset: float = 0.0,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """Make an `nnx.RMSNorm` (arXiv 1910.07467) with a scale, initially 1, that is never split.

    Statistics are float32 whatever the dtype of the input; the result has `dtype`.

    Args:
      features: size of the normalised last axis.
      epsilon: added to the mean square.
      offset: what is multiplied by is offset + scale; the scale starts as 1 - offset.
      dtype: dtype of the result; None: that of input and scale together.
      param_dtype: dtype of the scale.
      rngs: source of keys, as every layer takes it.
    """
    if offset:
        return OffsetRMSNorm(
            features,
            epsilon=epsilon,
            offset=offset,
            dtype=dtype,
            param_dtype=param_dtype,
        )
    return nnx.RMSNorm(
        features,
        epsilon=epsilon,
        dtype=dtype,
        param_dtype=param_dtype,
        scale_metadata=sharding_metadata(None),
        rngs=rngs,
    )


class OffsetRMSNorm(nnx.Module):
    """RMSNorm that multiplies by offset + scale, as Gemma stores its norms; see `rms_norm`.

    Statistics and the multiplication are float32.
    """

    def __init__(
        self,
        features: int,
        *,
        epsilon: float,
        offset: float,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
    ):
        self.epsilon = epsilon
        self.offset = offset
        self.dtype = dtype
        scale = jnp.full((features,), 1 - offset, param_dtype)
        self.scale = nnx.Param(scale, **sharding_metadata(None))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise the last axis of x [..., features]."""
        scale = self.scale[...]
        dtype = jnp.promote_types(x.dtype, scale.dtype) if self.dtype is None else self.dtype
        x = x.astype(jnp.float32)
        x *= jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * (self.offset + scale.astype(jnp.float32))).astype(dtype)


class SwiGLU(nnx.Module):
    """Feed-forward network down(activation(gate(x)) * up(x)) (arXiv 2002.05202).

    Args:
      features: size M of the last axis of input and output.
      hidden_features: size of the gated layer between them.
      activation: a name in `ACTIVATIONS`.
      use_bias: whether the three projections have biases.
      dtype: dtype of the computation; None: that of input and parameters together.
      param_dtype: dtype of the parameters.
      rngs: source of the `params` keys.
    """

    def __init__(
        self,
        features: int,
        hidden_features: int,
        *,
        activation: str = "silu",
        use_bias: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options = {"use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.activation = activation
        self.gate = linear(features, hidden_features, ("embed", "mlp"), **options)
        self.up = linear(features, hidden_features, ("embed", "mlp"), **options)
        self.down = linear(hidden_features, features, ("mlp", "embed"), **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the network to x [..., M]."""
        return self.down(ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))
