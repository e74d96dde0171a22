"""Chunkwise mLSTM for TPUs (Mosaic TPU): one kernel forward, two backward.

q, k, v and h are read and written as they lie, [B, T, H, D], which a projection hands over without
a copy: a program has some of the heads of one row of the batch, and walks over its chunks with
their memories C in VMEM. The grid is (batch, groups of heads, chunks); the first two axes are
independent, so chips of two cores divide them. The forward pass writes nothing but outputs. The
backward pass has a kernel that writes the state before each chunk, in q's dtype where that has 16
bits, and one that walks from the last chunk to the first with the cotangent of C in VMEM.

What costs extra, all of it outside the kernels, in XLA:
    Dk or Dv not a multiple of 128    padding copies, and products with the zeros
    float16                           is converted to float32 and back
    q, k, v of different dtypes       are converted to float32 and back
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mlstm.gradient import entry_point
from pallas_kernels.mlstm.mosaic_tpu_kernels import (
    Plan,
    Scratch,
    backward_kernel,
    forward_kernel,
    states_kernel,
)
from pallas_kernels.mlstm.tuning_tpu import LANES, VMEM_BUDGET, TuningConfig

Array = jax.Array

_SUPPORTED = ("float32", "bfloat16", "float16")


def chunk_length(
    chunk_size: int, time: int, q_dim: int, v_dim: int, dtype: jnp.dtype, config: TuningConfig
) -> int:
    """Return the length of a chunk: 128, or twice that as often as wished, useful and possible.

    Args:
        chunk_size: what the caller wishes.
        time: T.
        q_dim, v_dim: Dk, Dv.
        dtype: of q, k and v.
        config: tiling, which has a longest chunk.
    """
    length = LANES
    longest = min(config.longest_chunk, chunk_size, pl.cdiv(time, LANES) * LANES)
    itemsize = 2 if dtype == jnp.bfloat16 else 4
    sizes = _padded(q_dim), _padded(v_dim)
    while 2 * length <= longest and _vmem_bytes(2 * length, *sizes, itemsize) <= VMEM_BUDGET:
        length *= 2
    return length


def check(options: Any, q: Array, k: Array, v: Array) -> None:
    """Raise NotImplementedError where the kernels cannot do a case; arguments as in `forward`."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype.name not in _SUPPORTED:
            raise NotImplementedError(
                f"{name} has dtype {x.dtype.name}: the TPU kernels take {', '.join(_SUPPORTED)}"
            )
        if 0 in x.shape:
            raise NotImplementedError(
                f"{name} has shape {x.shape}: the TPU kernels need a size of 1 or more"
            )
    if options.chunk % LANES:
        raise NotImplementedError(f"{options.chunk=}: the TPU kernels take multiples of {LANES}")
    plan = _plan(options, q, k, v)
    taken = _plan_bytes(plan)
    if taken > VMEM_BUDGET:
        raise NotImplementedError(
            f"heads of {q.shape[-1]} and {v.shape[-1]} features in chunks of {plan.chunk} take "
            f"{taken} bytes of VMEM: the TPU kernels have {VMEM_BUDGET}"
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
) -> tuple[Array, Array, Array]:
    """Outputs of an mLSTM, and its state after the last token.

    Args:
        options: hashable, with `chunk`, `normalized` and `config`.
        q, k: [B, T, H, Dk] in float32, bfloat16 or float16, T a multiple of the chunk.
        v: [B, T, H, Dv], likewise.
        gates, carry: [B, H, N, 8, L] and [B, H, N], of `pallas_kernels.mlstm.gates`.
        memory, normalizer: [B, H, Dk, Dv] and [B, H, Dk] before the first token.

    Returns:
        h like v; memory and normalizer after the last token, float32.

    Raises:
        NotImplementedError: see `check`.
    """
    check(options, q, k, v)
    call = _Call(_plan(options, q, k, v), *carry.shape[:2])
    plan, flat = call.plan, functools.partial(_flat, dtype=call.plan.dtype)
    state = (
        (_pad(memory, 2), call.state(plan.q_dim, plan.v_dim)),
        (_pad(normalizer[:, :, None], 1), call.state(1, plan.q_dim)),
    )
    values = flat(v), call.tokens(plan.v_dim)
    h, memory, normalizer = call.run(
        "mlstm_forward",
        functools.partial(forward_kernel, plan),
        inputs=[
            (call.flat_carry(carry), call.carry()),
            *((flat(x), call.tokens(plan.q_dim)) for x in (q, k)),
            values,
            (gates, call.per_chunk(8, plan.chunk)),
            *state,
        ],
        outputs=[values, *state],
        scratch=[
            pltpu.VMEM((plan.heads, plan.q_dim, plan.v_dim), plan.dtype),
            pltpu.VMEM((plan.heads, plan.chunk, LANES), jnp.float32),
            pltpu.VMEM((plan.heads, plan.chunk + plan.q_dim, LANES), plan.dtype),
        ],
        products=(1, 1, 2),
    )
    return _heads(h, v), *_cut_state(memory, normalizer, q, v)


