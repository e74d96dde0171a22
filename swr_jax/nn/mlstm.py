"""mLSTM as a layer: a matrix memory per head with exponential gates, the mixer of xLSTM."""

import math

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.typing import DTypeLike

from swr_jax.nn.common import linear, restart, sharding_metadata
from swr_jax.ops.mlstm import mlstm, mlstm_step
from swr_jax.ops.mlstm_state import MLSTMState, check_options

HEAD_NORMS = ("layer", "rms")


class MLSTMLayerState(struct.PyTreeNode):
    """What the layer remembers between calls: of size O(1) per stream."""

    cells: MLSTMState
    last_segment: jax.Array  # [B] int32, segment of the last token seen


class HeadNorm(nnx.Module):
    """Norm of every head by itself, [B, T, H, D] -> [B, T, H * D], with a scale and no bias.

    Computed in float32, which is also what it returns.

    Args:
        num_heads: H.
        head_dim: D.
        kind: "layer" takes mean and variance out of a head (arXiv 1607.06450), "rms" only its root
            mean square (arXiv 1910.07467).
        epsilon: added to the variance, or to the mean square.
        param_dtype: dtype of the scale, initially 1.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        kind: str = "layer",
        epsilon: float = 1e-6,
        param_dtype: DTypeLike = jnp.float32,
    ):
        if kind not in HEAD_NORMS:
            raise ValueError(f"kind={kind!r}: must be one of {list(HEAD_NORMS)}")
        self.kind = kind
        self.epsilon = epsilon
        self.scale = nnx.Param(
            jnp.ones(num_heads * head_dim, param_dtype), **sharding_metadata("heads")
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise x [B, T, H, D]."""
        x = x.astype(jnp.float32)
        if self.kind == "layer":
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return x.reshape(*x.shape[:2], -1) * self.scale[...].astype(jnp.float32)


