"""Chunkwise gated delta rule for TPUs (Mosaic TPU): one kernel forward, one backward.

Arrays lie, and the grid is, as in the kernels of the mLSTM (pallas_kernels/mlstm/mosaic_tpu.py): a
program has some of the heads of one row of the batch, and walks over its chunks of 128 tokens with
their states in VMEM. Where a gradient will be wanted the forward pass also writes the state before
each chunk, in float32. Only these, never a matrix of tokens by tokens, go to memory.

What costs extra, all of it outside the kernels, in XLA:
    the gates                         are transposed
    Dk or Dv not a multiple of 128    padding copies, and products with the zeros
    T not a multiple of 128           padding copies
    float16                           is converted to float32 and back
    q, k, v of different dtypes       are converted to float32 and back
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.distribution import distributed, refuse_automatic_axes
from pallas_kernels.gated_delta.mosaic_tpu_chunk import CHUNK
from pallas_kernels.gated_delta.mosaic_tpu_kernels import backward_kernel, forward_kernel
from pallas_kernels.gated_delta.mosaic_tpu_plan import (
    BACKWARD,
    FORWARD,
    KEEPING,
    TuningConfig,
    backward_bytes,
    tiling,
)
from pallas_kernels.padding import fill_up
from pallas_kernels.residuals import with_residuals
from pallas_kernels.tpu.calls import (
    Call,
    check_arrays,
    flatten,
    heads_of,
    pad,
    padded,
)
from pallas_kernels.tpu.chip import buffer_bytes

Array = jax.Array

_GATES, _STATE = ("bth", "bth"), "bhkd"
_ARGUMENTS = ("bthk", "bthk", "bthd", *_GATES)
_STATES = "bhnkd"


def gated_delta_rule(
    q: Array,
    k: Array,
    v: Array,
    alpha: Array,
    beta: Array,
    memory: Array,
    *,
    config: TuningConfig | None = None,
) -> tuple[Array, Array]:
    """Outputs of the gated delta rule, and its state after the last token.

    The gradient is exact for every argument, at decays of 0 too; it reads the states before each
    chunk, which the forward pass has kept for it, and repeats the rest.

    Args:
        q, k: [B, T, H, Dk] in float32, bfloat16 or float16.
        v: [B, T, H, Dv], likewise.
        alpha, beta: [B, T, H], used in float32.
        memory: [B, H, Dk, Dv] before the first token, likewise.
        config: tiling; None: the default.

    Returns:
        o like v, and the memory after the last token, float32.

    Raises:
        NotImplementedError: a dtype or size that the kernels do not have, or a mesh in context
            over which the compiler would have to split them.
    """
    config = TuningConfig() if config is None else config
    check_arrays(q, k, v)
    budget = buffer_bytes(config.vmem_bytes)
    if (taken := backward_bytes(tiling(BACKWARD, config, q, k, v))) > budget:
        raise NotImplementedError(
            f"heads of {q.shape[-1]} and {v.shape[-1]} features take {taken} bytes of VMEM: the "
            f"TPU kernels have {budget}; XLA's form takes heads of any size"
        )
    refuse_automatic_axes()
    gates = (x.astype(jnp.float32) for x in (alpha, beta))
    return _differentiable(config, q, k, v, *gates, memory.astype(jnp.float32))


def _solve(config, *arguments):
    run = functools.partial(forward, config)
    return distributed(run, arguments, (*_ARGUMENTS, _STATE), ("bthd", _STATE), automatic=False)


def _solve_forward(config, *arguments):
    run = functools.partial(forward, config, keep=True)
    results = ("bthd", _STATE, _STATES)
    o, memory, states = distributed(run, arguments, (*_ARGUMENTS, _STATE), results, automatic=False)
    return (o, memory), (arguments[:-1], states)


def _solve_backward(config, residuals, cotangents):
    arguments, states = residuals
    given = (*arguments, states, *cotangents)
    axes = (*_ARGUMENTS, _STATES, "bthd", _STATE)
    run = functools.partial(backward, config)
    return distributed(run, given, axes, (*_ARGUMENTS, _STATE), automatic=False)


_differentiable = with_residuals(_solve, _solve_forward, _solve_backward)


def forward(
    config: TuningConfig,
    q: Array,
    k: Array,
    v: Array,
    alpha: Array,
    beta: Array,
    memory: Array,
    *,
    keep: bool = False,
) -> tuple[Array, ...]:
    """Outputs of one device, last state and, with `keep`, what `backward` takes for states."""
    name = KEEPING if keep else FORWARD
    call = _call(name, config, q, k, v)
    query, key, value = (_tokens(call, x) for x in (q, k, v))
    state = pad(memory, 2), call.state(call.plan.q_dim, call.plan.v_dim)
    outputs = [value, state]
    if keep:
        outputs.append(_states(call))
    o, memory, *states = call.run(
        name,
        functools.partial(forward_kernel, call.plan),
        inputs=[query, key, value, _gates(call, alpha, beta), state],
        outputs=outputs,
        scratch=[],
        products=(2, 2, 3),
    )
    return heads_of(o, v), _cut_state(memory, q, v), *states


def backward(
    config: TuningConfig,
    q: Array,
    k: Array,
    v: Array,
    alpha: Array,
    beta: Array,
    states: Array,
    do: Array,
    dmemory: Array,
) -> tuple[Array, ...]:
    """Cotangents of the arguments of `forward`, from those of its results."""
    call = _call(BACKWARD, config, q, k, v, last_first=True)
    query, key, value, doutput = (_tokens(call, x) for x in (q, k, v, do))
    gates = _gates(call, alpha, beta)
    state = pad(dmemory, 2), call.state(call.plan.q_dim, call.plan.v_dim)
    dq, dk, dv, dgates, dmemory = call.run(
        BACKWARD,
        functools.partial(backward_kernel, call.plan),
        inputs=[query, key, value, gates, doutput, (states, _states(call)[1]), state],
        outputs=[query, key, value, gates, state],
        scratch=[],
        products=(5, 5, 8),
    )
    dgates = jnp.moveaxis(dgates, 1, -1).swapaxes(2, 3)  # [B, N, C, 2, H]
    dgates = dgates.reshape(alpha.shape[0], -1, 2, alpha.shape[2])[:, : alpha.shape[1]]
    return (
        *(heads_of(dx, x) for dx, x in ((dq, q), (dk, k), (dv, v))),
        *(dgates[:, :, name] for name in range(2)),
        _cut_state(dmemory, q, v),
    )


def _call(name: str, config: TuningConfig, q: Array, k: Array, v: Array, **options) -> Call:
    plan = tiling(name, config, q, k, v)
    return Call(plan, q.shape[0], q.shape[2], config.vmem_bytes, **options)


def _tokens(call: Call, x: Array):
    x = fill_up(x, {1: CHUNK})
    return flatten(x, call.plan.dtype), call.tokens(padded(x.shape[-1]))


def _states(call: Call):
    sizes = call.plan.q_dim, call.plan.v_dim
    return call.struct(*sizes), call.per_chunk(*sizes)


def _gates(call: Call, alpha: Array, beta: Array):
    """[B, T, H] each -> [B, H, N, 2, C]; padding hands the state on as it is."""
    gates = jnp.stack([fill_up(alpha, {1: CHUNK}, 1.0), fill_up(beta, {1: CHUNK})])
    gates = gates.reshape(2, call.batch, -1, CHUNK, call.heads)
    return jnp.transpose(gates, (1, 4, 2, 0, 3)), call.per_chunk(2, CHUNK)


def _cut_state(memory: Array, q: Array, v: Array) -> Array:
    return memory[:, :, : q.shape[-1], : v.shape[-1]]
