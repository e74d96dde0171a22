"""What a traced program computes: operations of matrix products, and kernels with what they take.

Counted in the trace, where loops have their lengths and `jax.shard_map` shows what one device does;
what rematerialisation repeats is in it.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import core


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Pallas kernel as one device calls it.

    Attributes:
        name: that its author gave it.
        calls: how often a device calls it.
        flops, bytes: of one call, as its author estimates them.
    """

    name: str
    calls: int
    flops: float
    bytes: float


@dataclasses.dataclass
class Cost:
    """What a program takes, over all devices where it says so.

    Attributes:
        flops: of matrix products outside of kernels and of the kernels, over all devices; two for
            a multiplication and an addition.
        kernels: of one device.
        unknown_loops: loops whose length the trace does not tell; they count once.
    """

    flops: float = 0.0
    kernels: list[Kernel] = dataclasses.field(default_factory=list)
    unknown_loops: int = 0


def cost_of(jaxpr: core.Jaxpr) -> Cost:
    """Count what a traced program does."""
    cost = Cost()
    _add(cost, jaxpr, calls=1, devices=1)
    return cost


def _add(cost: Cost, jaxpr: core.Jaxpr, calls: int, devices: int) -> None:
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        times, parts = calls, devices
        if name == "dot_general":
            cost.flops += calls * devices * _product_flops(equation)
        elif name == "pallas_call":
            kernel = _kernel(equation, calls, cost.kernels)
            cost.kernels.append(kernel)
            cost.flops += kernel.flops * calls * devices
            continue
        elif name == "scan":
            times = calls * parameters["length"]
        elif name == "while":
            cost.unknown_loops += 1
        elif name == "shard_map":
            mesh = parameters["mesh"]
            parts = devices * math.prod(
                mesh.shape[axis] for axis in parameters["newly_manual_axes"]
            )
        if name == "cond":
            branches = [Cost() for _ in parameters["branches"]]
            for branch, inner in zip(branches, parameters["branches"], strict=True):
                _add(branch, inner.jaxpr, times, parts)
            dearest = max(branches, key=lambda branch: branch.flops)
            cost.flops += dearest.flops
            cost.kernels += dearest.kernels
            cost.unknown_loops += dearest.unknown_loops
            continue
        for inner in _inner(parameters):
            _add(cost, inner, times, parts)


def _inner(parameters: dict[str, Any]) -> Iterator[core.Jaxpr]:
    for value in parameters.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def _product_flops(equation: core.JaxprEqn) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, out = equation.invars[0].aval, equation.outvars[0].aval
    return 2.0 * math.prod(out.shape) * math.prod(left.shape[axis] for axis in contracted)


def _kernel(equation: core.JaxprEqn, calls: int, before: list[Kernel]) -> Kernel:
    name = equation.params["name"] or "kernel"
    estimate = equation.params["cost_estimate"]
    if estimate is not None:
        return Kernel(name, calls, float(estimate.flops), float(estimate.bytes_accessed))
    arrays = [variable.aval for variable in (*equation.invars, *equation.outvars)]
    moved = float(sum(x.size * x.dtype.itemsize for x in arrays))
    if name.startswith("splash_mha_fwd"):
        return Kernel(name, calls, _attention_flops(equation), moved)
    if name.startswith("splash_mha_dkv") and (forward := _last_without_gradient(before)):
        # Of the blocks of which the forward has two products: five, or without dq four.
        is_fused = len(equation.outvars) > 2
        return Kernel(name, calls, (2.5 if is_fused else 2.0) * forward.flops, moved)
    if name.startswith("splash_mha_dq") and before[-1].name.startswith("splash_mha_dkv"):
        return Kernel(name, calls, 3 / 4 * before[-1].flops, moved)  # Three, where dkv has four.
    raise ValueError(
        f"the Pallas kernel {name!r} has no pl.CostEstimate: give it one, or no plan can count it"
    )


def _last_without_gradient(kernels: list[Kernel]) -> Kernel | None:
    """The last attention forward whose backward is still to come: the last layer's comes first."""
    waiting: list[Kernel] = []
    for kernel in kernels:
        if kernel.name.startswith("splash_mha_fwd"):
            waiting.append(kernel)
        elif kernel.name.startswith("splash_mha_dkv"):
            waiting.pop()
    return waiting[-1] if waiting else None


def _attention_flops(equation: core.JaxprEqn) -> float:
    """Two products of each block that a causal mask leaves; a window's blocks are the grid's."""
    grid = equation.params["grid_mapping"]
    queries, keys = (
        [size for size in map(_block_size, mapping.block_shape) if size]
        for mapping in grid.block_mappings[:2]
    )
    (block_q, features), (block_kv, _) = queries, keys
    last, seen = (mapping.array_aval.shape[-2] for mapping in grid.block_mappings[:2])
    *outer, rows, columns = grid.grid
    blocks = float(rows * columns)
    if columns * block_kv >= seen:  # The grid is whole, and what is not before a query is skipped.
        before = seen - last
        blocks = sum(-(-(before + (row + 1) * block_q) // block_kv) for row in range(rows))
    return math.prod(outer) * blocks * 4.0 * block_q * block_kv * features


def _block_size(dimension: Any) -> int | None:
    if isinstance(dimension, int):
        return dimension
    return getattr(dimension, "block_size", None)


def traced_cost(traced: jax.stages.Traced) -> Cost:
    """Count what `jax.jit(f).trace(...)` does."""
    return cost_of(traced.jaxpr.jaxpr)