class MLSTM(nnx.Module):
    """Recurrence with a matrix memory per head and learned gates, [B, T, M] -> [B, T, M].

        q, k = x W_q, x W_k                          M -> qk_dim_factor M
        v = x W_v                                    M -> v_dim_factor M
        i, f = cap(x W_i + b_i), cap(x W_f + b_f)    M -> H, pre-activations
        h = mLSTM(q, k, v, i, f)
        y = (sigmoid(x W_o) * HeadNorm(h)) W_out

    with cap(z) = c tanh(z / c). Gates, norm and recurrence are float32 whatever `dtype` is: a
    pre-activation of -8.7 loses 0.03 in bfloat16. About 4 M^2 parameters. Sources: arXiv 2405.04517
    (the recurrence), arXiv 2503.13427 (this layer, as xLSTM-7B has it).

    Initialisation, that of xLSTM-7B: kernels of q, k, v normal with standard deviation
    sqrt(2 / (5 M)), of the output 2 / (num_blocks sqrt(M)), of the gates 0; the input gate is all
    but closed (bias -10), forget gates are spread from 3 to 6 over the heads.

    Args:
        features: width M.
        num_heads: number of heads H, a divisor of both widths below.
        qk_dim_factor: all heads' queries, and keys, have qk_dim_factor * M features together.
        v_dim_factor: all heads' values have v_dim_factor * M features together.
        gate_soft_cap: bound c of the gates' pre-activations; None: none.
        head_norm: "layer" (the published weights) or "rms".
        input_gate: "exp", or "sigmoid", which needs no stabiliser.
        chunk_size: tokens that the recurrence takes at a time, a power of two; changes speed only.
        num_blocks: blocks of the model that the layer is part of.
        norm_epsilon: added to the variance in HeadNorm.
        dtype: dtype of the projections and of the output; None: that of input and parameters.
        param_dtype: dtype of the parameters.
        rngs: source of the `params` keys.

    Raises:
        ValueError: sizes that do not divide as described, or an option out of range.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        qk_dim_factor: float = 0.5,
        v_dim_factor: float = 1.0,
        gate_soft_cap: float | None = 15.0,
        head_norm: str = "layer",
        input_gate: str = "exp",
        chunk_size: int = 128,
        num_blocks: int = 1,
        norm_epsilon: float = 1e-6,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if num_heads < 1:
            raise ValueError(f"num_heads={num_heads}: must be at least 1")
        widths = {}
        for name, factor in (("qk_dim_factor", qk_dim_factor), ("v_dim_factor", v_dim_factor)):
            widths[name] = round(factor * features)
            if widths[name] < 1 or widths[name] % num_heads:
                raise ValueError(
                    f"{name}={factor}: makes {widths[name]} of features={features}, which must be "
                    f"a positive multiple of num_heads={num_heads}"
                )
        qk_features, v_features = widths.values()
        if gate_soft_cap is not None and gate_soft_cap <= 0:
            raise ValueError(f"gate_soft_cap={gate_soft_cap}: must be above 0, or None for no cap")
        if head_norm not in HEAD_NORMS:
            raise ValueError(f"head_norm={head_norm!r}: must be one of {list(HEAD_NORMS)}")
        if num_blocks < 1:
            raise ValueError(f"num_blocks={num_blocks}: must be at least 1")
        # Refuses them here rather than in the first call.
        check_options(chunk_size, input_gate, True)
        self.features = features
        self.num_heads = num_heads
        self.qk_dim = qk_features // num_heads
        self.v_dim = v_features // num_heads
        self.gate_soft_cap = gate_soft_cap
        self.input_gate_kind = input_gate
        self.chunk_size = chunk_size

        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        into_heads = {
            "names": ("embed", "heads"),
            "kernel_init": nnx.initializers.normal(math.sqrt(2 / (5 * features))),
        }
        closed = {"names": ("embed", "heads"), "kernel_init": nnx.initializers.zeros_init()}
        gate = {**closed, **options, "use_bias": True, "dtype": jnp.float32}
        self.query = linear(features, qk_features, **into_heads, **options)
        self.key = linear(features, qk_features, **into_heads, **options)
        self.value = linear(features, v_features, **into_heads, **options)
        self.input_gate = linear(
            features, num_heads, bias_init=nnx.initializers.constant(-10.0), **gate
        )
        self.forget_gate = linear(features, num_heads, bias_init=_spread_memories, **gate)
        self.output_gate = linear(features, v_features, **closed, **options)
        self.head_norm = HeadNorm(
            num_heads, self.v_dim, kind=head_norm, epsilon=norm_epsilon, param_dtype=param_dtype
        )
        self.output = linear(
            v_features,
            features,
            ("heads", "embed"),
            kernel_init=nnx.initializers.normal(2 / (num_blocks * math.sqrt(features))),
            **options,
        )

    def init_state(
        self,
        batch: int,
        *,
        max_length: int | None = None,  # noqa: ARG002 - the protocol's; this state has one size
    ) -> MLSTMLayerState:
        """Make the state before any token.

        Args:
            batch: number of streams B.
            max_length: ignored; the state's size does not depend on it.
        """
        return MLSTMLayerState(
            cells=MLSTMState.zeros(batch, self.num_heads, self.qk_dim, self.v_dim),
            last_segment=jnp.zeros(batch, jnp.int32),
        )

    def __call__(
        self,
        x: jax.Array,
        *,
        positions: jax.Array | None = None,  # noqa: ARG002 - the protocol's; gates need none
        segment_ids: jax.Array | None = None,
        state: MLSTMLayerState | None = None,
    ) -> jax.Array | tuple[jax.Array, MLSTMLayerState]:
        """Apply the layer, from the start of a stream or, with a state, from where it stands.

        Feeding a stream in pieces of any lengths gives what one call over all of it gives.

        Args:
            x: [B, T, M].
            positions: ignored.
            segment_ids: [B, T] int32; tokens of different segments never see each other. None:
                one segment, and with a state that of the last token before.
            state: what `init_state` or an earlier call returned.

        Returns:
            [B, T, M]; with a state, a pair of it and the new state.
        """
        batch, time, _ = x.shape

        def heads(y: jax.Array) -> jax.Array:
            return y.reshape(batch, time, self.num_heads, -1)

        inputs = (
            heads(self.query(x)),
            heads(self.key(x)),
            heads(self.value(x)),
            self._soft_cap(self.input_gate(x)),
            self._soft_cap(self.forget_gate(x)),
        )
        cells = None
        if state is not None:
            cells, last_segment = state.cells, state.last_segment
            if segment_ids is not None:
                fresh = self.init_state(batch).cells
                cells = restart(cells, fresh, segment_ids[:, 0] != last_segment)
                last_segment = segment_ids[:, -1].astype(jnp.int32)
        if cells is not None and time == 1:
            cells, h = mlstm_step(
                cells, *(y[:, 0] for y in inputs), input_gate=self.input_gate_kind
            )
            h = h[:, None]
        else:
            h = mlstm(
                *inputs,
                chunk_size=self.chunk_size,
                input_gate=self.input_gate_kind,
                initial_state=cells,
                segment_ids=segment_ids,
                return_state=cells is not None,
            )
            h, cells = (h, None) if cells is None else h
        # Without the barrier XLA:CPU (jaxlib 0.11, 0.12) joins this product, where its weights are
        # constants of the program, with the norm, and reads memory that nothing has written.
        gate = jax.lax.optimization_barrier(self.output_gate(x))
        gated = nnx.sigmoid(gate.astype(jnp.float32)) * self.head_norm(h)
        y = self.output(gated.astype(gate.dtype))
        return y if state is None else (y, MLSTMLayerState(cells, last_segment))

    def _soft_cap(self, gate: jax.Array) -> jax.Array:
        cap = self.gate_soft_cap
        return gate if cap is None else cap * jnp.tanh(gate / cap)


def _spread_memories(_, shape: tuple[int], dtype: DTypeLike) -> jax.Array:
    """Start the heads with memories from about 20 to 400 tokens."""
    return jnp.linspace(3.0, 6.0, shape[0], dtype=dtype)
