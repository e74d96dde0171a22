"""Catalogue entries of TPU kernels of matrix memories: their shape, 65,536 tokens of 16 heads."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.catalogue import Budget, Entry, Launch
from pallas_kernels.targets import CHIPS, Chip
from pallas_kernels.tpu.chunks import Tiling

BATCH, TIME, HEADS, Q_DIM, V_DIM, CHUNK = 8, 8192, 16, 128, 256, 128


def struct(*shape: int, dtype: jnp.dtype = jnp.float32) -> jax.ShapeDtypeStruct:
    """An array [B, *shape]."""
    return jax.ShapeDtypeStruct((BATCH, *shape), dtype)


# As a projection writes them; the kernels read them as they lie.
Q = struct(TIME, HEADS * Q_DIM, dtype=jnp.bfloat16)
V = struct(TIME, HEADS * V_DIM, dtype=jnp.bfloat16)
MEMORY = struct(HEADS, Q_DIM, V_DIM)


def by_head(x: jax.Array) -> jax.Array:
    """[B, T, H D] -> [B, T, H, D]."""
    return x.reshape(BATCH, TIME, HEADS, -1)


def as_it_lies(x: jax.Array) -> jax.Array:
    """Undo `by_head`."""
    return x.reshape(BATCH, TIME, -1)


def heads_of_inputs() -> list[jax.ShapeDtypeStruct]:
    """Return q, k and v by head, to which kernels fit their tiling."""
    return [jax.eval_shape(by_head, x) for x in (Q, Q, V)]


def entry(
    name: str,
    function: Callable,
    arguments: tuple,
    results: tuple,
    *,
    per_token: int,
    tilings: dict[str, Tiling],
    chip: Chip,
    budget: Budget,
) -> Entry:
    """Return an entry for a chip.

    Args:
        name, function, arguments, budget: as `Entry` has them.
        results: shapes and dtypes of what is written.
        per_token: multiplications of matrix products for each token and head.
        tilings: as `launches` takes them.
        chip: for whose VMEM the kernels are tiled.
    """
    return Entry(
        name=name,
        platform="tpu",
        build=lambda _: (function, arguments),
        bytes_minimum=sum(x.size * x.dtype.itemsize for x in (*arguments, *results)),
        matrix_flops=2 * BATCH * TIME * HEADS * per_token,
        launches=launches(tilings, BATCH * HEADS, chip.cores),
        chips=(chip.name,),
        budget=lambda _: budget,
    )


def launches(tilings: dict[str, Tiling], heads: int, cores: int) -> tuple[Launch, ...]:
    """Return how often the kernels' loops run.

    Args:
        tilings: of every kernel, by its name or a part of it that no other has.
        heads: of all rows of the batch.
        cores: of the chip, which share the steps of the grid.
    """

    def launch(kernel: str, tiling: Tiling) -> Launch:
        steps = heads // tiling.heads * tiling.steps // cores

        def trip_counts(loops):
            # Chunks of a step inside, steps of the grid outside, of which two more fetch and write.
            return [steps + 2 if loop.depth == 1 else tiling.together for loop in loops]

        return Launch(kernel, trip_counts)

    return tuple(launch(*item) for item in tilings.items())


def tpus() -> list[Chip]:
    """Return the TPUs that there are kernels for."""
    return [chip for chip in CHIPS.values() if chip.platform == "tpu"]
