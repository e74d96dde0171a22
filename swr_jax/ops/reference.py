"""Float64 oracles for sliding-window recurrences, in plain NumPy.

Every function follows one published formula as literally as it can and favours being obviously
right over being fast; inputs of any dtype are converted to float64 and so are all results. The
operators of this package are tested against these functions, and these functions against each
other: several independent routes lead to the same numbers.

Notation (i, j, s index time, t indexes blocks):

    a [B, T, H]      decay, one scalar per token and head      L   transfer operator (I - AZ)^-1
    u [B, T, H, D]   input                                     w   local states of a block
    x [B, T, H, D]   output (the states)                       v   carrier: last row of w
    block_size       tokens per block                          g   inclusive decay prefix of a block
    lookback         previous blocks that a token sees: 0, 1, k, or None for all of them

No function divides by a decay or takes its logarithm, so a = 0 is exact everywhere.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray


class RecurrenceState(NamedTuple):
    """State of a recurrence between two tokens; x = local + sum_k decays_k * carriers_k.

    Attributes:
        local: [B, H, D], the current block's state, started from zero. With ``lookback=None`` it is
            the whole state and is never reset.
        carriers: [B, K, H, D], last local states of the K = lookback previous blocks, most recent
            first; K = 0 with ``lookback=None``.
        decays: [B, K, H], product of all decays since the end of that carrier's block.
        position: [B] int32, tokens already in the current block, 0 .. block_size - 1; always 0 with
            ``lookback=None``.
    """

    local: Array
    carriers: Array
    decays: Array
    position: Array


class Decomposition(NamedTuple):
    """Parts of L = blkdiag(local) + blkdiag(prefix) Z_b carrier_operator blkdiag(last_row)."""

    local: Array  # L_t, [..., b, block_size, block_size]
    prefix: Array  # g_t = (a_1, a_1 a_2, ...) of each block, [..., b, block_size]
    last_row: Array  # r_t, last row of L_t, [..., b, block_size]
    block_decay: Array  # c_t, last entry of g_t, [..., b]
    carrier_operator: Array  # T_c = (I - C Z_b)^-1, [..., b, b]
    length: int  # T; b * block_size exceeds it by the padding of the last block


def relative_rms(actual: Any, expected: Any) -> float:
    """Root mean square of ``actual - expected`` over that of ``expected``, in float64 (0/0 is 0).

    Raises:
        ValueError: the shapes differ (broadcasting would hide a mistake).
    """
    actual, expected = _float64(actual), _float64(expected)
    if actual.shape != expected.shape:
        raise ValueError(f"actual {actual.shape} must have the shape of expected {expected.shape}")
    difference, scale = np.linalg.norm(actual - expected), np.linalg.norm(expected)
    if scale == 0:
        return 0.0 if difference == 0 else float(np.inf if difference > 0 else np.nan)
    return float(difference / scale)


def finite_difference_gradient(f: Callable[[Array], Any], x: Any, *, step: float = 1e-5) -> Array:
    """Gradient of the scalar function ``f`` at ``x`` by central differences in float64.

    Outputs and states of every recurrence here are affine in each single number they depend on;
    for such functions ``step=1.0`` has no truncation error: the result is exact to rounding.
    """
    x = _float64(x)
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        above, below = x.copy(), x.copy()
        above[index] += step
        below[index] -= step
        gradient[index] = (float(f(above)) - float(f(below))) / (2 * step)
    return gradient


def zero_state(batch: int, heads: int, features: int, lookback: int | None) -> RecurrenceState:
    """State before the first token: no local state, zero carriers under unit decays, position 0."""
    return RecurrenceState(
        local=np.zeros((batch, heads, features)),
        carriers=np.zeros((batch, lookback or 0, heads, features)),
        decays=np.ones((batch, lookback or 0, heads)),
        position=np.zeros((batch,), np.int32),
    )


def reset_decays(a: Any, segment_ids: Any) -> Array:
    """``a`` with exact zeros at t >= 1 where ``segment_ids[t] != segment_ids[t - 1]``.

    The first token is left alone: it may continue the segment of an initial state.
    """
    a = _float64(a).copy()
    if segment_ids is not None:
        a[_segment_starts(segment_ids)] = 0.0
    return a


def linear_recurrence(a: Any, u: Any, initial: Any = None) -> Array:
    """x_i = a_i x_{i-1} + u_i, one token after the other, from x_0 = ``initial`` [B, H, D]."""
    a, u = _float64(a), _float64(u)
    state = np.zeros_like(u[:, 0]) if initial is None else _float64(initial)
    x = np.empty_like(u)
    for i in range(u.shape[1]):
        state = a[:, i, :, None] * state + u[:, i]
        x[:, i] = state
    return x


def transfer_operator(a: Any) -> Array:
    """L [..., T, T] of decays [..., T]: L_ij = a_i a_{i-1} ... a_{j+1}, 1 on the diagonal."""
    a = _float64(a)
    i, j = np.indices((a.shape[-1], a.shape[-1]))
    return np.tril(np.cumprod(np.where(i > j, a[..., :, None], 1.0), axis=-2))


def apply_operator(operator: Array, u: Any) -> Array:
    """Apply [B, H, T, S] over time to u [B, S, H, D], giving [B, T, H, D]."""
    return np.einsum("bhts,bshd->bthd", operator, _float64(u), optimize=True)


def kogge_stone_factors(a: Any) -> list[Array]:
    """Factors I + (AZ)^(2^n) [..., T, T] whose product, in any order, is L for decays [..., T]."""
    a = _float64(a)
    length = a.shape[-1]
    power = a[..., :, None] * np.eye(length, k=-1)
    factors = []
    for _ in range(max(1, (length - 1).bit_length())):
        factors.append(np.eye(length) + power)
        power = power @ power
    return factors


def hierarchical_decomposition(a: Any, block_size: int) -> Decomposition:
    """Cut L, for decays [..., T] of any T >= 1, into blocks joined by the carrier system."""
    a = _float64(a)
    length = a.shape[-1]
    padding = [(0, 0)] * (a.ndim - 1) + [(0, -length % block_size)]
    blocks = np.pad(a, padding).reshape(*a.shape[:-1], -1, block_size)
    local = transfer_operator(blocks)
    prefix = blocks[..., :1] * local[..., :, 0]
    block_decay = prefix[..., -1]
    carrier_operator = transfer_operator(block_decay)
    return Decomposition(local, prefix, local[..., -1, :], block_decay, carrier_operator, length)


def neumann_series(decomposition: Decomposition, lookback: int | None) -> Array:
    """First ``lookback`` terms of T_c = sum_n (C Z_b)^n [..., b, b]; None keeps all of them."""
    operator = decomposition.carrier_operator
    if lookback is None:
        return operator
    t, s = np.indices(operator.shape[-2:])
    return np.where(t - s < lookback, operator, 0.0)


def assemble(decomposition: Decomposition, lookback: int | None = None) -> Array:
    """The dense operator [..., T, T] that a decomposition stands for (see `neumann_series`)."""
    local, prefix, last_row, _, _, length = decomposition
    blocks, block_size = prefix.shape[-2:]
    diagonal = np.einsum("...tij,ts->...tisj", local, np.eye(blocks))
    shifted = np.eye(blocks, k=-1) @ neumann_series(decomposition, lookback)
    coupled = np.einsum("...ti,...ts,...sj->...tisj", prefix, shifted, last_row)
    padded = (diagonal + coupled).reshape(*prefix.shape[:-2], *(2 * [blocks * block_size]))
    return padded[..., :length, :length]


def evaluate(decomposition: Decomposition, u: Any, lookback: int | None = None) -> Array:
    """Apply a decomposition of decays [B, H, T] to u [B, T, H, D], never forming L."""
    local, prefix, last_row, _, _, length = decomposition
    blocked = _blocked(u, prefix.shape[-1])
    carriers = np.einsum("bhsj,bsjhd->bhsd", last_row, blocked)
    arriving = np.eye(prefix.shape[-2], k=-1) @ neumann_series(decomposition, lookback) @ carriers
    x = np.einsum("bhtij,btjhd->btihd", local, blocked)
    x += np.einsum("bhti,bhtd->btihd", prefix, arriving)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def window_mask(blocks: Array, lookback: int | None) -> Array:
    """[..., S, S] bool: the past tokens seen by each token, given its block index [..., S]."""
    causal = np.tri(blocks.shape[-1], dtype=bool)
    distance = blocks[..., :, None] - blocks[..., None, :]
    return causal & (distance <= (np.inf if lookback is None else lookback))


def sliding_window_recurrence(
    a: Any,
    u: Any,
    *,
    block_size: int,
    lookback: int | None = 1,
    segment_ids: Any = None,
    initial_state: RecurrenceState | None = None,
) -> Array:
    """The definition of the sliding-window recurrence: the dense L, masked to the window.

    Kept entries are those of the exact recurrence, older ones exactly zero. The window is jagged:
    position p of a block sees p + 1 + lookback * block_size tokens. Memory grows with T^2.

    Args:
        a: [B, T, H] decays.
        u: [B, T, H, D] inputs.
        block_size: tokens per block, >= 1. The first block is shorter if ``initial_state`` already
            holds some of its tokens.
        lookback: previous blocks seen, >= 0, or None for the exact linear recurrence.
        segment_ids: [B, T] integers or None, see `reset_decays`.
        initial_state: state to continue from, None for `zero_state`.

    Returns:
        x: [B, T, H, D] float64.
    """
    operator, kept, inputs, _ = _dense(a, u, block_size, lookback, segment_ids, initial_state)
    return apply_operator(operator * kept, inputs)[:, -np.shape(u)[1] :]


def block_two_pass(a: Any, u: Any, *, block_size: int, lookback: int | None = 1) -> Array:
    """The same by two passes: w_t = L_t u_t in each block, then x_t = w_t + g_t (carriers seen).

    Memory and time grow with T, so it also serves as the oracle of long sequences.
    """
    a, w = _blocked(a, block_size), _blocked(u, block_size)
    for i in range(1, block_size):
        w[:, :, i] += a[:, :, i, :, None] * w[:, :, i - 1]
    prefix = np.cumprod(a, axis=2)
    # What block t receives: v_{t-1} + c_{t-1} (v_{t-2} + c_{t-2} (v_{t-3} + ...)), lookback terms.
    arriving = np.zeros_like(w[:, :, 0])
    for _ in range(a.shape[1] - 1 if lookback is None else min(lookback, a.shape[1] - 1)):
        arriving[:, 1:] = w[:, :-1, -1] + prefix[:, :-1, -1, :, None] * arriving[:, :-1]
    x = w + prefix[..., None] * arriving[:, :, None]
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : np.shape(u)[1]]


def stream(
    a: Any, u: Any, block_size: int, lookback: int | None, state: RecurrenceState | None = None
) -> tuple[Array, RecurrenceState]:
    """The same token by token in O(1) memory: outputs x and the state after the last token.

    Streaming a sequence in pieces, each continuing from the state of the one before, gives exactly
    what streaming it at once gives. ``state=None`` starts from `zero_state`.
    """
    a, u = _float64(a), _float64(u)
    state = _start(u, lookback, state)
    local, carriers, decays = (field.copy() for field in state[:3])
    position = state.position.copy()
    x = np.empty_like(u)
    for t in range(u.shape[1]):
        local = a[:, t, :, None] * local + u[:, t]
        decays = a[:, t, None] * decays
        x[:, t] = local + np.sum(decays[..., None] * carriers, axis=1)
        if lookback is None:
            continue
        position += 1
        for row in np.flatnonzero(position == block_size):
            # The block's local state becomes the most recent carrier; the oldest drops out.
            carriers[row] = np.concatenate([local[row][None], carriers[row]])[:lookback]
            decays[row] = np.concatenate([np.ones_like(a[:1, t]), decays[row]])[:lookback]
            local[row], position[row] = 0.0, 0
    return x, RecurrenceState(local, carriers, decays, position)


def gated_sliding_window_recurrence(a: Any, b: Any, c: Any, v: Any, **window: Any) -> Array:
    """y = SWR(a, b * v) * c + v, gates shared by groups of heads (index = head // (H / Hg)).

    Args:
        a: [B, T, H] decays.
        b: [B, T, Hg, D] pre-gate, Hg dividing H.
        c: [B, T, Hg, D] post-gate.
        v: [B, T, H, D] values.
        **window: keywords of `sliding_window_recurrence`.

    Returns:
        y: [B, T, H, D] float64.
    """
    v = _float64(v)
    b, c = _per_head(b, v.shape[2]), _per_head(c, v.shape[2])
    return sliding_window_recurrence(a, b * v, **window) * c + v


def sliding_window_gradients(a: Any, u: Any, x_bar: Any, **window: Any) -> dict[str, Array]:
    """Exact derivatives of sum(x * x_bar), entry by entry of the dense operator M = mask * L.

    x is M applied to the inputs, hence du = M^T x_bar. A kept entry M_ij is the product of
    a_{j+1} .. a_i; its derivative by a_s, j < s <= i, is the product without a_s, which is
    L_is L_{s-1,j}: no division. A decay that `reset_decays` overwrites has derivative zero.

    Args:
        a: [B, T, H] decays.
        u: [B, T, H, D] inputs.
        x_bar: [B, T, H, D] cotangent of x.
        **window: keywords of `sliding_window_recurrence`.

    Returns:
        Under "a", "u" and the state's "local", "carriers", "decays": derivatives shaped like each;
        without an initial state the last three are those at `zero_state`.
    """
    operator, kept, inputs, state = _dense(a, u, **window)
    length = np.shape(u)[1]
    virtual = inputs.shape[1] - length
    x_bar = np.pad(_float64(x_bar), [(0, 0), (virtual, 0), (0, 0), (0, 0)])
    dinputs = apply_operator((operator * kept).swapaxes(-1, -2), x_bar)
    # Cotangent of each entry of M; entries outside the window are constants.
    dentries = np.einsum("bihd,bjhd->bhij", x_bar, inputs, optimize=True) * kept
    # da_s = sum over i >= s > j of L_is dM_ij L_{s-1,j}; L is zero above the diagonal.
    by_later = operator[..., 1:].swapaxes(-1, -2) @ dentries
    da = np.sum(by_later * operator[..., :-1, :], axis=-1)[..., -length:].swapaxes(1, 2)
    if window.get("segment_ids") is not None:
        da[_segment_starts(window["segment_ids"])] = 0.0
    dcarried = dinputs[:, : virtual - 1][:, ::-1]
    return {
        "a": da,
        "u": dinputs[:, virtual:],
        "local": dinputs[:, virtual - 1],
        "carriers": dcarried * state.decays[..., None],
        "decays": np.sum(dcarried * state.carriers, axis=-1),
    }


def gated_gradients(a: Any, b: Any, c: Any, v: Any, y_bar: Any, **window: Any) -> dict[str, Array]:
    """Exact derivatives of sum(y * y_bar) for `gated_sliding_window_recurrence`.

    Returns:
        Under "a", "b", "c", "v", "local", "carriers", "decays": derivatives shaped like each.
    """
    v, y_bar = _float64(v), _float64(y_bar)
    grouped = (*v.shape[:2], np.shape(b)[2], -1, v.shape[3])
    b, c = _per_head(b, v.shape[2]), _per_head(c, v.shape[2])
    x = sliding_window_recurrence(a, b * v, **window)
    gradients = sliding_window_gradients(a, b * v, y_bar * c, **window)
    du = gradients.pop("u")
    db, dc = (gradient.reshape(grouped).sum(axis=3) for gradient in (du * v, y_bar * x))
    return gradients | {"b": db, "c": dc, "v": du * b + y_bar}


def _dense(
    a: Any,
    u: Any,
    block_size: int,
    lookback: int | None = 1,
    segment_ids: Any = None,
    initial_state: RecurrenceState | None = None,
) -> tuple[Array, Array, Array, RecurrenceState]:
    """Unmasked L [B, H, S, S], its mask [B, 1, S, S], inputs [B, S, H, D], and the initial state.

    The state becomes K + 1 virtual tokens before the T real ones: carriers, oldest first, then the
    local state. Their decay is 1, so that their columns of L hold the decays of real tokens alone.
    The local state belongs to block 0, the k-th carrier (from 0) to block -(k + 1).
    """
    u = _float64(u)
    state = _start(u, lookback, initial_state)
    carriers = (state.decays[..., None] * state.carriers)[:, ::-1]
    inputs = np.concatenate([carriers, state.local[:, None], u], axis=1)
    virtual = inputs.shape[1] - u.shape[1]
    a = reset_decays(a, segment_ids)
    decays = np.pad(a, [(0, 0), (virtual, 0), (0, 0)], constant_values=1.0)
    tokens = (state.position[:, None] + np.arange(u.shape[1])) // block_size
    before = np.broadcast_to(np.arange(1 - virtual, 1), (u.shape[0], virtual))
    kept = window_mask(np.concatenate([before, tokens], axis=1), lookback)
    return transfer_operator(decays.swapaxes(1, 2)), kept[:, None], inputs, state


def _start(u: Array, lookback: int | None, state: RecurrenceState | None) -> RecurrenceState:
    if state is None:
        return zero_state(u.shape[0], u.shape[2], u.shape[3], lookback)
    if np.shape(state.carriers)[1] != (lookback or 0):
        raise ValueError(
            f"initial state holds {np.shape(state.carriers)[1]} carriers, lookback={lookback} "
            f"needs {lookback or 0}: use a state made with the same lookback"
        )
    return RecurrenceState(*map(_float64, state[:3]), np.asarray(state.position, np.int32))


def _segment_starts(segment_ids: Any) -> Array:
    """[B, T] bool: tokens whose segment differs from that of the token before; never the first."""
    segment_ids = np.asarray(segment_ids)
    return np.pad(segment_ids[:, 1:] != segment_ids[:, :-1], [(0, 0), (1, 0)])


def _blocked(array: Any, block_size: int) -> Array:
    """[B, T, ...] as [B, b, block_size, ...], a float64 copy zero-padded at the end."""
    array = _float64(array)
    padding = [(0, 0), (0, -array.shape[1] % block_size)] + [(0, 0)] * (array.ndim - 2)
    return np.pad(array, padding).reshape(array.shape[0], -1, block_size, *array.shape[2:])


def _per_head(gate: Any, heads: int) -> Array:
    return np.repeat(_float64(gate), heads // np.shape(gate)[2], axis=2)


def _float64(array: Any) -> Array:
    return np.asarray(array, np.float64)
