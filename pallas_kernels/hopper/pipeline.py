"""How kernels load what their tensor cores compute with: warpgroups, rings of slots.

A thread block has one warpgroup for each 64 rows that it owns, and a last one that starts the
loads.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

Array = jax.Array
Ref = jax.Ref

_LONGEST_COPY = 256  # numbers along an axis

# Registers of a thread where so many warpgroups compute; one alone has all that a thread can have.
_COMPUTE_REGISTERS, _LOAD_REGISTERS = {2: 240, 3: 160}, 32


@dataclasses.dataclass(frozen=True)
class Stream:
    """A ring of slots in shared memory that the last warpgroup fills and the others empty.

    Attributes:
        slots: their number.
        free: a barrier for each slot, at which every warpgroup arrives that is done with it.
    """

    slots: int
    free: Ref

    def slot(self, step: Array) -> Array:
        """Where a step's tiles are."""
        return lax.rem(step, jnp.int32(self.slots))

    def acquire(self, step: Array) -> Array:
        """Wait until the slot of a step is free, and return it."""
        slot = self.slot(step)

        @pl.when(step >= self.slots)
        def _():
            plgpu.barrier_wait(self.free.at[slot])

        return slot

    def release(self, step: Array) -> None:
        """Say that this warpgroup has no more need of a step's tiles."""
        plgpu.barrier_arrive(self.free.at[self.slot(step)])

    def drain(self, steps: Array) -> None:
        """Wait until the last tiles of `steps` have been read."""

        def wait(step: Array, _: None) -> None:
            plgpu.barrier_wait(self.free.at[self.slot(step)])

        lax.fori_loop(jnp.maximum(steps - self.slots, 0), steps, wait, None)


def free_barriers(slots: int, groups: int) -> plgpu.Barrier:
    """Scratch for `Stream.free`."""
    return plgpu.Barrier(num_arrivals=groups, num_barriers=slots)


def full_barriers(slots: int, copies: int = 1) -> plgpu.Barrier:
    """Scratch for the barriers at which so many copies arrive for each slot."""
    return plgpu.Barrier(num_arrivals=copies, num_barriers=slots)


def meet(barrier: Ref) -> None:
    """Wait until every warpgroup that computes has come here; what they stored is seen by all."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def load_own(source: Callable[[int], Ref], target: Ref, barrier: Ref, groups: int) -> None:
    """Load each warpgroup's own rows, [groups, 64, D]."""
    for group in range(groups):
        plgpu.copy_gmem_to_smem(source(group), target.at[group], barrier)


def vector_copies(size: int) -> int:
    """Copies that `load_vector` makes."""
    return pl.cdiv(size, _LONGEST_COPY)


def load_vector(source: Ref, target: Ref, barrier: Ref) -> None:
    """Load a vector of any size."""
    size = target.shape[0]
    for first in range(0, size, _LONGEST_COPY):
        part = pl.ds(first, min(_LONGEST_COPY, size - first))
        plgpu.copy_gmem_to_smem(source.at[part], target.at[part], barrier)


def warpgroups(groups: int, compute: Callable[[Array], None], load: Callable[[], None]) -> None:
    """Run `compute(group)` in all warpgroups but the last, and `load` in that."""
    group = lax.axis_index("warpgroup")

    @pl.when(group < groups)
    def _():
        if groups > 1:
            plgpu.set_max_registers(_COMPUTE_REGISTERS[groups], action="increase")
        compute(group)

    @pl.when(group == groups)
    def _():
        if groups > 1:
            plgpu.set_max_registers(_LOAD_REGISTERS, action="decrease")
        load()


def launch(
    body: Callable,
    name: str,
    groups: int,
    out_type: Any,
    scratch_types: Any,
    *,
    loader: bool = True,
    **grid: int,
) -> Callable:
    """Return the kernel over a grid with these axes; `loader`: with a warpgroup that only loads."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=groups + loader,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            reduction_scratch_bytes=16,  # Nothing is reduced across warps.
        ),
        kernel_name=name,
    )
