"""Float64 oracles for the mLSTM, in plain NumPy.

Three routes to the same numbers, each as literal as it can be: the stabilized recurrence of the
xLSTM paper (arXiv 2405.04517), token after token; the same with e^m multiplied out, which only
moderate gates survive; and the parallel form, a masked T x T product. The gradient is the chain
rule applied to the first, line by line and backwards, through the stabilizer and the normalizer.

    q, k [B, T, H, Dk]   v [B, T, H, Dv]   i, f [B, T, H]   (pre-activations of the gates)
    C [B, H, Dk, Dv]     n [B, H, Dk]      m [B, H]         (memory, normalizer, stabilizer)
"""

from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray


class MLSTMState(NamedTuple):
    """State between two tokens; what it stands for is e^m C and e^m n."""

    memory: Array
    normalizer: Array
    stabilizer: Array


class _Step(NamedTuple):
    """What the backward sweep needs to know of one token."""

    before: MLSTMState
    after: MLSTMState
    forget: Array
    write: Array
    divisor: Array
    above: Array  # sign of the denominator where it is above its bound, else 0
    written: Array  # whether m is this token's log input gate
    h: Array


def empty_state(batch: int, heads: int, qk_dim: int, v_dim: int) -> MLSTMState:
    """State before the first token."""
    return MLSTMState(
        np.zeros((batch, heads, qk_dim, v_dim)),
        np.zeros((batch, heads, qk_dim)),
        np.full((batch, heads), -np.inf),
    )


def log_gates(i: Any, f: Any, input_gate: str, segment_ids: Any = None) -> tuple[Array, Array]:
    """Logarithms of the gates; -inf for the forget gate where a segment begins inside the call."""
    i, f = _float64(i), _float64(f)
    log_i = i if input_gate == "exp" else -np.logaddexp(0, -i)
    log_f = -np.logaddexp(0, -f)
    if segment_ids is not None:
        log_f[_starts(segment_ids)] = -np.inf
    return log_i, log_f


def recurrence(
    q: Any,
    k: Any,
    v: Any,
    i: Any,
    f: Any,
    *,
    input_gate: str = "exp",
    normalize: bool = True,
    initial_state: MLSTMState | None = None,
    segment_ids: Any = None,
) -> tuple[Array, MLSTMState]:
    """h [B, T, H, Dv] and the last state, token after token."""
    steps = _sweep(q, k, v, i, f, input_gate, normalize, initial_state, segment_ids)
    return np.stack([step.h for step in steps], axis=1), steps[-1].after


def unstabilized(
    q: Any,
    k: Any,
    v: Any,
    i: Any,
    f: Any,
    *,
    input_gate: str = "exp",
    normalize: bool = True,
    initial_state: MLSTMState | None = None,
    segment_ids: Any = None,
) -> tuple[Array, Array, Array]:
    """h, e^m C and e^m n after the last token, by the recurrence without a stabilizer."""
    q, k, v = _float64(q), _float64(k), _float64(v)
    start = initial_state or empty_state(q.shape[0], *q.shape[2:], v.shape[-1])
    memory, normalizer, stabilizer = (_float64(x) for x in start)
    memory = np.exp(stabilizer)[..., None, None] * memory
    normalizer = np.exp(stabilizer)[..., None] * normalizer
    write, forget = np.exp(log_gates(i, f, input_gate, segment_ids))
    h = np.empty_like(v)
    for t in range(q.shape[1]):
        outer = k[:, t, :, :, None] * v[:, t, :, None, :]
        memory = forget[:, t, :, None, None] * memory + write[:, t, :, None, None] * outer
        normalizer = forget[:, t, :, None] * normalizer + write[:, t, :, None] * k[:, t]
        query = q[:, t] / np.sqrt(q.shape[-1])
        h[:, t] = np.einsum("bhk,bhkv->bhv", query, memory)
        if normalize:
            denominator = np.abs(np.einsum("bhk,bhk->bh", query, normalizer))
            h[:, t] /= np.maximum(denominator, 1)[..., None]
    return h, memory, normalizer


def parallel(
    q: Any,
    k: Any,
    v: Any,
    i: Any,
    f: Any,
    *,
    input_gate: str = "exp",
    normalize: bool = True,
    segment_ids: Any = None,
) -> Array:
    """h from an empty state, by the masked T x T product."""
    q, k, v = _float64(q), _float64(k), _float64(v)
    time = q.shape[1]
    log_i, log_f = log_gates(i, f, input_gate)
    visible = np.tril(np.ones((time, time), bool))[None, None]
    if segment_ids is not None:
        document = np.cumsum(_starts(segment_ids), axis=1)
        visible = visible & (document[:, None, :, None] == document[:, None, None, :])
    sums = np.cumsum(np.moveaxis(log_f, 1, 2), axis=-1)
    weights = sums[..., :, None] - sums[..., None, :] + np.moveaxis(log_i, 1, 2)[..., None, :]
    weights = np.where(visible, weights, -np.inf)
    m = np.max(weights, axis=-1, keepdims=True)
    scores = np.einsum("bihk,bjhk->bhij", q, k) / np.sqrt(q.shape[-1]) * np.exp(weights - m)
    h = np.einsum("bhij,bjhv->bhiv", scores, v)
    divisor = np.maximum(np.abs(np.sum(scores, axis=-1, keepdims=True)), np.exp(-m))
    h = h / divisor if normalize else h * np.exp(m)
    return np.moveaxis(h, 1, 2)


