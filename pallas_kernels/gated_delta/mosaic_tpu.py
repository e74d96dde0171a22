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

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.distribution import distributed, refuse_automatic_axes
from pallas_kernels.gated_delta.mosaic_tpu_chunk import CHUNK
from pallas_kernels.gated_delta.mosaic_tpu_kernels import backward_kernel, forward_kernel
from pallas_kernels.padding import fill_up
from pallas_kernels.residuals import with_residuals
from pallas_kernels.tpu.calls import (
    Call,
    check_arrays,
    flatten,
    heads_of,
    operand_dtype,
    pad,
    padded,
)
from pallas_kernels.tpu.chip import buffer_bytes, vmem_here
from pallas_kernels.tpu.chunks import Tiling, divisors, largest

Array = jax.Array

_GATES, _STATE = ("bth", "bth"), "bhkd"
_ARGUMENTS = ("bthk", "bthk", "bthd", *_GATES)
_STATES = "bhnkd"


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How the kernels are tiled; results do not depend on it.

    Attributes:
        heads: heads that one program has at a time, at most: its products fill the waiting time of
            one another. Fewer where they do not divide the heads or do not fit VMEM.
        together: chunks of one grid step, at most; fewer where they do not fit VMEM.
        vmem_bytes: of VMEM that a kernel may take. Default: by the chip that is traced for.
    """

    heads: int = 4
    together: int = 4
    vmem_bytes: int = dataclasses.field(default_factory=vmem_here)

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")


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
    tiling = tiling_for(config, q, k, v)
    budget = buffer_bytes(config.vmem_bytes)
    if (taken := vmem_bytes(tiling)) > budget:
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
    call, tiling = _call(config, q, k, v)
    query, key, value = (_tokens(call, x) for x in (q, k, v))
    state = pad(memory, 2), call.state(tiling.q_dim, tiling.v_dim)
    outputs = [value, state]
    if keep:
        outputs.append(_states(call))
    o, memory, *states = call.run(
        "gated_delta_forward",
        functools.partial(forward_kernel, tiling),
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
    call, tiling = _call(config, q, k, v)
    call = dataclasses.replace(call, last_first=True)
    query, key, value, doutput = (_tokens(call, x) for x in (q, k, v, do))
    gates = _gates(call, alpha, beta)
    state = pad(dmemory, 2), call.state(tiling.q_dim, tiling.v_dim)
    dq, dk, dv, dgates, dmemory = call.run(
        "gated_delta_backward",
        functools.partial(backward_kernel, tiling),
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


def tiling_for(config: TuningConfig, q: Array, k: Array, v: Array) -> Tiling:
    """What the kernels' bodies are specialised for: as much in one grid step as fits."""
    heads = q.shape[2]
    smallest = Tiling(
        heads=1,
        chunks=pl.cdiv(q.shape[1], CHUNK),
        together=1,
        chunk=CHUNK,
        q_dim=padded(q.shape[-1]),
        v_dim=padded(v.shape[-1]),
        dtype=operand_dtype(q.dtype, k.dtype, v.dtype),
    )
    return largest(
        smallest,
        divisors(heads, config.heads),
        range(min(config.together, smallest.chunks), 0, -1),
        vmem_bytes,
        buffer_bytes(config.vmem_bytes),
    )


def vmem_bytes(tiling: Tiling) -> int:
    """VMEM of the backward kernel, which takes most: blocks that come and go, state, registers."""
    q_dim, v_dim, itemsize = tiling.q_dim, tiling.v_dim, tiling.dtype.itemsize
    stream = CHUNK * (4 * q_dim + 3 * v_dim) * itemsize + q_dim * v_dim * 4
    stream = 2 * (stream + 2 * 8 * CHUNK * 4)
    values = CHUNK * (10 * CHUNK + 4 * q_dim + 6 * v_dim) * 4
    return tiling.heads * (tiling.together * stream + 4 * q_dim * v_dim * 4 + values)


def _call(config, q, k, v) -> tuple[Call, Tiling]:
    tiling = tiling_for(config, q, k, v)
    return Call(tiling, q.shape[0], q.shape[2], config.vmem_bytes), tiling


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
