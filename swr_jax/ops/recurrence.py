"""Sliding-window and linear recurrences: validation, dispatch, streaming state.

One family, named by its window. Time is cut into blocks of `block_size` tokens; a token sees its
own block up to itself, and the whole of the `lookback` blocks before it:

    x_i = sum over the visible j <= i of  a_i a_{i-1} ... a_{j+1} u_j

`lookback=1` is the sliding-window recurrence (SWR), `lookback=0` stops at the block's edge,
`lookback=None` is the exact linear recurrence x_i = a_i x_{i-1} + u_i. Source: arXiv 2512.13921.
"""

import functools

import jax
import jax.numpy as jnp

from swr_jax.ops import validation
from swr_jax.ops.dispatch import by_first_able, candidates
from swr_jax.ops.evaluation import evaluate
from swr_jax.ops.sharded import over_mesh, reach_of, split_of, with_state_over_mesh
from swr_jax.ops.state import RecurrenceState

Array = jax.Array


def sliding_window_recurrence(
    a: Array,
    u: Array,
    *,
    block_size: int = 16,
    lookback: int | None = 1,
    initial_state: RecurrenceState | Array | None = None,
    segment_ids: Array | None = None,
    return_state: bool = False,
    implementation: str | None = None,
) -> Array | tuple[Array, RecurrenceState]:
    """Linear recurrence x_i = a_i x_{i-1} + u_i within a block-aligned sliding window.

    Runs in linear time and memory, any T >= 1, H >= 1, D >= 1. The maths is in float32 (float64
    where an input is float64), free of logarithms and divisions: a = 0 is exact, and so is the
    gradient for every array argument, initial state included. Reverse mode only.

    Args:
        a: decays [B, T, H], normally in [0, 1]; any floating dtype.
        u: inputs [B, T, H, D]; any floating dtype.
        block_size: tokens in a block, a power of two.
        lookback: how many previous blocks a token sees: 0, 1, ..., or None for all of them (the
            exact recurrence; `block_size` then changes nothing).
        initial_state: what came before: a `RecurrenceState`, from an earlier call or from
            `RecurrenceState.zeros`; or an array [B, H, D], the carrier of a block that ended just
            before the first token (needs lookback != 0).
        segment_ids: integers [B, T]; where they change from one token to the next the recurrence
            starts anew, exactly. The first token continues `initial_state` in any case.
        return_state: also return the state after the last token.
        implementation: "xla"; "mosaic_gpu", the kernels for Hopper GPUs (D a multiple of 8,
            block_size 16 to 128, lookback 0, 1 or None); or None for the best one that the device
            has and that covers the call. A named one is never replaced by another. The device is
            that of the mesh in context (`jax.set_mesh`), else the default one.

    Returns:
        x [B, T, H, D] in u's dtype; with `return_state`, the pair (x, RecurrenceState).

    Raises:
        ValueError: a rank, size, dtype or option that the above rules out, or an implementation
            that the device lacks.
        NotImplementedError: the named implementation does not cover the call; says why.
        TypeError: forward-mode differentiation (from JAX).
    """
    return _recurrence(
        a,
        u,
        None,
        block_size=block_size,
        lookback=lookback,
        initial_state=initial_state,
        segment_ids=segment_ids,
        return_state=return_state,
        implementation=implementation,
    )


def linear_recurrence(
    a: Array,
    u: Array,
    *,
    block_size: int = 16,
    initial_state: RecurrenceState | Array | None = None,
    segment_ids: Array | None = None,
    return_state: bool = False,
    implementation: str | None = None,
) -> Array | tuple[Array, RecurrenceState]:
    """Exact linear recurrence x_i = a_i x_{i-1} + u_i, by the hierarchical decomposition.

    `sliding_window_recurrence` with `lookback=None`: the carriers of blocks are solved by the
    recurrence's own block algorithm, level upon level, so that rounding errors grow with log T
    and temporary memory is a small fraction of u. See there for dtypes, gradients, errors.

    Args:
        a: decays [B, T, H].
        u: inputs [B, T, H, D].
        block_size: accepted as by `sliding_window_recurrence`; the result does not depend on it.
        initial_state: `RecurrenceState` with lookback None, or x_0 as an array [B, H, D].
        segment_ids: integers [B, T]; a change starts the recurrence anew.
        return_state: also return the state after the last token.
        implementation: as by `sliding_window_recurrence`.

    Returns:
        x [B, T, H, D] in u's dtype; with `return_state`, the pair (x, RecurrenceState).
    """
    return sliding_window_recurrence(
        a,
        u,
        block_size=block_size,
        lookback=None,
        initial_state=initial_state,
        segment_ids=segment_ids,
        return_state=return_state,
        implementation=implementation,
    )


