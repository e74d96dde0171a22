"""How a kernel walks over the chunks of some heads, and reads what belongs to one."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

Array = jax.Array

# The grid is (batch, groups of heads, groups of chunks).
CHUNK_AXIS = 2


@dataclasses.dataclass(frozen=True)
class Tiling:
    """What a kernel body that walks over chunks is specialised for.

    Attributes:
        heads: of one program.
        chunks: of the sequence.
        together: chunks of one grid step, at most.
        chunk: L, a multiple of 128.
        q_dim, v_dim: Dk and Dv, multiples of 128.
        dtype: of the products' operands.
    """

    heads: int
    chunks: int
    together: int
    chunk: int
    q_dim: int
    v_dim: int
    dtype: jnp.dtype

    @property
    def steps(self) -> int:
        """Grid steps over the chunks."""
        return pl.cdiv(self.chunks, self.together)

    def count(self, group: Array) -> int | Array:
        """Chunks in a group: the last one may have fewer."""
        if self.chunks % self.together == 0:
            return self.together
        return jnp.minimum(self.together, self.chunks - group * self.together)


def largest[TilingT: Tiling](
    smallest: TilingT,
    *,
    heads: int,
    at_a_time: int,
    together: int,
    vmem_bytes: Callable[[TilingT], int],
    budget: int,
) -> TilingT:
    """Return the first tiling that fits: most heads at a time, then most chunks in a grid step.

    Args:
        smallest: what else it is, and what is returned where nothing fits.
        heads: of all, which those at a time divide.
        at_a_time, together: heads and chunks, at most.
        vmem_bytes: what the kernel takes.
        budget: what it may take.
    """
    fewer = [size for size in range(min(at_a_time, heads), 0, -1) if heads % size == 0]
    shorter = [max(1, min(together, smallest.chunks))]
    while shorter[-1] > 1:
        shorter.append(shorter[-1] // 2)
    tilings = (
        dataclasses.replace(smallest, heads=heads, together=together)
        for heads in fewer
        for together in shorter
    )
    return next((tiling for tiling in tilings if vmem_bytes(tiling) <= budget), smallest)


class HeadView:
    """Some tokens of one head in a block [1, tokens, heads * D], as a matrix [L, D]."""

    def __init__(self, plan: Tiling, ref: Any, chunk: Array, head: int, size: int):
        self._ref, self._first = ref, head * size
        self._tokens = pl.multiple_of(chunk * plan.chunk, plan.chunk)
        self._shape = plan.chunk, size

    def _at(self, where: tuple[slice, slice]) -> tuple:
        (top, bottom, _), (left, right, _) = (
            part.indices(size) for part, size in zip(where, self._shape, strict=True)
        )
        tokens = pl.ds(self._tokens + top, bottom - top)
        return 0, tokens, pl.ds(self._first + left, right - left)

    def __getitem__(self, where: tuple[slice, slice]) -> Array:
        return self._ref[self._at(where)]

    def __setitem__(self, where: tuple[slice, slice], value: Array) -> None:
        self._ref[self._at(where)] = value.astype(self._ref.dtype)


def walk_chunks(plan: Tiling, last_first: bool, body: Callable[[int | Array, Array], None]) -> None:
    """Call `body` with each chunk of this step, by its place in the step and in the sequence."""
    step = pl.program_id(CHUNK_AXIS)
    group = plan.steps - 1 - step if last_first else step
    count = plan.count(group)

    def turn(index, _):
        place = count - 1 - index if last_first else index
        body(place, group * plan.together + place)

    lax.fori_loop(0, count, turn, None)


def in_turns(bodies: Iterable[Iterator[None]]) -> None:
    """Run generators in turns, each to its next `yield`.

    The compiler keeps to the order of the program where it can: with parts of one head between
    those of another, each fills the time that the other waits for its products.
    """
    running = list(bodies)
    while running:
        running = [body for body in running if next(body, body) is not body]
