"""Softmax attention as a layer: a sliding window or the whole past, rotary positions, a cache."""

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.typing import DTypeLike

from swr_jax.nn.common import linear
from swr_jax.nn.feedforward import rms_norm
from swr_jax.nn.rotary import RopeScaling, rotary_embedding
from swr_jax.ops.attention import cached_attention, sliding_window_attention

# Segment of cache slots that hold no token yet: no caller's segment, so nothing attends to them.
_EMPTY = jnp.iinfo(jnp.int32).min


class AttentionState(struct.PyTreeNode):
    """What attention remembers between calls.

    Token number n of a stream lies in slot n % C, where C is the window, or max_length for full
    attention (which never wraps).
    """

    keys: jax.Array  # [B, C, Nkv, Dh], positions already rotated in
    values: jax.Array  # [B, C, Nkv, Dh]
    segment_ids: jax.Array  # [B, C] int32
    position: jax.Array  # [B] int32, tokens seen so far
    last_segment: jax.Array  # [B] int32, segment of the last token seen


class AddedTokens(struct.PyTreeNode):
    """What a call adds to the state: the youngest tokens, as many as there are slots for."""

    keys: jax.Array  # [B, T, Nkv, Dh]
    values: jax.Array  # [B, T, Nkv, Dh]
    segment_ids: jax.Array  # [B, T] int32
    position: jax.Array  # [B] int32, tokens seen so far, these included


