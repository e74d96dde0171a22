"""The recurrence's streaming state, and its two crossings with the block form."""

import dataclasses

import jax
import jax.numpy as jnp

from swr_jax.ops import validation

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecurrenceState:
    """What a recurrence remembers between calls; its size does not depend on how much it has read.

    The state that a token sees is local + sum_k decays[:, k] * carriers[:, k]. With lookback None
    all of it is in `local`, and K = 0.

    Attributes:
        local: state of the current block, started from zero, [B, H, D].
        carriers: last local states of the K = lookback blocks before it, newest first,
            [B, K, H, D].
        decays: product of all decays since the end of each carrier's block, [B, K, H].
        position: tokens in the current block so far, int32 [B], 0 <= position < block_size;
            always 0 with lookback None.
        block_size: static; the window that the state belongs to.
        lookback: static; the window that the state belongs to.
    """

    local: Array
    carriers: Array
    decays: Array
    position: Array
    block_size: int = dataclasses.field(metadata={"static": True})
    lookback: int | None = dataclasses.field(metadata={"static": True})

    @classmethod
    def zeros(
        cls,
        batch: int,
        num_heads: int,
        head_dim: int,
        *,
        block_size: int = 16,
        lookback: int | None = 1,
        dtype: jnp.dtype = jnp.float32,
    ) -> "RecurrenceState":
        """Return the state of a sequence that has not begun."""
        validation.check_window(block_size, lookback)
        kept = lookback or 0
        return cls(
            local=jnp.zeros((batch, num_heads, head_dim), dtype),
            carriers=jnp.zeros((batch, kept, num_heads, head_dim), dtype),
            decays=jnp.ones((batch, kept, num_heads), dtype),
            position=jnp.zeros((batch,), jnp.int32),
            block_size=block_size,
            lookback=lookback,
        )

    def replace(self, **changes) -> "RecurrenceState":
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def initial_carriers(
    state: RecurrenceState | Array | None, lookback: int | None, dtype: jnp.dtype
) -> tuple[Array | None, Array | None, Array | None]:
    """Translate an `initial_state` argument into what the block form starts from.

    Args:
        state: the argument, validated.
        lookback: of the call.
        dtype: dtype of the maths.

    Returns:
        local [B, 1, H, D], the state that the first block has reached before the first token;
        previous [B, K, H, D], the carriers of the blocks before it, oldest first, decayed up to
        that token; position [B], its place in its block. None stands for zero.
    """
    if state is None:
        return None, None, None
    if not isinstance(state, RecurrenceState):
        return None, state.astype(dtype)[:, None], None
    local = state.local.astype(dtype)[:, None]
    if lookback is None:
        return None, local, None
    if lookback == 0:
        return local, None, state.position
    previous = state.decays[..., None].astype(dtype) * state.carriers.astype(dtype)
    return local, previous[:, ::-1], state.position


def state_after(
    time: int,
    block_decays: Array,
    carriers: Array,
    initial_state: RecurrenceState | Array | None,
    *,
    block_size: int,
    lookback: int | None,
) -> RecurrenceState:
    """Return the state after the last token, from what the block form knows of each block.

    Args:
        time: tokens of the call.
        block_decays: product of each block's decays, [B, n, H].
        carriers: last local state of each block, started from zero, [B, n, H, D]; tokens after the
            last one count as a = 1, u = 0.
        initial_state: the argument of the call.
        block_size, lookback: the call's window.
    """
    before = _full_state(initial_state, carriers, block_size, lookback)
    first = carriers[:, :1]
    if initial_state is not None:
        first = first + block_decays[:, :1, :, None] * before.local[:, None]
    if lookback is None:
        return before.replace(local=first[:, 0])

    # Entry lookback + t is block t; one empty block more, for a sequence that ends at an edge.
    carriers = jnp.concatenate([before.carriers[:, ::-1], first, carriers[:, 1:]], axis=1)
    carriers = jnp.pad(carriers, ((0, 0), (0, 1), (0, 0), (0, 0)))
    # What each entry has decayed by before the first token, and by each block from then on.
    blocks = ((0, 0), (0, carriers.shape[1] - lookback), (0, 0))
    decayed = jnp.pad(before.decays[:, ::-1], blocks, constant_values=1)
    block_decays = jnp.pad(block_decays, ((0, 0), (lookback, 1), (0, 0)), constant_values=1)

    end = before.position + time
    index = lookback + (end // block_size)[:, None] - jnp.arange(lookback + 1)
    carriers = jnp.take_along_axis(carriers, index[..., None, None], axis=1)
    since = jnp.cumprod(jnp.take_along_axis(block_decays, index[..., None], axis=1), axis=1)
    return before.replace(
        local=carriers[:, 0],
        carriers=carriers[:, 1:],
        decays=since[:, :-1] * jnp.take_along_axis(decayed, index[:, 1:, None], axis=1),
        position=end % block_size,
    )


def _full_state(
    state: RecurrenceState | Array | None, like: Array, block_size: int, lookback: int | None
) -> RecurrenceState:
    """Spell an `initial_state` argument out, for carriers [B, n, H, D] like those of the call."""
    batch, _, heads, features = like.shape
    zeros = RecurrenceState.zeros(
        batch, heads, features, block_size=block_size, lookback=lookback, dtype=like.dtype
    )
    if state is None:
        return zeros
    if lookback is None:
        local = state.local if isinstance(state, RecurrenceState) else state
        return zeros.replace(local=local.astype(like.dtype))
    if isinstance(state, RecurrenceState):
        return zeros.replace(
            local=state.local.astype(like.dtype),
            carriers=state.carriers.astype(like.dtype),
            decays=state.decays.astype(like.dtype),
            position=state.position,
        )
    return zeros.replace(carriers=zeros.carriers.at[:, 0].set(state.astype(like.dtype)))