def backward(
    options: Any,
    q: Array,
    k: Array,
    v: Array,
    gates: Array,
    carry: Array,
    memory: Array,
    normalizer: Array,
    dh: Array,
    dmemory: Array,
    dnormalizer: Array,
) -> tuple[Array, ...]:
    """Cotangents of the arguments of `forward`, from those of its results.

    Returns:
        dq, dk, dv like q, k, v; dgates [B, H, N, 4, L] (`pallas_kernels.mlstm.gates`), that of log
        carry [B, H, N], dmemory and dnormalizer, all float32.

    Raises:
        NotImplementedError: see `check`.
    """
    check(options, q, k, v)
    call = _Call(_plan(options, q, k, v), *carry.shape[:2])
    plan, flat = call.plan, functools.partial(_flat, dtype=call.plan.dtype)
    sizes = (plan.q_dim, plan.v_dim), (1, plan.q_dim)
    carry = call.flat_carry(carry)
    q_in, k_in, v_in, dh_in = map(flat, (q, k, v, dh))
    states, sums = call.run(
        "mlstm_states",
        functools.partial(states_kernel, plan),
        inputs=[
            (carry, call.carry()),
            (k_in, call.tokens(plan.q_dim)),
            (v_in, call.tokens(plan.v_dim)),
            (gates, call.per_chunk(8, plan.chunk)),
            (_pad(memory, 2), call.state(*sizes[0])),
            (_pad(normalizer[:, :, None], 1), call.state(*sizes[1])),
        ],
        outputs=[
            (call.struct(*sizes[0], dtype=plan.dtype), call.per_chunk(*sizes[0])),
            (call.struct(*sizes[1]), call.per_chunk(*sizes[1])),
        ],
        scratch=[
            *(pltpu.VMEM((plan.heads, *size), jnp.float32) for size in sizes),
            pltpu.VMEM((plan.heads, *sizes[0]), plan.dtype),
        ],
        products=(0, 0, 1),
    )

    def body(carry, *refs):
        refs = iter(refs)
        inputs, dstate0, outputs, dstate, scratch = (
            tuple(itertools.islice(refs, count)) for count in (7, 2, 5, 2, 7)
        )
        backward_kernel(plan, carry, inputs, dstate0, outputs, dstate, Scratch(*scratch))

    call = dataclasses.replace(call, last_first=True)
    query, key = ((x, call.tokens(plan.q_dim)) for x in (q_in, k_in))
    value = v_in, call.tokens(plan.v_dim)
    dstate = (
        (_pad(dmemory, 2), call.state(*sizes[0])),
        (_pad(dnormalizer[:, :, None], 1), call.state(*sizes[1])),
    )
    dq, dk, dv, dgates, dcarry, dmemory, dnormalizer = call.run(
        "mlstm_backward",
        body,
        inputs=[
            (carry, call.carry()),
            *(query, key, value),
            (gates, call.per_chunk(8, plan.chunk)),
            (dh_in, call.tokens(plan.v_dim)),
            (states, call.per_chunk(*sizes[0])),
            (sums, call.per_chunk(*sizes[1])),
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
    )
    return (
        *(_heads(dx, x) for dx, x in zip((dq, dk, dv), (q, k, v), strict=True)),
        dgates,
        jnp.sum(dcarry, axis=(-2, -1)),
        *_cut_state(dmemory, dnormalizer, q, v),
    )


# The compiler of TPUs cannot split a kernel by itself.
chunkwise = entry_point(forward, backward, chunk_length, TuningConfig(), automatic=False)


# --- calls ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Call:
    """Kernels over (batch, groups of heads, chunks), and their blocks.

    Attributes:
        plan: of the kernels' bodies.
        batch, heads: B, H.
        last_first: whether chunks come from the last to the first.
    """

    plan: Plan
    batch: int
    heads: int
    last_first: bool = False

    def _at(self, step):
        return self.plan.steps - 1 - step if self.last_first else step

    def tokens(self, size: int) -> pl.BlockSpec:
        """Of an array [B, T, H size]."""
        plan = self.plan
        return pl.BlockSpec(
            (1, plan.together * plan.chunk, plan.heads * size),
            lambda b, group, step: (b, self._at(step), group),
        )

    def per_chunk(self, *shape: int) -> pl.BlockSpec:
        """Of an array [B, H, N, *shape]."""
        return pl.BlockSpec(
            (1, self.plan.heads, self.plan.together, *shape),
            lambda b, group, step: (b, group, self._at(step), 0, 0),
        )

    def state(self, *shape: int) -> pl.BlockSpec:
        """Of an array [B, H, *shape]."""
        return pl.BlockSpec((1, self.plan.heads, *shape), lambda b, group, _: (b, group, 0, 0))

    def carry(self) -> pl.BlockSpec:
        """Of what `flat_carry` returns."""
        return pl.BlockSpec(
            (1, 1, 1, self.plan.heads * self.plan.chunks),
            lambda b, group, _: (b, group, 0, 0),
            memory_space=pltpu.SMEM,
        )

    def flat_carry(self, carry: Array) -> Array:
        """[B, H, N] as scalar memory takes it: head after head of a program."""
        return carry.reshape(self.batch, -1, 1, self.plan.heads * self.plan.chunks)

    def struct(self, *shape: int, dtype: jnp.dtype = jnp.float32) -> jax.ShapeDtypeStruct:
        """An array [B, H, N, *shape]."""
        return jax.ShapeDtypeStruct((self.batch, self.heads, self.plan.chunks, *shape), dtype)

    def run(
        self,
        name: str,
        kernel: Callable,
        inputs: Sequence[tuple[Array, pl.BlockSpec]],
        outputs: Sequence[tuple[Any, pl.BlockSpec]],
        scratch: Sequence[Any],
        products: tuple[int, int, int],
    ) -> Sequence[Array]:
        """Call a kernel.

        `outputs` are given by arrays of their shapes and dtypes. `products` counts those of L x L
        with L x Dk, of L x L with L x Dv, and of L x Dk with Dk x Dv.
        """
        plan = self.plan
        tokens = self.batch * self.heads * plan.chunks * plan.chunk
        per_token = products[0] * plan.chunk * plan.q_dim + products[1] * plan.chunk * plan.v_dim
        per_token += products[2] * plan.q_dim * plan.v_dim
        varying = jax.typeof(inputs[1][0]).manual_axis_type
        structs = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying) for x, _ in outputs
        ]
        call = pl.pallas_call(
            kernel,
            grid=(self.batch, self.heads // plan.heads, plan.steps),
            in_specs=[spec for _, spec in inputs],
            out_specs=[spec for _, spec in outputs],
            out_shape=structs,
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary")
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * tokens * per_token,
                bytes_accessed=sum(
                    x.size * x.dtype.itemsize for x in (*(x for x, _ in inputs), *structs)
                ),
                transcendentals=tokens * plan.chunk,
            ),
            name=name,
        )
        # TPUs index with 32 bits, also where a program has 64 enabled.
        with jax.enable_x64(False):
            return call(*(x for x, _ in inputs))


