"""mLSTM, the matrix-memory recurrence of xLSTM: validation, dispatch, streaming.

Per head, with s = Dk ** -0.5, log f_t = log sigmoid of the forget pre-activation, and the input
gate either exp or sigmoid of its pre-activation:

    C_t = f_t C_{t-1} + i_t k_t v_t^T        n_t = f_t n_{t-1} + i_t k_t
    h_t = (s q_t)^T C_t / max(|(s q_t)^T n_t|, 1)

The exponential gate overflows as written, so C and n are kept divided by e^m, m_t =
max(log f_t + m_{t-1}, log i_t); the 1 becomes exp(-m_t), and h does not depend on m. Sources:
arXiv 2405.04517 (the recurrence), 2503.14376 (its chunkwise form and the sigmoid gate).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mlstm.stabilized import finite, lower_bound
from swr_jax.ops import mlstm_state as validation
from swr_jax.ops.dispatch import by_first_able, candidates
from swr_jax.ops.mlstm_chunkwise import Options, State
from swr_jax.ops.mlstm_evaluation import evaluate
from swr_jax.ops.mlstm_sharded import over_mesh, with_state_over_mesh
from swr_jax.ops.mlstm_state import MLSTMState
from swr_jax.ops.sharded import split_of, varying_alike

Array = jax.Array


def mlstm(
    q: Array,
    k: Array,
    v: Array,
    i: Array,
    f: Array,
    *,
    chunk_size: int = 128,
    input_gate: str = "exp",
    normalize: bool = True,
    initial_state: MLSTMState | None = None,
    segment_ids: Array | None = None,
    return_state: bool = False,
    implementation: str | None = None,
) -> Array | tuple[Array, MLSTMState]:
    """Run an mLSTM over a sequence, in time and memory linear in its length.

    Any T >= 1 and any sizes. The maths is in float32 (float64 where an input is float64). The
    gradient is exact for every array argument, the normalizer and every field of the initial state
    included, and honours cotangents of every field of the returned one; public kernels leave out
    what flows through the normalizer, which is right only for a loss that cannot see the scale of
    h. Reverse mode only.

    The returned stabilizer is a maximum, with the derivative of one: it belongs to the token that
    the maximum came from, the newest of equals. Where |(s q_t)^T n_t| equals its lower bound the
    gradient is that of the bound.

    Args:
        q: queries [B, T, H, Dk], any floating dtype; scaled by Dk ** -0.5 here.
        k: keys [B, T, H, Dk].
        v: values [B, T, H, Dv].
        i: pre-activation of the input gate [B, T, H].
        f: pre-activation of the forget gate [B, T, H]. Gates deserve float32: a pre-activation of
            -8.7 is off by up to 0.03 in bfloat16.
        chunk_size: tokens evaluated at once, a power of two; changes no result. One chunk as long
            as the sequence is the parallel form.
        input_gate: "exp" or "sigmoid".
        normalize: divide by max(|(s q_t)^T n_t|, 1). False, only with the sigmoid gate, returns
            (s q_t)^T C_t, as the published variant may.
        initial_state: the state before the first token, from `MLSTMState.zeros` or an earlier call;
            None: an empty one.
        segment_ids: integers [B, T]; where they change from one token to the next the forget gate
            is exactly 0. The first token continues `initial_state` in any case.
        return_state: also return the state after the last token.
        implementation: None for the best that the device has, or "xla", "mosaic_gpu" or
            "mosaic_tpu", which then never falls back on another.

    Returns:
        h [B, T, H, Dv] in v's dtype; with `return_state`, the pair (h, MLSTMState), whose fields
        have the dtype of the maths.

    Raises:
        ValueError: a rank, size, dtype or option that the above rules out, or an implementation
            that does not exist or that the device lacks.
        NotImplementedError: the implementation that is named does not cover the case.
        TypeError: forward-mode differentiation (from JAX).
    """
    validation.check_options(chunk_size, input_gate, normalize)
    validation.check_inputs(q, k, v, i, f, segment_ids)
    if initial_state is not None:
        validation.check_state("initial_state", initial_state, q, v)
    dtype = functools.reduce(
        jnp.promote_types,
        (x.dtype for x in (q, k, v, i, f, *jax.tree.leaves(initial_state))),
        jnp.dtype(jnp.float32),
    )
    log_i, log_f = _log_gates(i, f, input_gate, dtype)
    if segment_ids is not None:
        log_f = reset_gates(log_f, segment_ids)
    options = Options(chunk_size, input_gate == "exp", normalize, dtype)
    names = candidates(implementation)

    def evaluated(*arguments):
        arguments = varying_alike(*arguments)
        return by_first_able(names, lambda name: evaluate(name, options, *arguments))

    def empty(q, v):
        return State(*_enter(_empty_state(q, v), input_gate, dtype))

    split = split_of(*q.shape[:3])
    if split is not None and initial_state is None and not return_state:
        return over_mesh(evaluated, empty, options, split, q, k, v, log_i, log_f)
    if split is not None and split.sequence == 1:
        evaluated = with_state_over_mesh(evaluated, split)
    given = initial_state is not None
    start = State(*_enter(initial_state, input_gate, dtype)) if given else empty(q, v)
    h, last = evaluated(q, k, v, log_i, log_f, start)
    return (h, MLSTMState(*last)) if return_state else h


def mlstm_step(
    state: MLSTMState,
    q_t: Array,
    k_t: Array,
    v_t: Array,
    i_t: Array,
    f_t: Array,
    *,
    input_gate: str = "exp",
    normalize: bool = True,
) -> tuple[MLSTMState, Array]:
    """One token of the mLSTM, in time and memory that do not depend on how many came before.

    A run of steps returns what `mlstm` returns for the whole sequence. The maths is in float32
    (float64 where the state is); the state keeps its dtypes.

    Args:
        state: from `MLSTMState.zeros`, an earlier step, or `mlstm(..., return_state=True)`.
        q_t, k_t: query and key [B, H, Dk].
        v_t: value [B, H, Dv].
        i_t, f_t: pre-activations of the gates [B, H].
        input_gate, normalize: as in `mlstm`.

    Returns:
        The state after the token, and h_t [B, H, Dv] in v_t's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit each other or the state, an unknown option.
    """
    validation.check_options(1, input_gate, normalize)
    validation.check_step(state, q_t, k_t, v_t, i_t, f_t)
    dtype = jnp.promote_types(state.memory.dtype, state.stabilizer.dtype)
    dtype = jnp.promote_types(dtype, jnp.float32)
    q, k, v = (x.astype(dtype) for x in (q_t, k_t, v_t))
    log_i, log_f = _log_gates(i_t, f_t, input_gate, dtype)
    memory, normalizer, before = _enter(state, input_gate, dtype)

    kept, m = log_f + before, jnp.zeros_like(before)
    if input_gate == "exp":
        m = jnp.where(log_i >= kept, log_i, kept)
    # h does not depend on m: a constant in it, it can make no 0 * inf of a gradient.
    constant = lax.stop_gradient(finite(m))
    exponent = log_f + (before - constant)
    # Above 0 only by the rounding of enormous gates, which a plain minimum would differentiate.
    forget = jnp.exp(exponent - lax.stop_gradient(jnp.maximum(exponent, 0)))
    key = jnp.exp(log_i - constant)[..., None] * k
    memory = forget[..., None, None] * memory + key[..., None] * v[..., None, :]
    normalizer = forget[..., None] * normalizer + key

    q = q * q.shape[-1] ** -0.5
    product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    h = product("bhk,bhkv->bhv", q, memory)
    if normalize:
        denominator = jnp.abs(product("bhk,bhk->bh", q, normalizer))
        floor = lower_bound(constant)
        h = h / jnp.where(denominator > floor, denominator, floor)[..., None]

    # As a factor of the returned state, 1, m has its derivative again.
    unit = jnp.exp(constant - finite(m))
    after = MLSTMState(
        (unit[..., None, None] * memory).astype(state.memory.dtype),
        (unit[..., None] * normalizer).astype(state.normalizer.dtype),
        m.astype(state.stabilizer.dtype),
    )
    return after, h.astype(v_t.dtype)


def reset_gates(log_f: Array, segment_ids: Array) -> Array:
    """Set log f [B, T, H] to -inf at each segment's first token but the very first."""
    starts = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = jnp.pad(starts, ((0, 0), (1, 0)))
    return jnp.where(starts[..., None], -jnp.inf, log_f)