def gated_sliding_window_recurrence(
    a: Array,
    b: Array,
    c: Array,
    v: Array,
    *,
    block_size: int = 16,
    lookback: int | None = 1,
    initial_state: RecurrenceState | Array | None = None,
    segment_ids: Array | None = None,
    return_state: bool = False,
    implementation: str | None = None,
) -> Array | tuple[Array, RecurrenceState]:
    """Gated recurrence o = SWR(a, b * v) * c + v: the core of the Phalanx layer.

    Neither b * v nor the recurrence's own output is written to memory. Gates may be shared by
    groups of heads, as keys and values are in grouped-query attention: head h uses gate
    h // (H / K). Maths, gradients and errors as in `sliding_window_recurrence`.

    Args:
        a: decays [B, T, H].
        b: pre-gate [B, T, K, D], K a divisor of H.
        c: post-gate [B, T, K, D].
        v: values [B, T, H, D].
        block_size, lookback, initial_state, segment_ids, return_state, implementation: as in
            `sliding_window_recurrence`.

    Returns:
        o [B, T, H, D] in v's dtype; with `return_state`, the pair (o, RecurrenceState).
    """
    return _recurrence(
        a,
        v,
        (b, c),
        block_size=block_size,
        lookback=lookback,
        initial_state=initial_state,
        segment_ids=segment_ids,
        return_state=return_state,
        implementation=implementation,
    )


def recurrence_step(
    state: RecurrenceState, a_t: Array, u_t: Array
) -> tuple[RecurrenceState, Array]:
    """One token of the recurrence, in time and memory that do not depend on how many came before.

    A run of steps returns what `sliding_window_recurrence` returns for the whole sequence.

    Args:
        state: from `RecurrenceState.zeros`, an earlier step, or an operator's `return_state`.
        a_t: decays [B, H].
        u_t: inputs [B, H, D].

    Returns:
        The state after the token, and x_t [B, H, D] in u_t's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit each other or the state.
    """
    validation.check_step(a_t, u_t, state.local.shape)
    a = a_t.astype(state.local.dtype)
    local = a[..., None] * state.local + u_t.astype(state.local.dtype)
    if state.lookback is None:
        return state.replace(local=local), local.astype(u_t.dtype)

    decays = a[:, None] * state.decays
    x = local + jnp.sum(decays[..., None] * state.carriers, axis=1)
    position = state.position + 1
    ended = (position == state.block_size)[:, None, None]
    # A block that ends hands its local state on as the newest carrier; the oldest one drops out.
    carriers = jnp.concatenate([local[:, None], state.carriers], axis=1)[:, : state.lookback]
    after = jnp.concatenate([jnp.ones_like(a)[:, None], decays], axis=1)[:, : state.lookback]
    return state.replace(
        local=jnp.where(ended, 0, local),
        carriers=jnp.where(ended[..., None], carriers, state.carriers),
        decays=jnp.where(ended, after, decays),
        position=position % state.block_size,
    ), x.astype(u_t.dtype)


def reset_decays(a: Array, segment_ids: Array) -> Array:
    """Set the decay of each segment's first token to zero, the call's very first token excepted."""
    starts = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = jnp.pad(starts, ((0, 0), (1, 0)))
    return jnp.where(starts[..., None], jnp.zeros((), a.dtype), a)


def _recurrence(
    a, v, gates, *, block_size, lookback, initial_state, segment_ids, return_state, implementation
):
    validation.check_window(block_size, lookback)
    validation.check_inputs(a, v, gates, segment_ids)
    if initial_state is not None:
        shape = (v.shape[0], *v.shape[2:])
        validation.check_initial_state(initial_state, shape, block_size, lookback)
    dtype = functools.reduce(
        jnp.promote_types, (x.dtype for x in (a, v, *(gates or ()))), jnp.dtype(jnp.float32)
    )
    if segment_ids is not None:
        a = reset_decays(a, segment_ids)

    names = candidates(implementation)

    def evaluated(a, v, gates, initial_state):
        call = functools.partial(
            evaluate,
            a=a,
            v=v,
            gates=gates,
            block_size=block_size,
            lookback=lookback,
            initial_state=initial_state,
            return_state=return_state,
            dtype=dtype,
        )
        return by_first_able(names, call)

    window = {"block_size": block_size, "lookback": lookback}
    split_heads = v.shape[2] if gates is None else gates[0].shape[2]
    split = split_of(*v.shape[:2], split_heads, reach=reach_of(**window))
    if initial_state is not None or return_state:
        # XLA splits its own form without help, and for CPUs jaxlib 0.11 crashes while it compiles
        # some of this under `shard_map`; a kernel must be told.
        if split is not None and split.sequence == 1 and names[0] != "xla":
            evaluated = with_state_over_mesh(evaluated, split, return_state, **window)
        out, state = evaluated(a, v, gates, initial_state)
        return (out, state) if return_state else out
    if split is None:
        return evaluated(a, v, gates, None)[0]
    return over_mesh(
        lambda *arguments: evaluated(*arguments)[0], split, a, v, gates, dtype=dtype, **window
    )
