"""What the Hopper kernels stand on: their problem, tiles in registers, and the pipeline of loads.

A thread block owns `heads` heads of one batch element and walks through `chunk` tokens in
sub-blocks of 16, each loaded by TMA several sub-blocks ahead. Heads and features lie across the 128
threads, F * heads / 128 neighbouring features to a thread. Outputs are written over inputs in
shared memory and leave from there by TMA, which drops what lies outside the arrays; what it reads
there is zero. Symbols as in `mosaic_gpu_kernels`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.swr.tuning import SUBBLOCK, TuningConfig

Array = jax.Array
Ref = jax.Ref
WARPS, LANES = 4, 32

COMPILER_PARAMS = plgpu.CompilerParams(
    lowering_semantics=plgpu.LoweringSemantics.Lane,
    # Each thread reads and overwrites elements of its own only; see `walk` for the async copies.
    unsafe_no_auto_barriers=True,
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is to be computed, static.

    Attributes:
        batch, time, heads, features: B, T, H, F; F is 8 or 16.
        block_size: tokens in a block, a multiple of 16.
        lookback: 0, 1 or None for the exact recurrence.
        continued: whether the first block's own state is not zero.
        config: how it is cut up.
    """

    batch: int
    time: int
    heads: int
    features: int
    block_size: int
    lookback: int | None
    continued: bool
    config: TuningConfig

    @property
    def two_states(self) -> bool:
        """Whether E and P differ."""
        return self.lookback == 1

    @property
    def saved_states(self) -> int:
        """States that the forward leaves for the backward, for every sub-block."""
        if not self.two_states:
            return 1
        # A block's own state is zero where it begins.
        return 2 if self.continued or self.block_size > SUBBLOCK else 1

    @property
    def halo(self) -> int:
        """Sub-blocks beyond a chunk that it needs."""
        return self.block_size // SUBBLOCK if self.two_states else 0

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return pl.cdiv(self.time, self.config.chunk)

    @property
    def subblocks(self) -> int:
        """Number of sub-blocks."""
        return pl.cdiv(self.time, SUBBLOCK)

    @property
    def padded_heads(self) -> int:
        """Heads of arrays that are not read or written by TMA, which tolerates any number."""
        return pl.cdiv(self.heads, self.config.heads) * self.config.heads

    @property
    def line(self) -> int:
        """Elements that TMA moves as one: neighbours that rows and tiles are made of."""
        line = max(self.features, min(self.config.line, self.config.heads * self.features))
        while self.heads * self.features % line:
            line //= 2
        return line

    def as_lines(self, x: Array) -> Array:
        """[B, T, H, F] -> [B, T, lines, elements of a line]."""
        return x.reshape(self.batch, self.time, -1, self.line)

    def as_heads(self, x: Array) -> Array:
        """Undo `as_lines`."""
        return x.reshape(self.batch, self.time, self.heads, self.features)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Thread blocks over tiles of heads, chunks and the batch."""
        return (self.padded_heads // self.config.heads, self.chunks, self.batch)


@dataclasses.dataclass(frozen=True)
class Tile:
    """A sub-block of 16 tokens in shared memory: loads and stores of its rows."""

    problem: Problem
    first_token: Array

    @property
    def shape(self) -> tuple[int, int]:
        """Of a row."""
        return self.problem.config.heads, self.problem.features

    @property
    def layout(self):
        """A row over threads: neighbouring features to a thread, a head to neighbouring threads."""
        heads, features = self.shape
        vector = heads * features // (WARPS * LANES)
        tiles = ((heads, features), (heads // WARPS, features), (vector,))
        return plgpu.Layout.TILED(plgpu.Tiling(tiles), (-5,), (-3, -2), -1)

    @property
    def decay_layout(self):
        """A row's decays: each in every thread that has features of its head."""
        return self.layout.reduce(1)

    def zeros(self) -> Array:
        """A row of zeros."""
        return plgpu.layout_cast(jnp.zeros(self.shape, jnp.float32), self.layout)

    def load(self, ref: Ref, *index: int) -> Array:
        """Load a row [heads, features], or what else has this shape, as float32."""
        x = plgpu.load(self._row(ref, index), layout=self.layout, optimized=False)
        return x.astype(jnp.float32)

    def store(self, x: Array, ref: Ref, *index: int) -> None:
        """Store a row [heads, features] in the dtype of `ref`."""
        self._row(ref, index)[...] = x.astype(ref.dtype)

    def _row(self, ref: Ref, index: tuple) -> Ref:
        ref = ref.at[index]
        return ref if ref.shape == self.shape else ref.reshape(*self.shape)

    def decay(self, ref: Ref, row: int) -> tuple[Array, Array]:
        """Load a row of decays, as [heads] and spread over the features.

        Tokens behind the end have a decay of 1, so that both directions hand states on unchanged.
        """
        a = plgpu.load(ref.at[row], layout=self.decay_layout, optimized=False)
        a = a.astype(jnp.float32)
        if self.problem.time % SUBBLOCK:
            a = jnp.where(self.first_token + row < self.problem.time, a, jnp.ones_like(a))
        return a, self.spread(a)

    def spread(self, x: Array) -> Array:
        """Repeat [heads] over the features."""
        return plgpu.layout_cast(lax.broadcast_in_dim(x, self.shape, (0,)), self.layout)


