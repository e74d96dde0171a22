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
    state: RecurrenceState | Array | None,
    shape: tuple[int, int, int],
    block_size: int,
    lookback: int | None,
    dtype: jnp.dtype,
) -> tuple[Array | None, Array | None, Array | None]:
    """Translate an `initial_state` argument into what the block form starts from.

    Args:
        state: the argument.
        shape: (B, H, D) of the call.
        block_size, lookback: the call's window.
        dtype: dtype of the maths.

    Returns:
        local [B, 1, H, D], the state that the first block has reached before the first token;
        previous [B, K, H, D], the carriers of the blocks before it, oldest first, decayed up to
        that token; position [B], its place in its block. None stands for zero.
    """
    if state is None:
        return None, None, None
    validation.check_initial_state(state, shape, block_size, lookback)
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
    local: Array | None,
    previous: Array | None,
    position: Array | None,
    *,
    block_size: int,
    lookback: int | None,
) -> RecurrenceState:
    """Return the state after the last token, from what the block form knows of each block.

    Args:
        time: tokens of the call.
        block_decays: product of each block's decays, [B, n, H].
        carriers: last local state of each block, [B, n, H, D]; tokens after the last one count as
            a = 1, u = 0.
        local, previous, position: as `initial_carriers` returned them.
        block_size, lookback: the call's window.
    """
    batch, _, heads, features = carriers.shape
    if lookback is None:
        end = carriers[:, 0]
        if previous is not None:
            end = end + block_decays[:, 0, :, None] * previous[:, 0]
        empty = RecurrenceState.zeros(
            batch, heads, features, block_size=block_size, lookback=None, dtype=end.dtype
        )
        return empty.replace(local=end)

    if local is not None:
        carriers = carriers.at[:, :1].add(block_decays[:, :1, :, None] * local)
    before = lookback if previous is None else previous.shape[1]
    if previous is None:
        previous = jnp.zeros((batch, before, heads, features), carriers.dtype)
    missing = lookback - before  # an array as initial state is a single carrier
    # Entry lookback + t is block t; one empty block more, for a sequence that ends at an edge.
    carriers = jnp.pad(
        jnp.concatenate([previous, carriers], axis=1), ((0, 0), (missing, 1), (0, 0), (0, 0))
    )
    block_decays = jnp.pad(block_decays, ((0, 0), (lookback, 1), (0, 0)), constant_values=1)

    end = jnp.full((batch,), time) if position is None else position + time
    current = lookback + end // block_size
    index = current[:, None] - jnp.arange(lookback + 1)
    carriers = jnp.take_along_axis(carriers, index[..., None, None], axis=1)
    block_decays = jnp.take_along_axis(block_decays, index[..., None], axis=1)
    return RecurrenceState(
        local=carriers[:, 0],
        carriers=carriers[:, 1:],
        decays=jnp.cumprod(block_decays, axis=1)[:, :lookback],
        position=(end % block_size).astype(jnp.int32),
        block_size=block_size,
        lookback=lookback,
    )
