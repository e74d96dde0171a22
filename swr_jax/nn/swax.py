"""SWAX: windowed attention and mLSTM in turn, as a stack of residual blocks for anyone's model."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from swr_jax.nn.blocks import (
    MLSTMConfig,
    StackConfig,
    apply_periods,
    init_periods_state,
    make_periods,
)

# Which of the two comes first is not published; the paper alternates them one to one.
ORDERS = (("swa", "mlstm"), ("mlstm", "swa"))


class SWAX(nnx.Module):
    """Alternating residual blocks of windowed attention and mLSTM, [B, T, M] -> [B, T, M].

    A block is x + mixer(norm(x)), then x + feed-forward(norm(x)); there is no norm before the first
    block nor after the last. Attention remembers the window, to the letter; the matrix memories of
    mLSTM everything before it, compressed: there is no global attention, so a stream costs the same
    per token however long it is. Source: arXiv 2509.24552, where the window is drawn anew for
    each batch; layers of different windows have the same parameters.

    Args:
        features: width M.
        depth: number of blocks, an even number.
        window: tokens that attention sees, the current one included.
        num_heads: attention heads; features / num_heads must be even.
        num_kv_heads: key/value heads of attention, a divisor of num_heads; None: num_heads.
        order: ("swa", "mlstm") or ("mlstm", "swa"): which of the two comes first.
        mlstm: options of the mLSTM layers, their own number of heads among them.
        mlp_features: hidden width of the feed-forward networks; None: 8/3 M, rounded up to 64.
        rope_base: base of the wavelengths of attention's rotary embedding.
        norm_epsilon: added to the mean square in norms.
        remat: what the backward pass computes again: "none", "dots" (all but projections) or
            "full" (everything but what enters a pair of blocks).
        dtype: dtype of activations; norms, rotary angles, softmax, gates and memories stay float32.
        param_dtype: dtype of the parameters.
        rngs: source of the `params` keys.

    Raises:
        ValueError: a value out of range, or values that do not fit together.
    """

    def __init__(
        self,
        features: int,
        *,
        depth: int,
        window: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        order: tuple[str, str] = ("swa", "mlstm"),
        mlstm: MLSTMConfig | None = None,
        mlp_features: int | None = None,
        rope_base: float = 10_000.0,
        norm_epsilon: float = 1e-6,
        remat: str = "none",
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if tuple(order) not in ORDERS:
            raise ValueError(f"order={order}: must be one of {', '.join(map(str, ORDERS))}")
        self.config = StackConfig(
            features=features,
            depth=depth,
            pattern=order,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            window=window,
            mlstm=MLSTMConfig() if mlstm is None else mlstm,
            mlp_features=mlp_features,
            rope_base=rope_base,
            norm_epsilon=norm_epsilon,
            remat=remat,
            dtype=dtype,
            param_dtype=param_dtype,
        )
        self.periods = make_periods(self.config, rngs=rngs)

    def init_state(self, batch: int, *, max_length: int | None = None) -> Any:
        """Make the state before any token.

        Args:
            batch: number of streams B.
            max_length: ignored; the state's size depends on the window alone.
        """
        return init_periods_state(self.periods, self.config, batch, max_length=max_length)

    def __call__(
        self,
        x: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        state: Any = None,
    ) -> jax.Array | tuple[jax.Array, Any]:
        """Apply the blocks, from the start of a stream or, with a state, from where it stands.

        Feeding a stream in pieces of any lengths gives what one call over all of it gives.

        Args:
            x: [B, T, M].
            positions: [B, T] int32, position within the document, for the rotary embedding only;
                None: counted from the first token of the stream.
            segment_ids: [B, T] int32; tokens of different segments never see each other. None:
                one segment, and with a state that of the last token before.
            state: what `init_state` or an earlier call returned.

        Returns:
            [B, T, M] in `dtype`; with a state, a pair of it and the new state.
        """
        y, new_state = apply_periods(
            self.periods,
            self.config,
            x.astype(self.config.dtype),
            positions=positions,
            segment_ids=segment_ids,
            state=state,
        )
        return y if state is None else (y, new_state)