def _empty_state(q: Array, v: Array) -> MLSTMState:
    """Return `MLSTMState.zeros` for q [B, T, H, Dk] and v, distributed over a mesh as they are."""
    q, v = q[:, 0], v[:, 0]
    return MLSTMState(
        jnp.zeros_like(q[..., :, None] * v[..., None, :], jnp.float32),
        jnp.zeros_like(q, jnp.float32),
        jnp.full_like(q[..., 0], -jnp.inf, jnp.float32),
    )


def _log_gates(i: Array, f: Array, input_gate: str, dtype: jnp.dtype) -> tuple[Array, Array]:
    i, f = i.astype(dtype), f.astype(dtype)
    return (i if input_gate == "exp" else jax.nn.log_sigmoid(i)), jax.nn.log_sigmoid(f)


def _enter(state: MLSTMState, input_gate: str, dtype: jnp.dtype) -> tuple[Array, Array, Array]:
    """Return the fields of a state as the maths starts from them: m = 0 with the sigmoid gate."""
    memory, normalizer, m = (
        x.astype(dtype) for x in (state.memory, state.normalizer, state.stabilizer)
    )
    if input_gate == "exp":
        return memory, normalizer, m
    scale = jnp.exp(m)
    return scale[..., None, None] * memory, scale[..., None] * normalizer, jnp.zeros_like(m)
