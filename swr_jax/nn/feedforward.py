"""The position-wise half of a block: root-mean-square norm and gated feed-forward network."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from swr_jax.nn.common import linear, sharding_metadata


def rms_norm(
    features: int,
    *,
    epsilon: float = 1e-6,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.RMSNorm:
    """Make an `nnx.RMSNorm` (arXiv 1910.07467) with a scale, initially 1, that is never split.

    Statistics are float32 whatever the dtype of the input; the result has `dtype`.

    Args:
      features: size of the normalised last axis.
      epsilon: added to the mean square.
      dtype: dtype of the result; None: that of input and scale together.
      param_dtype: dtype of the scale.
      rngs: source of keys, as every layer takes it.
    """
    return nnx.RMSNorm(
        features,
        epsilon=epsilon,
        dtype=dtype,
        param_dtype=param_dtype,
        scale_metadata=sharding_metadata(None),
        rngs=rngs,
    )


class SwiGLU(nnx.Module):
    """Feed-forward network down(silu(gate(x)) * up(x)), without biases (arXiv 2002.05202).

    Args:
      features: size M of the last axis of input and output.
      hidden_features: size of the gated layer between them.
      dtype: dtype of the computation; None: that of input and parameters together.
      param_dtype: dtype of the parameters.
      rngs: source of the `params` keys.
    """

    def __init__(
        self,
        features: int,
        hidden_features: int,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.gate = linear(features, hidden_features, ("embed", "mlp"), **dtypes, rngs=rngs)
        self.up = linear(features, hidden_features, ("embed", "mlp"), **dtypes, rngs=rngs)
        self.down = linear(hidden_features, features, ("mlp", "embed"), **dtypes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the network to x [..., M]."""
        return self.down(nnx.silu(self.gate(x)) * self.up(x))
