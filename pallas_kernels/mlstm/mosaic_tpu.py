"""Chunkwise mLSTM for TPUs (Mosaic TPU): one kernel forward, one backward.

q, k, v and h are read and written as they lie, [B, T, H, D], which a projection hands over without
a copy: a program has some of the heads of one row of the batch, and walks over its chunks with
their memories C in VMEM. The grid is (batch, groups of heads, chunks); the first two axes are
independent, so chips of two cores divide them. Where a gradient will be wanted the forward pass
also writes the state before each chunk, C in the dtype of the products' operands; the backward pass
reads it, from the last chunk to the first, with the cotangent of C in VMEM.

What costs extra, all of it outside the kernels, in XLA:
    Dk or Dv not a multiple of 128    padding copies, and products with the zeros
    float16                           is converted to float32 and back
    q, k, v of different dtypes       are converted to float32 and back
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.distribution import refuse_automatic_axes
from pallas_kernels.mlstm.gradient import entry_point
from pallas_kernels.mlstm.mosaic_tpu_backward import Scratch, backward_kernel
from pallas_kernels.mlstm.mosaic_tpu_kernels import forward_kernel
from pallas_kernels.mlstm.mosaic_tpu_plan import (
    BACKWARD,
    FORWARD,
    KEEPING,
    backward_bytes,
    tiling,
)
from pallas_kernels.mlstm.tuning_tpu import TuningConfig
from pallas_kernels.tpu.calls import (
    Call,
    check_arrays,
    flatten,
    heads_of,
    operand_dtype,
    pad,
    padded,
)
from pallas_kernels.tpu.chip import LANES, buffer_bytes
from pallas_kernels.tpu.chunks import Tiling

Array = jax.Array


def chunk_lengths(
    chunk_size: int, time: int, q_dim: int, v_dim: int, dtype: jnp.dtype, config: TuningConfig
) -> tuple[int, int]:
    """Return the length of a chunk in both passes, which is one.

    It is 128, or twice that as often as wished, useful and possible.

    Args:
        chunk_size: what the caller wishes.
        time: T.
        q_dim, v_dim: Dk, Dv.
        dtype: of q, k and v.
        config: tiling, which has a longest chunk.
    """
    length, budget = LANES, buffer_bytes(config.vmem_bytes)
    longest = min(config.longest_chunk, chunk_size, pl.cdiv(time, LANES) * LANES)
    dtype = operand_dtype(dtype)

    def taken(length: int) -> int:
        sizes = {"chunk": length, "q_dim": padded(q_dim), "v_dim": padded(v_dim)}
        return backward_bytes(Tiling(heads=1, chunks=1, together=1, dtype=dtype, **sizes))

    while 2 * length <= longest and taken(2 * length) <= budget:
        length *= 2
    return length, length


def check(options: Any, q: Array, k: Array, v: Array) -> None:
    """Raise NotImplementedError where the kernels cannot do a case; arguments as in `forward`."""
    check_arrays(q, k, v)
    if options.chunk % LANES:
        raise NotImplementedError(f"{options.chunk=}: the TPU kernels take multiples of {LANES}")
    plan = tiling(BACKWARD, options, q, k, v)
    budget = buffer_bytes(options.config.vmem_bytes)
    if (taken := backward_bytes(plan)) > budget:
        raise NotImplementedError(
            f"heads of {q.shape[-1]} and {v.shape[-1]} features in chunks of {plan.chunk} take "
            f"{taken} bytes of VMEM: the TPU kernels have {budget}"
        )


def forward(
    options: Any,
    q: Array,
    k: Array,
    v: Array,
    gates: Array,
    carry: Array,
    memory: Array,
    normalizer: Array,
    *,
    keep: bool = False,
) -> tuple[Array, ...]:
    """Outputs of an mLSTM, and its state after the last token.

    Args:
        options: hashable, with `chunk`, `normalized` and `config`.
        q, k: [B, T, H, Dk] in float32, bfloat16 or float16, T a multiple of the chunk.
        v: [B, T, H, Dv], likewise.
        gates, carry: [B, H, N, 8, L] and [B, H, N], of `pallas_kernels.mlstm.gates`.
        memory, normalizer: [B, H, Dk, Dv] and [B, H, Dk] before the first token.
        keep: whether to return what `backward` reads.

    Returns:
        h like v; memory and normalizer after the last token, float32; with `keep` those before
        every chunk, as `backward` takes them.

    Raises:
        NotImplementedError: see `check`.
    """
    check(options, q, k, v)
    name = KEEPING if keep else FORWARD
    plan = tiling(name, options, q, k, v)
    call = Call(plan, *carry.shape[:2], options.config.vmem_bytes)
    flat = functools.partial(flatten, dtype=plan.dtype)
    state = (
        (pad(memory, 2), call.state(plan.q_dim, plan.v_dim)),
        (pad(normalizer[:, :, None], 1), call.state(1, plan.q_dim)),
    )
    values = flat(v), call.tokens(plan.v_dim)
    h, memory, normalizer, *states = call.run(
        name,
        functools.partial(forward_kernel, plan),
        inputs=[
            (call.flat_carry(carry), call.carry()),
            *((flat(x), call.tokens(plan.q_dim)) for x in (q, k)),
            values,
            (gates, call.per_chunk(8, plan.chunk)),
            *state,
        ],
        outputs=[values, *state, *(_states(call) if keep else ())],
        scratch=[
            pltpu.VMEM((plan.heads, plan.q_dim, plan.v_dim), plan.dtype),
            pltpu.VMEM((plan.heads, plan.chunk, LANES), jnp.float32),
            pltpu.VMEM((plan.heads, plan.chunk + plan.q_dim, LANES), plan.dtype),
        ],
        products=(1, 1, 2),
        exponentials=plan.chunk,
    )
    return heads_of(h, v), *_cut_state(memory, normalizer, q, v), *states


def backward(
    options: Any,
    q: Array,
    k: Array,
    v: Array,
    gates: Array,
    carry: Array,
    memories: Array,
    normalizers: Array,
    dh: Array,
    dmemory: Array,
    dnormalizer: Array,
) -> tuple[Array, ...]:
    """Cotangents of the arguments of `forward`, from those of its results.

    Args:
        options, q, k, v, gates, carry: as in `forward`.
        memories, normalizers: before every chunk, padded, [B, H, N, Dk, Dv] in the dtype of the
            products' operands and [B, H, N, 1, Dk] in float32.
        dh, dmemory, dnormalizer: cotangents of what `forward` returns.

    Returns:
        dq, dk, dv like q, k, v; dgates [B, H, N, 4, L] (`pallas_kernels.mlstm.gates`), that of log
        carry [B, H, N], dmemory and dnormalizer, all float32.

    Raises:
        NotImplementedError: see `check`.
    """
    check(options, q, k, v)
    plan = tiling(BACKWARD, options, q, k, v)
    call = Call(plan, *carry.shape[:2], options.config.vmem_bytes, last_first=True)
    sizes = (plan.q_dim, plan.v_dim), (1, plan.q_dim)
    q_in, k_in, v_in, dh_in = (flatten(x, plan.dtype) for x in (q, k, v, dh))
    states = memories, normalizers

    def body(carry, *refs):
        refs = iter(refs)
        inputs, dstate0, outputs, dstate, scratch = (
            tuple(itertools.islice(refs, count)) for count in (7, 2, 5, 2, 7)
        )
        backward_kernel(plan, carry, inputs, dstate0, outputs, dstate, Scratch(*scratch))

    query, key = ((x, call.tokens(plan.q_dim)) for x in (q_in, k_in))
    value = v_in, call.tokens(plan.v_dim)
    dstate = (
        (pad(dmemory, 2), call.state(*sizes[0])),
        (pad(dnormalizer[:, :, None], 1), call.state(*sizes[1])),
    )
    dq, dk, dv, dgates, dcarry, dmemory, dnormalizer = call.run(
        BACKWARD,
        body,
        inputs=[
            (call.flat_carry(carry), call.carry()),
            *(query, key, value),
            (gates, call.per_chunk(8, plan.chunk)),
            (dh_in, call.tokens(plan.v_dim)),
            *((x, spec) for x, (_, spec) in zip(states, _states(call), strict=True)),
            *dstate,
        ],
        outputs=[
            *(query, key, value),
            *(
                (call.struct(*shape), call.per_chunk(*shape))
                for shape in ((4, plan.chunk), (1, LANES))
            ),
            *dstate,
        ],
        scratch=[
            pltpu.VMEM((plan.heads, *shape), dtype)
            for dtype, *shape in (
                (plan.dtype, plan.chunk, plan.chunk),
                (plan.dtype, plan.chunk, plan.chunk),
                (plan.dtype, plan.q_dim, plan.chunk),
                (plan.dtype, plan.q_dim, plan.v_dim),
                (jnp.float32, 4, plan.chunk, LANES),
                (jnp.float32, 2, plan.q_dim, LANES),
                (jnp.float32, 8, plan.chunk),
            )
        ],
        products=(3, 2, 4),
        exponentials=plan.chunk,
    )
    return (
        *(heads_of(dx, x) for dx, x in zip((dq, dk, dv), (q, k, v), strict=True)),
        dgates,
        jnp.sum(dcarry, axis=(-2, -1)),
        *_cut_state(dmemory, dnormalizer, q, v),
    )


def _states(call: Call) -> tuple:
    """Outputs that are the states before every chunk."""
    plan = call.plan
    sizes = (plan.q_dim, plan.v_dim), (1, plan.q_dim)
    dtypes = plan.dtype, jnp.float32
    return tuple(
        (call.struct(*size, dtype=dtype), call.per_chunk(*size))
        for size, dtype in zip(sizes, dtypes, strict=True)
    )


def _cut_state(memory: Array, normalizer: Array, q: Array, v: Array) -> tuple[Array, Array]:
    """Undo the padding of a state."""
    q_dim, v_dim = q.shape[-1], v.shape[-1]
    return memory[:, :, :q_dim, :v_dim], normalizer[:, :, 0, :q_dim]


# The compiler of TPUs cannot split a kernel by itself.
def _check_passes(passes: Any, q: Array, k: Array, v: Array) -> None:
    refuse_automatic_axes()
    check(passes.forward, q, k, v)


chunkwise = entry_point(
    forward,
    backward,
    chunk_lengths,
    _check_passes,
    TuningConfig,
    automatic=False,
    keeping=functools.partial(forward, keep=True),
)
