"""Phalanx: gated sliding-window recurrences as a drop-in for windowed attention."""

import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.typing import DTypeLike

from swr_jax.nn.common import linear
from swr_jax.ops import lane_order, validation
from swr_jax.ops.recurrence import (
    gated_sliding_window_recurrence,
    recurrence_step,
    sliding_window_recurrence,
)
from swr_jax.ops.state import RecurrenceState

# What the post-gate may pass through; None is the published layer.
GATE_ACTIVATIONS = {None: lambda x: x, "silu": nnx.silu, "sigmoid": nnx.sigmoid}

Lookback = int | None | types.EllipsisType


class PhalanxState(struct.PyTreeNode):
    """What the layer remembers between calls: of size O(1) per stream."""

    window: RecurrenceState | None  # of the heads that see the window
    everything: RecurrenceState | None  # of the global heads
    last_segment: jax.Array  # [B] int32, segment of the last token seen


class Phalanx(nnx.Module):
    """Gated sliding-window recurrence with learned decays, [B, T, M] -> [B, T, M].

        a = decay_max * sigmoid(x W_a + bias)     one decay per token and head
        b = sigmoid(x W_b + bias)                 pre-gate
        c = x W_c + bias                          post-gate
        v = x W_v
        y = (SWR(a, b * v) * c + v) W_o

    There is no norm, convolution or positional encoding inside: tokens are told apart by decay and
    by their place in the jagged window. Decays and the recurrence are float32 whatever `dtype` is.
    About 4.06 M^2 parameters. Source: arXiv 2512.13921.

    Args:
        features: width M, a multiple of head_dim.
        head_dim: features D of a head, which share a decay; H = M / D.
        num_gate_heads: heads of the two gates, a divisor of H, each shared by a group of heads;
            None: H.
        block_size: tokens in a block, a power of two.
        lookback: previous blocks that a token sees: 0, 1, ...; None for all, the exact recurrence.
        global_heads: how many of the heads (the last ones) run the exact recurrence instead of the
            window; whole groups of heads where gates are shared.
        decay_max: upper bound of the decays, in (0, 1].
        fixed_decay: in [0, 1], the decay of all heads and tokens, instead of a learned one.
        pre_gate, post_gate: False leaves out b, or c.
        gate_activation: what the post-gate passes through: None, "silu" or "sigmoid".
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
        head_dim: int = 16,
        num_gate_heads: int | None = None,
        block_size: int = 16,
        lookback: int | None = 1,
        global_heads: int = 0,
        decay_max: float = 1.0,
        fixed_decay: float | None = None,
        pre_gate: bool = True,
        post_gate: bool = True,
        gate_activation: str | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if head_dim < 1 or features < 1 or features % head_dim:
            raise ValueError(
                f"features={features}, head_dim={head_dim}: the first must be a multiple of the "
                "second"
            )
        num_heads = features // head_dim
        num_gate_heads = num_heads if num_gate_heads is None else num_gate_heads
        if num_gate_heads < 1 or num_heads % num_gate_heads:
            raise ValueError(
                f"num_gate_heads={num_gate_heads}: must divide the number of heads, "
                f"features / head_dim = {num_heads}"
            )
        group = num_heads // num_gate_heads
        if not 0 <= global_heads <= num_heads or global_heads % group:
            raise ValueError(
                f"global_heads={global_heads}: must be between 0 and the number of heads, "
                f"{num_heads}, and a multiple of the {group} heads that share a gate"
            )
        if not 0 < decay_max <= 1:
            raise ValueError(f"decay_max={decay_max}: must be above 0 and at most 1")
        if fixed_decay is not None and not 0 <= fixed_decay <= 1:
            raise ValueError(f"fixed_decay={fixed_decay}: must be in [0, 1], or None to learn it")
        if gate_activation not in GATE_ACTIVATIONS:
            raise ValueError(
                f"gate_activation={gate_activation!r}: must be one of {list(GATE_ACTIVATIONS)}"
            )
        self.features = features
        self.head_dim = head_dim
        self.num_heads = num_heads
        self.num_gate_heads = num_gate_heads
        self.block_size = block_size
        self.lookback = lookback
        self.global_heads = global_heads
        self.decay_max = decay_max
        self.fixed_decay = fixed_decay
        self.gate_activation = gate_activation
        # Refuses a bad window here rather than in the first call.
        RecurrenceState.zeros(1, 1, 1, block_size=block_size, lookback=lookback)

        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        gate_features = num_gate_heads * head_dim
        gate = (features, gate_features, ("embed", "kv_heads"))
        self.decay = self.pre_gate = self.post_gate = nnx.data(None)
        if fixed_decay is None:
            self.decay = linear(
                features,
                num_heads,
                ("embed", "heads"),
                use_bias=True,
                bias_init=_spread_decays,
                **options,
            )
        if pre_gate:
            self.pre_gate = linear(*gate, use_bias=True, **options)
        if post_gate:
            self.post_gate = linear(*gate, use_bias=True, **options)
        self.value = linear(features, features, ("embed", "heads"), **options)
        self.output = linear(features, features, ("heads", "embed"), **options)

    def init_state(
        self,
        batch: int,
        *,
        max_length: int | None = None,  # noqa: ARG002 - the protocol's; this state has one size
        block_size: int | None = None,
        lookback: Lookback = ...,
    ) -> PhalanxState:
        """Make the state before any token.

        Args:
            batch: number of streams B.
            max_length: ignored; the state's size does not depend on it.
            block_size, lookback: the window, where calls override the layer's own.
        """
        block_size, lookback = self._window(block_size, lookback)

        def zeros(heads: int, lookback: int | None) -> RecurrenceState | None:
            window = {"block_size": block_size, "lookback": lookback}
            return RecurrenceState.zeros(batch, heads, self.head_dim, **window) if heads else None

        return PhalanxState(
            window=zeros(self.num_heads - self.global_heads, lookback),
            everything=zeros(self.global_heads, None),
            last_segment=jnp.zeros(batch, jnp.int32),
        )

    def __call__(
        self,
        x: jax.Array,
        *,
        positions: jax.Array | None = None,  # noqa: ARG002 - the protocol's; decays need none
        segment_ids: jax.Array | None = None,
        state: PhalanxState | None = None,
        block_size: int | None = None,
        lookback: Lookback = ...,
    ) -> jax.Array | tuple[jax.Array, PhalanxState]:
        """Apply the layer, from the start of a stream or, with a state, from where it stands.

        Feeding a stream in pieces of any lengths gives what one call over all of it gives.

        Args:
            x: [B, T, M].
            positions: ignored.
            segment_ids: [B, T] int32; tokens of different segments never see each other. None:
                one segment, and with a state that of the last token before.
            state: what `init_state` or an earlier call returned.
            block_size, lookback: run with another window than the layer's own; a state must then
                come from `init_state` with the same override. Global heads stay global.

        Returns:
            [B, T, M]; with a state, a pair of it and the new state.

        Raises:
            ValueError: a window out of range, or a state of another one or of another layer.
        """
        block_size, lookback = self._window(block_size, lookback)
        batch, time, _ = x.shape

        if state is None and self._has_lane_order(x, block_size, lookback):
            return self._in_lane_order(x, segment_ids, block_size, lookback)
        a = self._decays(x)
        gates, v = self._gates_and_values(x, lambda layer: layer)
        v, *gates = (y.reshape(batch, time, -1, self.head_dim) for y in (v, *gates))

        if state is not None and segment_ids is not None:
            continues = segment_ids[:, 0] == state.last_segment
            a = a.at[:, 0].set(jnp.where(continues[:, None], a[:, 0], 0))
        split = self.num_heads - self.global_heads
        gate_split = split * self.num_gate_heads // self.num_heads
        outputs, states = [], []
        for part, gate_part, reach, before in (
            (slice(split), slice(gate_split), lookback, state and state.window),
            (slice(split, None), slice(gate_split, None), None, state and state.everything),
        ):
            absent = part == slice(0) or part == slice(self.num_heads, None)
            if state is not None and absent != (before is None):
                raise ValueError(
                    "state is of a layer with other global_heads than this one's "
                    f"{self.global_heads} of {self.num_heads}: start from this layer's init_state"
                )
            if absent:
                states.append(None)
                continue
            out, after = _recur(
                a[:, :, part],
                tuple(gate[:, :, gate_part] for gate in gates) or None,
                v[:, :, part],
                segment_ids,
                before,
                block_size,
                reach,
            )
            outputs.append(out)
            states.append(after)
        out = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=2)
        y = self.output(out.reshape(batch, time, self.features))
        if state is None:
            return y
        last = state.last_segment if segment_ids is None else segment_ids[:, -1].astype(jnp.int32)
        return y, PhalanxState(window=states[0], everything=states[1], last_segment=last)

    def _gates_and_values(
        self, x: jax.Array, arranged: Callable[[nnx.Linear], nnx.Linear]
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """The gates (b, c), or () for none, and v, by projections that are `arranged` first."""
        v = arranged(self.value)(x)
        if self.pre_gate is None and self.post_gate is None:
            return (), v
        b = c = None
        if self.pre_gate is not None:
            b = nnx.sigmoid(arranged(self.pre_gate)(x))
        if self.post_gate is not None:
            c = GATE_ACTIVATIONS[self.gate_activation](arranged(self.post_gate)(x))
        return (jnp.ones_like(c) if b is None else b, jnp.ones_like(b) if c is None else c), v

    def _has_lane_order(self, x: jax.Array, block_size: int, lookback: int | None) -> bool:
        """Whether all heads do the same, and a kernel reads them as the projections write them."""
        shape = (*x.shape[:2], self.num_heads, self.head_dim)
        dtype = jnp.dtype(self.value.dtype or jnp.result_type(x, self.value.kernel[...]))
        alike = self.global_heads in (0, self.num_heads) and self.num_gate_heads == self.num_heads
        reach = None if self.global_heads else lookback
        return alike and lane_order.is_read_here(
            shape, dtype, block_size=block_size, lookback=reach
        )

    def _in_lane_order(
        self, x: jax.Array, segment_ids: jax.Array | None, block_size: int, lookback: int | None
    ) -> jax.Array:
        """What a call without a state returns, with no transposition between projections."""

        def columns(x: jax.Array) -> jax.Array:
            return lane_order.to_lane_order(x.reshape(*x.shape[:-1], self.num_heads, -1))

        gates, v = self._gates_and_values(x, lambda layer: _with(layer, columns))
        out = lane_order.recurrence_in_lane_order(
            self._decays(x),
            v,
            gates or None,
            block_size=block_size,
            lookback=None if self.global_heads else lookback,
            segment_ids=segment_ids,
        )
        return _with(self.output, lambda kernel: columns(kernel.T).T)(out if gates else out + v)

    def _decays(self, x: jax.Array) -> jax.Array:
        if self.fixed_decay is not None:
            return jnp.full((*x.shape[:2], self.num_heads), self.fixed_decay, jnp.float32)
        return self.decay_max * nnx.sigmoid(self.decay(x).astype(jnp.float32))

    def _window(self, block_size: int | None, lookback: Lookback) -> tuple[int, int | None]:
        return (
            self.block_size if block_size is None else block_size,
            self.lookback if lookback is ... else lookback,
        )


def _with(layer: nnx.Linear, change: Callable[[jax.Array], jax.Array]) -> nnx.Linear:
    """Return the layer with changed parameters."""
    definition, parameters = nnx.split(layer)
    return nnx.merge(definition, jax.tree.map(change, parameters))


def _spread_decays(_, shape: tuple[int], dtype: DTypeLike) -> jax.Array:
    """Start the heads with memories from two tokens to about the whole window."""
    return jnp.linspace(0.0, 3.0, shape[0], dtype=dtype)


def _recur(a, gates, v, segment_ids, state, block_size, lookback):
    """Run the recurrence of one group of heads; the state after it is None where there was none."""
    if state is not None and v.shape[1] == 1:
        # A step takes its window from the state; the operators below compare the two themselves.
        u = v[:, 0]
        validation.check_initial_state(state, u.shape, block_size, lookback)
        if gates is not None:
            b, c = (jnp.repeat(gate[:, 0], v.shape[2] // gate.shape[2], axis=1) for gate in gates)
            u = b.astype(jnp.float32) * u.astype(jnp.float32)
        state, x = recurrence_step(state, a[:, 0], u.astype(jnp.float32))
        if gates is not None:
            x = x * c.astype(jnp.float32)
        return (x + v[:, 0].astype(jnp.float32)).astype(v.dtype)[:, None], state
    options = {
        "block_size": block_size,
        "lookback": lookback,
        "initial_state": state,
        "segment_ids": segment_ids,
        "return_state": state is not None,
    }
    if gates is None:
        out = sliding_window_recurrence(a, v, **options)
    else:
        out = gated_sliding_window_recurrence(a, *gates, v, **options)
    out, state = (out, None) if state is None else out
    return (out + v if gates is None else out), state
