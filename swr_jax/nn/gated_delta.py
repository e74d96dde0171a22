"""Gated DeltaNet as a layer: short convolutions, a memory that replaces what it holds, a gate."""

import math

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.typing import DTypeLike

from swr_jax.nn.common import linear, restart, sharding_metadata
from swr_jax.nn.feedforward import rms_norm
from swr_jax.ops.convolution import short_convolution
from swr_jax.ops.gated_delta import GatedDeltaState, gated_delta_rule, gated_delta_rule_step

_NORM_EPSILON = 1e-6  # of the unit norm of queries and keys
_LARGEST_RATE = 16.0  # decay rates start uniform up to this, per unit of step size,
_STEP_SIZES = (1e-3, 0.1)  # and step sizes log-uniform between these


class GatedDeltaNetState(struct.PyTreeNode):
    """What the layer remembers between calls: of size O(1) per stream.

    The last conv_size - 1 inputs of each convolution are 0 before a document's first token.
    """

    memory: GatedDeltaState
    query: jax.Array  # [B, conv_size - 1, H * Dk]
    key: jax.Array  # [B, conv_size - 1, H * Dk]
    value: jax.Array  # [B, conv_size - 1, H * Dv]
    last_segment: jax.Array  # [B] int32, segment of the last token seen


class ShortConvolution(nnx.Module):
    """Causal convolution of every feature by itself over the last few tokens, then SiLU.

    Computed in float32; returns the input's dtype.

    Args:
        features: size C of the last axis.
        size: tokens W that a token sees, its own included.
        param_dtype: dtype of the kernel [W, C], initially uniform within 1 / sqrt(W) of 0.
        rngs: source of the `params` key.
    """

    def __init__(
        self, features: int, size: int, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ):
        bound = size**-0.5
        kernel = jax.random.uniform(
            rngs.params(), (size, features), param_dtype, minval=-bound, maxval=bound
        )
        self.kernel = nnx.Param(kernel, **sharding_metadata(None, "heads"))

    def __call__(
        self, x: jax.Array, before: jax.Array | None, segment_ids: jax.Array | None
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Convolve x [B, T, C], from the start of a stream or, with `before`, a piece of one.

        Arguments and results, but for the SiLU, as in `short_convolution`.
        """
        options = {"before": before, "segment_ids": segment_ids}
        if before is None:
            return nnx.silu(short_convolution(x, self.kernel[...], **options)).astype(x.dtype)
        y, after = short_convolution(x, self.kernel[...], **options, return_state=True)
        return nnx.silu(y).astype(x.dtype), after


class GatedDeltaNet(nnx.Module):
    """The gated delta rule with learned keys, decays and gates, [B, T, M] -> [B, T, M].

        q, k, v = conv(x W_q), conv(x W_k), conv(x W_v)        short convolutions with SiLU
        q, k = q / (|q| sqrt(Dk)), k / |k|                     per head
        alpha = exp(-exp(log_rate) softplus(x W_a + bias))     one decay per token and head
        beta = sigmoid(x W_b)                                  one writing strength likewise
        o = gated_delta_rule(q, k, v, alpha, beta)
        y = (RMSNorm(o) * silu(x W_g)) W_o                     norm per head, with a shared scale

    Convolutions, alpha, beta, norms and the rule are float32 whatever `dtype` is. With the default
    head sizes about 4 M^2 parameters, as many as attention has; the published layer has
    6 M^2: num_heads * head_dim = 3 / 4 M. Source: arXiv 2412.06464.

    Rates exp(log_rate) start uniform in (0, 16], step sizes softplus(bias) log-uniform in
    [0.001, 0.1], as in the published layer (after Mamba-2, arXiv 2405.21060).

    Args:
        features: width M.
        num_heads: number of heads H.
        head_dim: features Dk of a head's queries and keys; None: features / (2 num_heads).
        expand_v: a head's values have Dv = expand_v * Dk features.
        conv_size: tokens that the convolutions see.
        chunk_size: tokens that XLA's rule takes at a time, a power of two; changes speed only. The
            kernels' chunks have 128.
        norm_epsilon: added to the mean square in the RMSNorm.
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
        head_dim: int | None = None,
        expand_v: float = 2.0,
        conv_size: int = 4,
        chunk_size: int = 64,
        norm_epsilon: float = 1e-6,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if num_heads < 1:
            raise ValueError(f"num_heads={num_heads}: must be at least 1")
        if head_dim is None:
            if features % (2 * num_heads):
                raise ValueError(
                    f"features={features}: must be a multiple of 2 num_heads = {2 * num_heads} "
                    "where head_dim is None; choose another number of heads or give head_dim"
                )
            head_dim = features // (2 * num_heads)
        if head_dim < 1:
            raise ValueError(f"head_dim={head_dim}: must be at least 1")
        v_dim = round(expand_v * head_dim)
        if v_dim < 1 or not math.isclose(v_dim, expand_v * head_dim):
            raise ValueError(
                f"expand_v={expand_v}: times head_dim={head_dim} must be a whole number of at "
                "least 1"
            )
        if conv_size < 1:
            raise ValueError(f"conv_size={conv_size}: must be at least 1, the token itself")
        if chunk_size < 1 or chunk_size & (chunk_size - 1):
            raise ValueError(f"chunk_size={chunk_size}: must be a power of two, at least 1")
        self.features = features
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.v_dim = v_dim
        self.conv_size = conv_size
        self.chunk_size = chunk_size
        self.dtype = dtype
        self.param_dtype = param_dtype

        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        options = {**dtypes, "rngs": rngs}
        into_heads = ("embed", "heads")
        qk_features, v_features = num_heads * head_dim, num_heads * v_dim
        self.query = linear(features, qk_features, into_heads, **options)
        self.key = linear(features, qk_features, into_heads, **options)
        self.value = linear(features, v_features, into_heads, **options)
        convolution = {"param_dtype": param_dtype, "rngs": rngs}
        self.query_conv = ShortConvolution(qk_features, conv_size, **convolution)
        self.key_conv = ShortConvolution(qk_features, conv_size, **convolution)
        self.value_conv = ShortConvolution(v_features, conv_size, **convolution)
        gate = {**options, "dtype": jnp.float32}
        self.decay = linear(
            features, num_heads, into_heads, use_bias=True, bias_init=_step_sizes, **gate
        )
        rates = _LARGEST_RATE * (1 - jax.random.uniform(rngs.params(), (num_heads,)))
        self.log_rate = nnx.Param(jnp.log(rates).astype(param_dtype), **sharding_metadata("heads"))
        self.write_gate = linear(features, num_heads, into_heads, **gate)
        self.output_gate = linear(features, v_features, into_heads, **options)
        self.norm = rms_norm(
            v_dim, epsilon=norm_epsilon, dtype=jnp.float32, param_dtype=param_dtype, rngs=rngs
        )
        self.output = linear(v_features, features, ("heads", "embed"), **options)

    def init_state(
        self,
        batch: int,
        *,
        max_length: int | None = None,  # noqa: ARG002 - the protocol's; this state has one size
    ) -> GatedDeltaNetState:
        """Make the state before any token.

        Args:
            batch: number of streams B.
            max_length: ignored; the state's size does not depend on it.
        """
        dtype = self.param_dtype if self.dtype is None else self.dtype

        def history(head_dim: int) -> jax.Array:
            return jnp.zeros((batch, self.conv_size - 1, self.num_heads * head_dim), dtype)

        return GatedDeltaNetState(
            memory=GatedDeltaState.zeros(batch, self.num_heads, self.head_dim, self.v_dim),
            query=history(self.head_dim),
            key=history(self.head_dim),
            value=history(self.v_dim),
            last_segment=jnp.zeros(batch, jnp.int32),
        )

    def __call__(
        self,
        x: jax.Array,
        *,
        positions: jax.Array | None = None,  # noqa: ARG002 - the protocol's; decays need none
        segment_ids: jax.Array | None = None,
        state: GatedDeltaNetState | None = None,
    ) -> jax.Array | tuple[jax.Array, GatedDeltaNetState]:
        """Apply the layer, from the start of a stream or, with a state, from where it stands.

        Feeding a stream in pieces of any lengths gives what one call over all of it gives.

        Args:
            x: [B, T, M].
            positions: ignored.
            segment_ids: [B, T] int32; tokens of different segments never see each other, not even
                through the convolutions. None: one segment, and with a state that of the last
                token before.
            state: what `init_state` or an earlier call returned.

        Returns:
            [B, T, M]; with a state, a pair of it and the new state.
        """
        batch, time, _ = x.shape
        q, k, v = self.query(x), self.key(x), self.value(x)
        if state is None:
            q = self.query_conv(q, None, segment_ids)
            k = self.key_conv(k, None, segment_ids)
            v = self.value_conv(v, None, segment_ids)
        else:
            last_segment = state.last_segment
            if segment_ids is not None:
                state = restart(state, self.init_state(batch), segment_ids[:, 0] != last_segment)
                last_segment = segment_ids[:, -1].astype(jnp.int32)
            q, query = self.query_conv(q, state.query, segment_ids)
            k, key = self.key_conv(k, state.key, segment_ids)
            v, value = self.value_conv(v, state.value, segment_ids)

        def heads(y: jax.Array) -> jax.Array:
            return y.reshape(batch, time, self.num_heads, -1)

        rate = jnp.exp(self.log_rate[...].astype(jnp.float32))
        inputs = (
            _unit(heads(q), self.head_dim**-0.5),
            _unit(heads(k)),
            heads(v),
            jnp.exp(-rate * jax.nn.softplus(self.decay(x))),
            nnx.sigmoid(self.write_gate(x)),
        )
        options = {"chunk_size": self.chunk_size, "segment_ids": segment_ids}
        if state is None:
            o = gated_delta_rule(*inputs, **options)
        elif time == 1:
            memory, o = gated_delta_rule_step(state.memory, *(y[:, 0] for y in inputs))
            o = o[:, None]
        else:
            o, memory = gated_delta_rule(
                *inputs, **options, initial_state=state.memory, return_state=True
            )
        gate = self.output_gate(x)
        gated = heads(nnx.silu(gate.astype(jnp.float32))) * self.norm(o)
        y = self.output(gated.reshape(batch, time, -1).astype(gate.dtype))
        if state is None:
            return y
        state = GatedDeltaNetState(
            memory=memory, query=query, key=key, value=value, last_segment=last_segment
        )
        return y, state


def _unit(x: jax.Array, length: float = 1.0) -> jax.Array:
    """Scale each head's vector [..., D] to `length`."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.sum(jnp.square(y), axis=-1, keepdims=True) + _NORM_EPSILON)
    return (length * y).astype(x.dtype)


def _step_sizes(key: jax.Array, shape: tuple[int], dtype: DTypeLike) -> jax.Array:
    """Draw biases whose softplus, the step size, is log-uniform."""
    low, high = (math.log(step) for step in _STEP_SIZES)
    step = jnp.exp(jax.random.uniform(key, shape, minval=low, maxval=high))
    return (step + jnp.log(-jnp.expm1(-step))).astype(dtype)
