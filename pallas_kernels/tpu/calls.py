"""Calls of kernels: BlockSpecs, cost estimates, padding of features."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.padding import fill_up
from pallas_kernels.tpu.chip import LANES
from pallas_kernels.tpu.chunks import Tiling

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


def operand_dtype(*dtypes: jnp.dtype) -> jnp.dtype:
    """Return what products are made of: bfloat16 where all arrays have it, else float32."""
    narrow = all(dtype == jnp.bfloat16 for dtype in dtypes)
    return jnp.dtype(jnp.bfloat16 if narrow else jnp.float32)


def padded(size: int) -> int:
    """Return the next multiple of 128."""
    return pl.cdiv(size, LANES) * LANES


def pad(x: Array, axes: int) -> Array:
    """Fill up the last axes with zeros to multiples of 128."""
    return fill_up(x, dict.fromkeys(range(-axes, 0), LANES))


def flatten(x: Array, dtype: jnp.dtype) -> Array:
    """[B, T, H, D] -> [B, T, H * padded D]."""
    x = pad(x.astype(dtype), 1)
    return x.reshape(*x.shape[:2], -1)


def heads_of(x: Array, like: Array) -> Array:
    """Undo `flatten`, and the padding of T to whole chunks."""
    batch, time, heads, features = like.shape
    x = x.reshape(batch, -1, heads, padded(features))
    return x[:, :time, :, :features].astype(like.dtype)