def _plan(options: Any, q: Array, k: Array, v: Array) -> Plan:
    """What the kernels' bodies are specialised for: as much in one grid step as fits."""
    config, heads = options.config, q.shape[2]
    narrow = all(x.dtype == jnp.bfloat16 for x in (q, k, v))
    smallest = Plan(
        heads=1,
        chunks=q.shape[1] // options.chunk,
        together=1,
        chunk=options.chunk,
        q_dim=_padded(q.shape[-1]),
        v_dim=_padded(v.shape[-1]),
        normalized=options.normalized,
        dtype=jnp.dtype(jnp.bfloat16 if narrow else jnp.float32),
        columns=config.columns,
    )
    plans = [
        dataclasses.replace(smallest, heads=heads_, together=together)
        for heads_ in range(min(config.heads, heads), 0, -1)
        if heads % heads_ == 0
        for together in range(max(1, min(config.tokens // options.chunk, smallest.chunks)), 0, -1)
    ]
    return next((plan for plan in plans if _plan_bytes(plan) <= VMEM_BUDGET), smallest)


def _plan_bytes(plan: Plan) -> int:
    """VMEM of the backward kernel, which takes most."""
    itemsize = plan.dtype.itemsize
    one = plan.heads * _vmem_bytes(plan.chunk, plan.q_dim, plan.v_dim, itemsize)
    more = (plan.together - 1) * plan.heads
    return one + more * _stream_bytes(plan.chunk, plan.q_dim, plan.v_dim, itemsize)


def _stream_bytes(chunk: int, q_dim: int, v_dim: int, itemsize: int) -> int:
    """A chunk's share of the blocks that come and go, of which there are two each."""
    tokens = chunk * (4 * q_dim + 3 * v_dim) * itemsize + chunk * (8 + 4) * 4
    return 2 * (tokens + q_dim * v_dim * itemsize + 8 * (q_dim + LANES) * 4)


def _vmem_bytes(chunk: int, q_dim: int, v_dim: int, itemsize: int) -> int:
    """VMEM of a head's chunk."""
    state = 4 * (q_dim * v_dim + 8 * q_dim) * 4
    scratch = (2 * chunk * chunk + chunk * q_dim + q_dim * v_dim) * itemsize
    scratch += (4 * chunk + 2 * q_dim) * LANES * 4 + 8 * chunk * 4
    return _stream_bytes(chunk, q_dim, v_dim, itemsize) + state + scratch


def _padded(size: int) -> int:
    return pl.cdiv(size, LANES) * LANES


def _pad(x: Array, axes: int) -> Array:
    """Fill up the last axes with zeros to multiples of 128."""
    sizes = [(0, 0)] * (x.ndim - axes) + [(0, -size % LANES) for size in x.shape[x.ndim - axes :]]
    return jnp.pad(x, sizes) if any(after for _, after in sizes) else x


def _flat(x: Array, dtype: jnp.dtype) -> Array:
    """[B, T, H, D] -> [B, T, H * padded D]."""
    x = _pad(x.astype(dtype), 1)
    return x.reshape(*x.shape[:2], -1)


def _heads(x: Array, like: Array) -> Array:
    """Undo `_flat`."""
    x = x.reshape(*like.shape[:3], -1)
    return x[..., : like.shape[-1]].astype(like.dtype)


def _cut_state(memory: Array, normalizer: Array, q: Array, v: Array) -> tuple[Array, Array]:
    """Undo the padding of a state."""
    q_dim, v_dim = q.shape[-1], v.shape[-1]
    return memory[:, :, :q_dim, :v_dim], normalizer[:, :, 0, :q_dim]
