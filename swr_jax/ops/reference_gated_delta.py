"""Float64 oracle of the gated delta rule, in plain NumPy: one token after the other.

    H_t = alpha_t (I - beta_t k_t k_t^T) H_{t-1} + beta_t k_t v_t^T,    o_t = H_t^T q_t

H [B, H, Dk, Dv] is the transpose of S in arXiv 2412.06464. The gradient is the reverse recurrence,
derived by hand. Inputs of any dtype are converted to float64, and so are all results; nothing
divides by a decay or takes its logarithm.
"""

from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray


class Gradients(NamedTuple):
    """Gradients of sum(o * o_bar) + sum(final * final_bar), shaped like what they belong to."""

    q: Array
    k: Array
    v: Array
    alpha: Array
    beta: Array
    initial: Array


def reset_decays(alpha: Any, segment_ids: Any) -> Array:
    """``alpha`` with exact zeros where a new segment starts, the very first token excepted."""
    alpha = np.array(alpha, np.float64)
    if segment_ids is not None:
        alpha[:, 1:][np.diff(np.asarray(segment_ids), axis=1) != 0] = 0.0
    return alpha


def gated_delta_rule(
    q: Any, k: Any, v: Any, alpha: Any, beta: Any, initial: Any = None, segment_ids: Any = None
) -> tuple[Array, Array]:
    """Outputs [B, T, H, Dv] and the last state [B, H, Dk, Dv]."""
    q, k, v, alpha, beta, states = _states(q, k, v, alpha, beta, initial, segment_ids)
    return np.einsum("bthkv,bthk->bthv", states[:, 1:], q), states[:, -1]


def gated_delta_gradients(
    q: Any,
    k: Any,
    v: Any,
    alpha: Any,
    beta: Any,
    o_bar: Any,
    final_bar: Any = None,
    initial: Any = None,
    segment_ids: Any = None,
) -> Gradients:
    """Gradients for the cotangents ``o_bar`` of the outputs and ``final_bar`` of the last state.

    A decay that a new segment replaces by zero has the gradient zero.
    """
    q, k, v, alpha, beta, states = _states(q, k, v, alpha, beta, initial, segment_ids)
    o_bar = np.asarray(o_bar, np.float64)
    dq = np.einsum("bthkv,bthv->bthk", states[:, 1:], o_bar)
    dk, dv, dalpha, dbeta = (np.zeros_like(x) for x in (k, v, alpha, beta))
    dh = np.zeros_like(states[:, 0]) if final_bar is None else np.array(final_bar, np.float64)
    for t in reversed(range(q.shape[1])):
        h, key, value = states[:, t], k[:, t], v[:, t]
        a, b = alpha[:, t, :, None], beta[:, t, :, None]
        dh = dh + q[:, t, :, :, None] * o_bar[:, t, :, None, :]
        read = np.einsum("bhkv,bhk->bhv", h, key)
        kept = h - b[..., None] * key[..., None] * read[..., None, :]
        dkept = a[..., None] * dh
        dread = np.einsum("bhkv,bhk->bhv", dkept, key)  # of -b * read, that is
        dalpha[:, t] = np.sum(dh * kept, axis=(-2, -1))
        written = np.einsum("bhkv,bhk->bhv", dh, key)
        dbeta[:, t] = np.sum(written * value - dread * read, axis=-1)
        dv[:, t] = b * written
        dk[:, t] = b * (
            np.einsum("bhkv,bhv->bhk", dh, value)
            - np.einsum("bhkv,bhv->bhk", dkept, read)
            - np.einsum("bhkv,bhv->bhk", h, dread)
        )
        dh = dkept - b[..., None] * key[..., None] * dread[..., None, :]
    if segment_ids is not None:
        dalpha[:, 1:][np.diff(np.asarray(segment_ids), axis=1) != 0] = 0.0
    return Gradients(dq, dk, dv, dalpha, dbeta, dh)


def _states(q, k, v, alpha, beta, initial, segment_ids) -> tuple[Array, ...]:
    """The inputs in float64, and the states before the first token and after each, [B, T + 1]."""
    q, k, v, beta = (np.asarray(x, np.float64) for x in (q, k, v, beta))
    alpha = reset_decays(alpha, segment_ids)
    batch, time, heads, features = k.shape
    states = np.zeros((batch, time + 1, heads, features, v.shape[-1]))
    if initial is not None:
        states[:, 0] = initial
    for t in range(time):
        key, b = k[:, t, :, :, None], beta[:, t, :, None, None]
        erased = states[:, t] - b * key * np.sum(key * states[:, t], axis=-2, keepdims=True)
        states[:, t + 1] = alpha[:, t, :, None, None] * erased + b * key * v[:, t, :, None, :]
    return q, k, v, alpha, beta, states
