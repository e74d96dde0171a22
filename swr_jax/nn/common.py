"""What every layer shares: linear maps with logical sharding names, states that start anew."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

FAN_IN_INIT = nnx.initializers.lecun_normal()  # truncated normal of variance 1 / fan-in
ZEROS_INIT = nnx.initializers.zeros_init()


def sharding_metadata(*names: str | None) -> dict[str, object]:
    """Metadata that names the axes of one parameter, for `nnx.Param(value, **metadata)`.

    The names are logical ("embed", "mlp"), so flax must not place the array by itself: eager
    sharding would look for mesh axes of these names, and fail without a mesh.
    """
    return {"out_sharding": names, "eager_sharding": False}


def linear(
    in_features: int,
    out_features: int,
    names: tuple[str | None, str | None],
    *,
    use_bias: bool = False,
    kernel_init: Callable = FAN_IN_INIT,
    bias_init: Callable = ZEROS_INIT,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """Make an `nnx.Linear` with named axes; fan-in scaled truncated normal unless told otherwise.

    Args:
      in_features: size of the last axis of the input.
      out_features: size of the last axis of the output.
      names: logical names of the kernel's two axes; the bias carries the second.
      use_bias: whether a bias is added.
      kernel_init: initialiser of the kernel [in_features, out_features].
      bias_init: initialiser of the bias [out_features].
      dtype: dtype of the computation; None: that of input and parameters together.
      param_dtype: dtype of the parameters.
      rngs: source of the `params` key.
    """
    return nnx.Linear(
        in_features,
        out_features,
        use_bias=use_bias,
        kernel_init=kernel_init,
        bias_init=bias_init,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_metadata=sharding_metadata(*names),
        bias_metadata=sharding_metadata(names[1]),
        rngs=rngs,
    )


def restart[State](state: State, fresh: State, where: jax.Array) -> State:
    """Replace a state by a fresh one in the rows where a new document begins.

    A choice and no product: nothing of the old state is left, not even a NaN.

    Args:
      state: pytree of arrays [B, ...].
      fresh: one like it, of streams that have seen no token.
      where: [B] bool, the rows to replace.
    """

    def choose(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(where.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

    return jax.tree.map(choose, state, fresh)