def parallel_gradients(
    q: Any,
    k: Any,
    v: Any,
    i: Any,
    f: Any,
    h_bar: Any,
    *,
    input_gate: str = "exp",
    segment_ids: Any = None,
) -> tuple[Array, dict[str, Array]]:
    """h from an empty state, and the gradients of q, k, v, i, f, head by head in T x T products.

    For sizes at which the recurrence, which keeps every token's state, has no room.
    """
    q, k, v, i, f, h_bar = map(_float64, (q, k, v, i, f, h_bar))
    log_i, log_f = log_gates(i, f, input_gate)
    time = q.shape[1]
    h, found = (
        np.empty_like(v),
        {name: np.empty_like(x) for name, x in zip("qkvif", (q, k, v, i, f), strict=True)},
    )
    for row, head in np.ndindex(q.shape[0], q.shape[2]):
        at = (row, slice(None), head)
        visible = np.tril(np.ones((time, time), bool))
        if segment_ids is not None:
            document = np.cumsum(_starts(segment_ids)[row])
            visible &= document[:, None] == document
        sums = np.cumsum(log_f[at])
        weights = np.where(visible, sums[:, None] - sums + log_i[at], -np.inf)
        m = np.max(weights, axis=1, keepdims=True)
        weights = np.exp(weights - m) / np.sqrt(q.shape[-1])
        scores = weights * (q[at] @ k[at].T)
        d, floor = np.sum(scores, axis=1, keepdims=True), np.exp(-m)
        divisor = np.maximum(np.abs(d), floor)
        h[at] = scores @ v[at] / divisor

        # h = scores v / divisor, and divisor is |sum of scores| where that is above the floor.
        dh = h_bar[at] / divisor
        dscores = dh @ v[at].T
        dscores -= np.sum(dh * h[at], axis=1, keepdims=True) * np.sign(d) * (np.abs(d) > floor)
        products = dscores * weights
        found["q"][at], found["k"][at] = products @ k[at], products.T @ q[at]
        found["v"][at] = scores.T @ dh
        dweights = dscores * scores  # of their logarithms, log i_j + log f_{j+1} + ... + log f_i
        through = np.cumsum((dweights.sum(1) - dweights.sum(0))[::-1])[::-1]
        found["f"][at] = through * _sigmoid(-f[at])
        slope = 1.0 if input_gate == "exp" else _sigmoid(-i[at])
        found["i"][at] = dweights.sum(0) * slope
    return h, found


