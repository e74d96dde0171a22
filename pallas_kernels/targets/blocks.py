"""How many bytes a Pallas TPU kernel's pipeline moves, from its grid and BlockSpecs.

The pipeline walks the grid with its last axis fastest, fetches an input's block when its index
changes and writes an output's block when its index is about to change. A block that an earlier,
not the last, step had is fetched again.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun

_LANES = 128
_SUBLANES = 8  # of an HBM tile; arrays with fewer rows have smaller tiles
_BY_HAND = ("any", "hbm", "semaphore")


@dataclasses.dataclass(frozen=True)
class Transfers:
    """What one call of a kernel moves; None: copies written by hand, or data-dependent blocks."""

    name: str
    grid: tuple[int, ...]
    read_bytes: int | None
    written_bytes: int | None


def transfers(jaxpr: Any) -> list[Transfers]:
    """What every `pallas_call` below a jaxpr moves, in the order of the program."""
    return [_transfers(equation) for equation in _pallas_calls(jaxpr)]


def _pallas_calls(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
            continue
        for value in equation.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(item, "jaxpr", item)
                if hasattr(inner, "eqns"):
                    yield from _pallas_calls(inner)


def _transfers(equation: Any) -> Transfers:
    mapping = equation.params["grid_mapping"]
    read: list[int | None] = []
    written: list[int | None] = []
    static = all(isinstance(size, int) for size in mapping.grid)
    for block in mapping.block_mappings:
        amounts = read if len(read) < mapping.num_inputs else written
        amounts.append(_block_bytes(mapping.grid, block) if static else None)
    return Transfers(
        name=equation.params["name"],
        grid=tuple(mapping.grid),
        read_bytes=_sum(read),
        written_bytes=_sum(written),
    )


def _sum(amounts: list[int | None]) -> int | None:
    known = [amount for amount in amounts if amount is not None]
    return sum(known) if len(known) == len(amounts) else None


def _block_bytes(grid: tuple[int, ...], block: Any) -> int | None:
    if str(getattr(block.block_aval, "memory_space", None)) in _BY_HAND:
        return None
    index_map = block.index_map_jaxpr
    if len(index_map.in_avals) != len(grid):
        return None  # the block depends on values that are known at run time only
    steps = np.indices(grid or (1,)).reshape(max(1, len(grid)), -1)
    with jax.default_device(jax.devices("cpu")[0]):
        at = jax.vmap(lambda step: jaxpr_as_fun(index_map)(*step[: len(grid)]))
        indices = np.stack(at(jnp.asarray(steps.T, jnp.int32)), axis=1)
    moved = np.concatenate([[True], np.any(indices[1:] != indices[:-1], axis=1)])
    indices = indices[moved]

    shape = block.array_aval.shape
    extents = []
    for axis, dimension in enumerate(block.block_shape):
        kind = type(dimension).__name__
        size = (
            1 if kind in ("Squeezed", "NoneType") else getattr(dimension, "block_size", dimension)
        )
        start = indices[:, axis] * (1 if kind == "Element" else size)
        extents.append(np.clip(shape[axis] - start, 0, size))
    return int(_padded(extents, shape).sum()) * block.array_aval.dtype.itemsize


def _padded(extents: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Elements of blocks of these extents, where an array lies in HBM in tiles."""
    elements = np.ones_like(extents[0]) if extents else np.ones(1, int)
    for axis, extent in enumerate(extents):
        from_the_right = len(shape) - axis
        tile = 1
        if from_the_right == 1:
            tile = _LANES
        elif from_the_right == 2:
            tile = min(_SUBLANES, 1 << math.ceil(math.log2(max(1, shape[axis]))))
        elements = elements * (-(-extent // tile) * tile)
    return elements
