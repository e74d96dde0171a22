"""Calls of TPU kernels of matrix memories: BlockSpecs, cost estimates, padding of features.

And of the mLSTM's alone: tiling and VMEM.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mlstm.mosaic_tpu_chunk import Plan, Tiling
from pallas_kernels.mlstm.tuning_tpu import LANES, buffer_bytes

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Call:
    """Kernels over (batch, groups of heads, chunks), and their blocks.

    Attributes:
        plan: of the kernels' bodies.
        batch, heads: B, H.
        vmem_bytes: of VMEM that a kernel may take.
        last_first: whether chunks come from the last to the first.
    """

    plan: Tiling
    batch: int
    heads: int
    vmem_bytes: int
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
        exponentials: int = 0,
    ) -> Sequence[Array]:
        """Call a kernel.

        `outputs` are given by arrays of their shapes and dtypes. `products` counts those of L x L
        with L x Dk, of L x L with L x Dv, and of L x Dk with Dk x Dv; `exponentials` are those of a
        token.
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
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=self.vmem_bytes,
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * tokens * per_token,
                bytes_accessed=sum(
                    x.size * x.dtype.itemsize for x in (*(x for x, _ in inputs), *structs)
                ),
                transcendentals=tokens * exponentials,
            ),
            name=name,
        )
        # TPUs index with 32 bits, also where a program has 64 enabled.
        with jax.enable_x64(False):
            return call(*(x for x, _ in inputs))


_SUPPORTED = ("float32", "bfloat16", "float16")


def check_arrays(q: Array, k: Array, v: Array) -> None:
    """Raise NotImplementedError for a dtype or a size of 0 that no kernel takes."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype.name not in _SUPPORTED:
            raise NotImplementedError(
                f"{name} has dtype {x.dtype.name}: the TPU kernels take {', '.join(_SUPPORTED)}"
            )
        if 0 in x.shape:
            raise NotImplementedError(
                f"{name} has shape {x.shape}: the TPU kernels need a size of 1 or more"
            )


def plan_for(
    options: Any, q: Array, k: Array, v: Array, vmem_bytes: Callable[[Tiling], int]
) -> Plan:
    """What a kernel's body is specialised for: as much in one grid step as fits.

    Args:
        options, q, k, v: as the passes have them.
        vmem_bytes: of the kernel: `forward_bytes` or `backward_bytes`.
    """
    config, heads = options.config, q.shape[2]
    narrow = all(x.dtype == jnp.bfloat16 for x in (q, k, v))
    smallest = Plan(
        heads=1,
        chunks=q.shape[1] // options.chunk,
        together=1,
        chunk=options.chunk,
        q_dim=padded(q.shape[-1]),
        v_dim=padded(v.shape[-1]),
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
    budget = buffer_bytes(config.vmem_bytes)
    return next((plan for plan in plans if vmem_bytes(plan) <= budget), smallest)


def forward_bytes(plan: Tiling, *, keep: bool) -> int:
    """VMEM of the kernel of outputs, which may keep the states before chunks."""
    moved = plan.chunk * 2 * (plan.q_dim + plan.v_dim) * plan.dtype.itemsize
    if keep:
        moved += plan.q_dim * plan.v_dim * plan.dtype.itemsize + 8 * plan.q_dim * 4
    scratch = (plan.chunk * 4 + (plan.chunk + plan.q_dim) * plan.dtype.itemsize) * LANES
    return _bytes(plan, moved, 4, scratch)


def backward_bytes(plan: Tiling) -> int:
    """VMEM of the kernel of cotangents, which takes most."""
    itemsize, state = plan.dtype.itemsize, plan.q_dim * plan.v_dim
    moved = (plan.chunk * (4 * plan.q_dim + 3 * plan.v_dim) + state) * itemsize
    moved += (4 * plan.chunk + 8 * (plan.q_dim + LANES)) * 4
    scratch = (2 * plan.chunk * plan.chunk + plan.chunk * plan.q_dim) * itemsize
    scratch += (4 * plan.chunk + 2 * plan.q_dim) * LANES * 4 + 8 * plan.chunk * 4
    return _bytes(plan, moved, 4, scratch)


def _bytes(plan: Tiling, moved: int, states: int, scratch: int) -> int:
    """Of a chunk's blocks, which are there twice, of C and n in float32 and C rounded, of others.

    Gates move in every kernel, and are not counted in `moved`.
    """
    memory, normalizer = plan.q_dim * plan.v_dim, 8 * plan.q_dim
    state = states * (memory + normalizer) * 4 + memory * plan.dtype.itemsize
    return plan.heads * (plan.together * 2 * (moved + 8 * plan.chunk * 4) + state + scratch)


def padded(size: int) -> int:
    """Return the next multiple of 128."""
    return pl.cdiv(size, LANES) * LANES


def pad(x: Array, axes: int) -> Array:
    """Fill up the last axes with zeros to multiples of 128."""
    sizes = [(0, 0)] * (x.ndim - axes) + [(0, -size % LANES) for size in x.shape[x.ndim - axes :]]
    return jnp.pad(x, sizes) if any(after for _, after in sizes) else x


def flatten(x: Array, dtype: jnp.dtype) -> Array:
    """[B, T, H, D] -> [B, T, H * padded D]."""
    x = pad(x.astype(dtype), 1)
    return x.reshape(*x.shape[:2], -1)


def heads_of(x: Array, like: Array) -> Array:
    """Undo `flatten`."""
    x = x.reshape(*like.shape[:3], -1)
    return x[..., : like.shape[-1]].astype(like.dtype)


def cut_state(memory: Array, normalizer: Array, q: Array, v: Array) -> tuple[Array, Array]:
    """Undo the padding of a state."""
    q_dim, v_dim = q.shape[-1], v.shape[-1]
    return memory[:, :, :q_dim, :v_dim], normalizer[:, :, 0, :q_dim]