def wide_scratch(slots: int, p: Problem, dtype: jnp.dtype) -> plgpu.SMEM:
    """Shared memory for tiles of v, b, c, or what else has features."""
    lines = p.config.heads * p.features // p.line
    return plgpu.SMEM((slots, SUBBLOCK, lines, p.line), dtype)


def decay_scratch(slots: int, p: Problem, dtype: jnp.dtype) -> plgpu.SMEM:
    """Shared memory for tiles of decays."""
    return plgpu.SMEM((slots, SUBBLOCK, p.config.heads), dtype)


def store_directly(ref: Ref, x: Array) -> None:
    """Store straight to global memory: few bytes, whose rows may be narrower than a sector."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, x, optimized=False)
    else:  # JAX 0.11 asks for nothing better.
        ref[...] = x


def start_loads(sources: Sequence[Ref], targets: Sequence[Ref], barrier: Ref) -> None:
    """Start a stage's loads, which all arrive on one barrier."""
    for source, target in zip(sources, targets, strict=True):
        plgpu.copy_gmem_to_smem(source, target, barrier)


def walk(
    steps: Array,
    slots: int,
    load: Callable[[Array, Array], None],
    compute: Callable[[Array, Array, tuple], tuple],
    store: Callable[[Array, Array], None],
    barriers: Ref,
    state: tuple,
) -> tuple:
    """Run `steps` steps, the loads of the next `slots - 1` in flight while one is computed.

    Args:
        steps: number of steps.
        slots: stages in shared memory; step i uses stage i % slots.
        load: starts the loads (step, slot) of a step.
        compute: takes (step, slot, state) to the next state, and leaves outputs in shared memory.
        store: starts the stores (step, slot) of a step.
        barriers: one for each slot.
        state: first state.
    """
    for step in range(slots - 1):

        @pl.when(step < steps)
        def _(step=step):
            load(jnp.int32(step), jnp.int32(step))

    def body(step: Array, state: tuple) -> tuple:
        slot = lax.rem(step, jnp.int32(slots))
        plgpu.barrier_wait(barriers.at[slot])
        state = compute(step, slot, state)
        # Every thread is done with the slot, and its results are visible to the TMA unit.
        plgpu.commit_smem()
        store(step, slot)
        # The slot of the previous step is free again: no thread reads it any more, and of the
        # stores only those of this step may still be reading shared memory.
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        ahead = step + (slots - 1)

        @pl.when(ahead < steps)
        def _():
            load(ahead, lax.rem(ahead, jnp.int32(slots)))

        return state

    state = lax.fori_loop(0, steps, body, state)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    return state


def place(p: Problem) -> tuple[Array, Any, Array, Array]:
    """Return batch element, its heads as a slice, chunk, and number of sub-blocks in it."""
    chunk = lax.axis_index("chunk")
    per_chunk = p.config.chunk // SUBBLOCK
    steps = jnp.minimum(p.subblocks - chunk * per_chunk, per_chunk)
    return lax.axis_index("batch"), _slice_of(p.config.heads), chunk, steps


def _slice_of(size: int) -> Any:
    """The thread block's own part of an axis, of which every one has `size`."""
    return pl.ds(lax.axis_index("head") * size, size)


def part_of(p: Problem, ref: Ref, batch: Array, index: Array) -> Ref:
    """Return the tile of a sub-block: of decays [B, T, H'], or of lines [B, T, lines, line]."""
    tokens = pl.ds(index * SUBBLOCK, SUBBLOCK)
    size = p.config.heads
    if len(ref.shape) == 4:
        size = size * p.features // p.line
    return ref.at[batch, tokens, _slice_of(size)]


def launch(p: Problem, body: Callable, name: str, out_type, scratch_types) -> Callable:
    """Return the kernel over the problem's grid."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=p.grid,
        grid_names=("head", "chunk", "batch"),
        compiler_params=COMPILER_PARAMS,
        kernel_name=name,
    )