class SlidingWindowAttention(nnx.Module):
    """Causal softmax attention over the last `window` tokens, with rotary position embedding.

    Rotary angles (arXiv 2104.09864) and softmax are computed in float32. Parameters: 4 M^2 when
    num_heads * head_dim = M and num_kv_heads = num_heads, plus biases.

    Args:
      features: size M of the last axis of input and output.
      num_heads: number of query heads.
      window: number of tokens that a token sees, its own included; None: all before it.
      num_kv_heads: number of key/value heads, a divisor of num_heads; None: num_heads.
      head_dim: features per head, an even number; None: features / num_heads.
      rope_base: wavelength base of the rotary embedding.
      rope_scaling: how its frequencies are slowed down for long sequences; None: not at all.
      use_bias: whether the four projections have biases.
      qkv_bias: the same of the first three alone; None: as `use_bias` says.
      qk_norm: whether every head's queries and keys go through an RMSNorm before they are rotated
        (arXiv 2302.05442), one for queries and one for keys, shared by the heads.
      norm_epsilon: added to the mean square in these norms.
      norm_offset: these norms multiply by it plus their scale.
      scale: what logits are multiplied by; None: head_dim ** -0.5.
      logits_soft_cap: logits become cap * tanh(logits / cap) before the softmax; None: left alone.
      dtype: dtype of the computation; None: that of input and parameters together.
      param_dtype: dtype of the parameters.
      rngs: source of the `params` keys.

    Raises:
      ValueError: sizes that do not divide as described, a window below 1, a scale or a soft cap
        that is not above 0.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        window: int | None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_base: float = 10_000.0,
        rope_scaling: RopeScaling | None = None,
        use_bias: bool = False,
        qkv_bias: bool | None = None,
        qk_norm: bool = False,
        norm_epsilon: float = 1e-6,
        norm_offset: float = 0.0,
        scale: float | None = None,
        logits_soft_cap: float | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads={num_heads}, num_kv_heads={num_kv_heads}; "
                "both must be at least 1 and the second must divide the first"
            )
        if head_dim is None:
            if features % num_heads:
                raise ValueError(
                    f"features={features} is not a multiple of num_heads={num_heads}; "
                    "choose another number of heads or give head_dim"
                )
            head_dim = features // num_heads
        if head_dim < 2 or head_dim % 2:
            raise ValueError(
                f"head_dim={head_dim}; rotary embedding turns pairs of features, so it must be even"
            )
        if window is not None and window < 1:
            raise ValueError(f"window={window}; it must be at least 1, or None for no window")
        for name, value in (("scale", scale), ("logits_soft_cap", logits_soft_cap)):
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}; it must be above 0, or None")
        self.features = features
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.window = window
        self.rope_base = rope_base
        self.rope_scaling = rope_scaling
        self.scale = scale
        self.logits_soft_cap = logits_soft_cap
        self.dtype = dtype
        self.param_dtype = param_dtype
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        inputs = {"use_bias": use_bias if qkv_bias is None else qkv_bias, **options}
        inner, inner_kv = num_heads * head_dim, num_kv_heads * head_dim
        self.query = linear(features, inner, ("embed", "heads"), **inputs)
        self.key = linear(features, inner_kv, ("embed", "kv_heads"), **inputs)
        self.value = linear(features, inner_kv, ("embed", "kv_heads"), **inputs)
        self.output = linear(inner, features, ("heads", "embed"), use_bias=use_bias, **options)
        self.qk_norm = qk_norm
        if qk_norm:
            norm = {"epsilon": norm_epsilon, "offset": norm_offset, **options}
            self.query_norm = rms_norm(head_dim, **norm)
            self.key_norm = rms_norm(head_dim, **norm)

    def init_state(self, batch: int, *, max_length: int) -> AttentionState:
        """Make the state before any token.

        Args:
          batch: number of streams B.
          max_length: for window=None, the number of tokens a stream may reach; a window needs no
            more than its own length and ignores it.
        """
        slots = max_length if self.window is None else self.window
        if slots < 1:
            raise ValueError(f"max_length={max_length}; a cache needs room for at least 1 token")
        dtype = self.param_dtype if self.dtype is None else self.dtype
        shape = (batch, slots, self.num_kv_heads, self.head_dim)
        return AttentionState(
            keys=jnp.zeros(shape, dtype),
            values=jnp.zeros(shape, dtype),
            segment_ids=jnp.full((batch, slots), _EMPTY, jnp.int32),
            position=jnp.zeros(batch, jnp.int32),
            last_segment=jnp.zeros(batch, jnp.int32),
        )

    def __call__(
        self,
        x: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        state: AttentionState | None = None,
    ) -> jax.Array | tuple[jax.Array, AttentionState]:
        """Attend x, from the start of a stream or, with a state, from where it stands.

        Feeding a stream in pieces of any lengths gives what one call over all of it gives.

        Args:
          x: [B, T, M].
          positions: [B, T] int32, position within the document, for the rotary embedding only;
            None: counted from the first token of the stream.
          segment_ids: [B, T] int32; tokens of different segments never see each other. None: one
            segment, and with a state the segment of the last token before.
          state: what `init_state` or an earlier call returned.

        Returns:
          [B, T, M]; with a state, a pair of it and the new state.

        Raises:
          ValueError: the cache of full attention is too short for the tokens. Under jit the number
            of tokens before is not known; there the result is NaN once the cache has overflowed.
        """
        if state is None:
            start = jnp.zeros(x.shape[0], jnp.int32)
            _, q, k, v = self._project(x, start, positions)
            return self._project_back(self._attend(q, k, v, segment_ids))
        y, added = self.advance(x, positions=positions, segment_ids=segment_ids, state=state)
        return y, self.absorb(state, added)

    def advance(
        self,
        x: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        state: AttentionState,
    ) -> tuple[jax.Array, AddedTokens]:
        """Attend x as a call does, but return the tokens to add instead of the new state.

        So that a caller with the states of many layers in one array, of which it gives each layer
        its part, can write all their tokens there with one `absorb`.
        """
        batch, length, _ = x.shape
        stream_index, q, k, v = self._project(x, state.position, positions)
        if segment_ids is None:
            segment_ids = jnp.broadcast_to(state.last_segment[:, None], (batch, length))
        segment_ids = segment_ids.astype(jnp.int32)
        k, v = k.astype(state.keys.dtype), v.astype(state.values.dtype)
        out = self._attend_cached(q.astype(k.dtype), k, v, stream_index, segment_ids, state)
        kept = min(length, state.keys.shape[1])
        added = AddedTokens(
            keys=k[:, -kept:],
            values=v[:, -kept:],
            segment_ids=segment_ids[:, -kept:],
            position=state.position + length,
        )
        return self._project_back(out), added

    @staticmethod
    def absorb(state: AttentionState, added: AddedTokens) -> AttentionState:
        """Put tokens that `advance` returned into their slots."""
        slots, kept = state.keys.shape[1], added.keys.shape[1]
        rows = jnp.arange(added.keys.shape[0])[:, None]
        columns = (added.position[:, None] - kept + jnp.arange(kept, dtype=jnp.int32)) % slots
        return AttentionState(
            keys=state.keys.at[rows, columns].set(added.keys),
            values=state.values.at[rows, columns].set(added.values),
            segment_ids=state.segment_ids.at[rows, columns].set(added.segment_ids),
            position=added.position,
            last_segment=added.segment_ids[:, -1],
        )

    def _project(self, x, start, positions):
        """Places in the stream [B, T], and queries, keys and values with their positions in."""
        batch, length, _ = x.shape
        stream_index = start[:, None] + jnp.arange(length, dtype=jnp.int32)
        positions = stream_index if positions is None else positions
        q = self.query(x).reshape(batch, length, self.num_heads, self.head_dim)
        k = self.key(x).reshape(batch, length, self.num_kv_heads, self.head_dim)
        v = self.value(x).reshape(batch, length, self.num_kv_heads, self.head_dim)
        if self.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        rope = {"base": self.rope_base, "scaling": self.rope_scaling}
        q, k = (rotary_embedding(h, positions, **rope) for h in (q, k))
        return stream_index, q, k, v

    def _project_back(self, out: jax.Array) -> jax.Array:
        return self.output(out.reshape(*out.shape[:2], self.num_heads * self.head_dim))

    def _attend_cached(self, q, k, v, stream_index, segment_ids, state: AttentionState):
        length, slots = q.shape[1], state.keys.shape[1]
        if self.window is None or length == 1:
            if self.window is None:
                _check_room(state.position, length, slots)
            # Slot s holds the youngest token n before these with n % slots = s.
            newest = state.position[:, None] - 1
            cached_index = newest - (newest - jnp.arange(slots, dtype=jnp.int32)) % slots
            out = cached_attention(
                q,
                k,
                v,
                state.keys,
                state.values,
                query_index=stream_index,
                cached_index=cached_index,
                segment_ids=segment_ids,
                cached_segment_ids=state.segment_ids,
                window=self.window,
                scale=self.scale,
                logits_soft_cap=self.logits_soft_cap,
            )
            if self.window is None:
                overflowed = state.position + length > slots
                out = jnp.where(overflowed[:, None, None, None], jnp.nan, out)
            return out
        # For a longer piece the cache is put in order, followed by the piece: one sequence.
        order = (state.position[:, None] + jnp.arange(slots, dtype=jnp.int32)) % slots
        cached = (state.keys, state.values, state.segment_ids)
        keys, values, segments = (
            jnp.concatenate([_take(old, order), added], axis=1)
            for old, added in zip(cached, (k, v, segment_ids), strict=True)
        )
        return self._attend(q, keys, values, segments)

    def _attend(self, q, k, v, segment_ids) -> jax.Array:
        return sliding_window_attention(
            q,
            k,
            v,
            window=self.window,
            segment_ids=segment_ids,
            scale=self.scale,
            logits_soft_cap=self.logits_soft_cap,
        )


def _take(x: jax.Array, order: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)


def _check_room(position: jax.Array, length: int, slots: int) -> None:
    before = 0 if isinstance(position, jax.core.Tracer) else int(position.max())
    if before + length > slots:
        raise ValueError(
            f"{length} tokens after {before} do not fit into a cache of max_length={slots}; "
            "make the state with a larger max_length, or give the layer a window"
        )
