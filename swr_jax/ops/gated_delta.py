"""The gated delta rule of Gated DeltaNet: validation, streaming state, one token at a time.

    S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T,    o_t = S_t q_t

An associative memory that decays by alpha, and that replaces, with strength beta, what it holds
under the key k by v. Source: arXiv 2412.06464.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from swr_jax.ops import gated_delta_validation as validation
from swr_jax.ops.dispatch import by_first_able, candidates
from swr_jax.ops.gated_delta_evaluation import evaluate
from swr_jax.ops.gated_delta_sharded import empty_memory, over_mesh
from swr_jax.ops.mlstm_sharded import with_state_over_mesh
from swr_jax.ops.recurrence import reset_decays
from swr_jax.ops.sharded import split_of, varying_alike

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GatedDeltaState:
    """What the gated delta rule remembers between calls.

    Attributes:
        memory: the transpose of S, [B, H, Dk, Dv], in the dtype of the maths.
    """

    memory: Array

    @classmethod
    def zeros(
        cls,
        batch: int,
        num_heads: int,
        qk_dim: int,
        v_dim: int,
        *,
        dtype: jnp.dtype = jnp.float32,
    ) -> "GatedDeltaState":
        """Return the state of a sequence that has not begun."""
        return cls(memory=jnp.zeros((batch, num_heads, qk_dim, v_dim), dtype))

    def replace(self, **changes) -> "GatedDeltaState":
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def gated_delta_rule(
    q: Array,
    k: Array,
    v: Array,
    alpha: Array,
    beta: Array,
    *,
    chunk_size: int = 64,
    initial_state: GatedDeltaState | None = None,
    segment_ids: Array | None = None,
    return_state: bool = False,
    implementation: str | None = None,
) -> Array | tuple[Array, GatedDeltaState]:
    """Gated delta rule over a sequence, chunk by chunk.

    Linear time and memory, any T >= 1, H >= 1, Dk >= 1, Dv >= 1. The maths is in float32 (float64
    where an input is float64), free of logarithms and divisions: alpha = 0 is exact, and so is the
    gradient for every array argument, initial state included. Forward mode by XLA only. The
    backward pass keeps one state for each chunk, XLA's on accelerators one for each eight, that of
    GPU kernels none but makes them anew.

    Keys and queries are used as they are: neither normalised nor scaled. The rule is stable where
    beta * |k|^2 lies in [0, 2]; Gated DeltaNet has unit keys and beta in (0, 1).

    Args:
        q: queries [B, T, H, Dk]; any floating dtype, as all others.
        k: keys [B, T, H, Dk].
        v: values [B, T, H, Dv].
        alpha: decays [B, T, H], normally in [0, 1]; not their logarithms.
        beta: writing strengths [B, T, H].
        chunk_size: tokens that are solved together by XLA, a power of two. The result does not
            depend on it: smaller chunks keep more states for the backward pass, larger ones do
            more arithmetic. The kernels' chunks have 64 tokens (GPU) or 128.
        initial_state: from an earlier call, or from `GatedDeltaState.zeros`; None: zero.
        segment_ids: integers [B, T]; where they change from one token to the next the memory is
            cleared, exactly. The first token continues `initial_state` in any case.
        return_state: also return the state after the last token.
        implementation: None for the best that the device has, or "xla", "mosaic_gpu" or
            "mosaic_tpu", which then never falls back on another.

    Returns:
        o [B, T, H, Dv] in v's dtype; with `return_state`, the pair (o, GatedDeltaState).

    Raises:
        ValueError: a rank, size, dtype or option that the above rules out, or an implementation
            that does not exist or that the device lacks.
        NotImplementedError: the implementation that is named does not cover the case.
        TypeError: forward-mode differentiation of a kernel (from JAX).
    """
    validation.check_inputs(
        q,
        k,
        v,
        alpha,
        beta,
        chunk_size=chunk_size,
        initial_state=initial_state,
        segment_ids=segment_ids,
    )
    names = candidates(implementation)
    if segment_ids is not None:
        alpha = reset_decays(alpha, segment_ids)
    arrays = (q, k, v, alpha, beta)
    dtype = functools.reduce(jnp.promote_types, (x.dtype for x in arrays), jnp.dtype(jnp.float32))

    def evaluated(*arguments):
        arguments = varying_alike(*arguments)
        return by_first_able(names, lambda name: evaluate(name, *arguments, chunk_size=chunk_size))

    split = split_of(*alpha.shape)
    if split is not None and initial_state is None and not return_state:
        return over_mesh(evaluated, split, *arrays, dtype=dtype)
    if split is not None and split.sequence == 1:
        evaluated = with_state_over_mesh(evaluated, split)
    memory = empty_memory(k, v, alpha + beta, dtype)
    if initial_state is not None:
        memory = memory + initial_state.memory.astype(dtype)
    o, memory = evaluated(*arrays, memory)
    return (o, GatedDeltaState(memory)) if return_state else o


def gated_delta_rule_step(
    state: GatedDeltaState, q_t: Array, k_t: Array, v_t: Array, alpha_t: Array, beta_t: Array
) -> tuple[GatedDeltaState, Array]:
    """One token of the gated delta rule, in time and memory that do not depend on T.

    A run of steps returns what `gated_delta_rule` returns for the whole sequence.

    Args:
        state: from `GatedDeltaState.zeros`, an earlier step, or `gated_delta_rule`.
        q_t, k_t: [B, H, Dk].
        v_t: [B, H, Dv].
        alpha_t, beta_t: [B, H].

    Returns:
        The state after the token, and o_t [B, H, Dv] in v_t's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit each other or the state.
    """
    validation.check_step(state, q_t, k_t, v_t, alpha_t, beta_t)
    dtype = state.memory.dtype
    q, k, v = (x.astype(dtype) for x in (q_t, k_t, v_t))
    alpha, beta = (x.astype(dtype)[..., None] for x in (alpha_t, beta_t))
    product = functools.partial(jnp.einsum, "bhk,bhkv->bhv", precision="highest")
    memory = alpha[..., None] * state.memory
    memory = memory + k[..., None] * (beta * (v - product(k, memory)))[..., None, :]
    return state.replace(memory=memory), product(q, memory).astype(v_t.dtype)