def gradients(
    q: Any,
    k: Any,
    v: Any,
    i: Any,
    f: Any,
    h_bar: Any,
    state_bar: MLSTMState | None = None,
    *,
    input_gate: str = "exp",
    normalize: bool = True,
    through_normalizer: bool = True,
    initial_state: MLSTMState | None = None,
    segment_ids: Any = None,
) -> dict[str, Array]:
    """Gradient of <h_bar, h> + <state_bar, last state> for every argument of `recurrence`.

    Args:
        q, k, v, i, f: the arguments.
        h_bar: cotangent of h.
        state_bar: cotangents of the last state's fields; None for zeros.
        input_gate, normalize, initial_state, segment_ids: as there.
        through_normalizer: False leaves out what flows through the denominator, as kernels in
            public use do: not the gradient of anything.

    Returns:
        Keys "q", "k", "v", "i", "f", "memory", "normalizer", "stabilizer".
    """
    steps = _sweep(q, k, v, i, f, input_gate, normalize, initial_state, segment_ids)
    q, k, v, i, f, h_bar = (_float64(x) for x in (q, k, v, i, f, h_bar))
    if state_bar is None:
        state_bar = MLSTMState(*(np.zeros_like(x) for x in steps[-1].after))
    dc, dn, dm = (_float64(x).copy() for x in state_bar)
    grads = {name: np.zeros_like(x) for name, x in zip("qkvif", (q, k, v, i, f), strict=True)}
    scale = 1 / np.sqrt(q.shape[-1])
    for t in reversed(range(q.shape[1])):
        step = steps[t]
        # h = s q C / divisor, divisor = max(|s q n|, exp(-m)).
        numerator_bar = h_bar[:, t] / step.divisor[..., None]
        denominator_bar = np.zeros_like(dm)
        if normalize and through_normalizer:
            divisor_bar = -np.sum(h_bar[:, t] * step.h, axis=-1) / step.divisor
            denominator_bar = step.above * divisor_bar
            on_bound = np.where(step.above == 0, divisor_bar, 0)
            dm = dm - np.where(on_bound == 0, 0, step.divisor * on_bound)
        grads["q"][:, t] = scale * np.einsum("bhkv,bhv->bhk", step.after.memory, numerator_bar)
        grads["q"][:, t] += scale * denominator_bar[..., None] * step.after.normalizer
        dc = dc + scale * q[:, t, :, :, None] * numerator_bar[:, :, None, :]
        dn = dn + scale * q[:, t] * denominator_bar[..., None]
        # C = forget C' + write k v^T and n = forget n' + write k.
        column = np.einsum("bhkv,bhv->bhk", dc, v[:, t]) + dn
        grads["k"][:, t] = step.write[..., None] * column
        grads["v"][:, t] = step.write[..., None] * np.einsum("bhkv,bhk->bhv", dc, k[:, t])
        through_write = step.write * np.sum(column * k[:, t], axis=-1)
        through_forget = np.sum(dc * step.before.memory, axis=(-2, -1))
        through_forget = step.forget * (
            through_forget + np.sum(dn * step.before.normalizer, axis=-1)
        )
        dc = step.forget[..., None, None] * dc
        dn = step.forget[..., None] * dn
        # forget = exp(log f + m' - m), write = exp(log i - m), m = max(log f + m', log i).
        dlog_i, dlog_f, dbefore = through_write, through_forget, through_forget
        if input_gate == "exp":
            dm = dm - through_write - through_forget
            dlog_i = dlog_i + np.where(step.written, dm, 0)
            kept = np.where(step.written, 0, dm)
            dlog_f, dm = dlog_f + kept, dbefore + kept
        else:
            dlog_i = dlog_i * _sigmoid(-i[:, t])
            dm = np.zeros_like(dm)
        grads["i"][:, t] = dlog_i
        grads["f"][:, t] = dlog_f * _sigmoid(-f[:, t])
    if segment_ids is not None:
        grads["f"][_starts(segment_ids)] = 0.0
    if input_gate != "exp" and initial_state is not None:
        # The sweep began from e^m C and e^m n.
        memory, normalizer, m = (_float64(x) for x in initial_state)
        dc, dn = np.exp(m)[..., None, None] * dc, np.exp(m)[..., None] * dn
        dm = np.sum(dc * memory, axis=(-2, -1)) + np.sum(dn * normalizer, axis=-1)
    return grads | {"memory": dc, "normalizer": dn, "stabilizer": dm}


def _sweep(q, k, v, i, f, input_gate, normalize, initial_state, segment_ids) -> list[_Step]:
    q, k, v = _float64(q), _float64(k), _float64(v)
    log_i, log_f = log_gates(i, f, input_gate, segment_ids)
    state = initial_state or empty_state(q.shape[0], *q.shape[2:], v.shape[-1])
    state = MLSTMState(*(_float64(x) for x in state))
    if input_gate != "exp":
        scale = np.exp(state.stabilizer)
        state = MLSTMState(
            scale[..., None, None] * state.memory,
            scale[..., None] * state.normalizer,
            np.zeros_like(scale),
        )
    steps = []
    for t in range(q.shape[1]):
        kept = log_f[:, t] + state.stabilizer
        written = log_i[:, t] >= kept
        m = np.maximum(kept, log_i[:, t]) if input_gate == "exp" else np.zeros_like(kept)
        forget, write = np.exp(kept - m), np.exp(log_i[:, t] - m)
        key = write[..., None] * k[:, t]
        after = MLSTMState(
            forget[..., None, None] * state.memory + key[..., None] * v[:, t, :, None, :],
            forget[..., None] * state.normalizer + key,
            m,
        )
        query = q[:, t] / np.sqrt(q.shape[-1])
        denominator = np.einsum("bhk,bhk->bh", query, after.normalizer)
        with np.errstate(over="ignore"):
            bound = np.exp(-m)  # infinite where every gate is closed: h is 0 then
        divisor = np.maximum(np.abs(denominator), bound) if normalize else np.ones_like(m)
        above = np.where(np.abs(denominator) > bound, np.sign(denominator), 0)
        h = np.einsum("bhk,bhkv->bhv", query, after.memory) / divisor[..., None]
        steps.append(_Step(state, after, forget, write, divisor, above, written, h))
        state = after
    return steps


def _starts(segment_ids: Any) -> Array:
    """Whether a segment starts at each token [B, T]; the first token may continue a state's."""
    segment_ids = np.asarray(segment_ids)
    starts = segment_ids[:, 1:] != segment_ids[:, :-1]
    return np.pad(starts, ((0, 0), (1, 0)))


def _sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0, -x))


def _float64(x: Any) -> Array:
    return np.array(x, np.float64)
