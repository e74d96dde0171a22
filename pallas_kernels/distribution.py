"""How a recurrence kernel spreads over devices and over `vmap`: every batch element and head alone.

A kernel is a function of arrays that this module calls with the part that one device has. Arrays
are described by a letter for each axis, such as "bthd": "b" (batch) and "h" (heads) may be split
over devices, in the same way in every array that has them; the other axes are whole on each device.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels.interpreter import simulated_platform

Array = jax.Array
SPLIT = ("b", "h")


def distributed(
    fn: Callable,
    arguments: tuple,
    axes: Sequence[str],
    results: Any,
    *,
    automatic: bool = True,
) -> Any:
    """Return fn(*arguments), each device doing its own batch elements and heads.

    Nothing is communicated. Under `vmap` the mapped axis becomes part of the batch. Under
    `shard_map` fn sees what it is given, and what it returns varies over the mesh axes that its
    arguments vary over.

    Args:
        fn: takes and returns trees of arrays; "b" is the first axis of each.
        arguments: its arguments.
        axes: for each argument the letters of the axes of its arrays.
        results: tree like what fn returns, with letters for arrays.
        automatic: whether the compiler may split fn; that of TPUs cannot.
    """
    leaves, tree = jax.tree.flatten(arguments)
    inputs = [
        letters
        for letters, argument in zip(axes, arguments, strict=True)
        for _ in jax.tree.leaves(argument)
    ]
    outputs, results_tree = jax.tree.flatten(results)

    def flat(*leaves: Array) -> tuple[Array, ...]:
        found, found_tree = jax.tree.flatten(fn(*jax.tree.unflatten(tree, leaves)))
        assert found_tree == results_tree, (found_tree, results_tree)
        return tuple(found)

    names = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in leaves))
    found = _batched(flat, inputs, outputs, automatic)(*leaves)
    return jax.tree.unflatten(results_tree, [_varying(x, names) for x in found])


def refuse_automatic_axes() -> None:
    """Raise NotImplementedError where the compiler would have to split a TPU kernel: it cannot."""
    mesh = jax.sharding.get_abstract_mesh()
    automatic = [
        name
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
        if kind == AxisType.Auto and size > 1
    ]
    if automatic and simulated_platform() is None:
        raise NotImplementedError(
            f"the mesh in context has automatic axes {automatic}: the TPU's compiler cannot split "
            "a kernel; call it inside jax.shard_map, or make the axes explicit"
        )


def _batched(
    fn: Callable, inputs: Sequence[str], outputs: Sequence[str], automatic: bool
) -> Callable:
    """Make `vmap` of fn a call with a larger batch."""
    batched = custom_vmap(_partitioned(fn, inputs, outputs, automatic))

    @batched.def_vmap
    def _(size: int, in_batched: Sequence[bool], *arrays: Array):
        def merge(x: Array, is_batched: bool) -> Array:
            if not is_batched:
                x = jnp.broadcast_to(x[None], (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        merged = [merge(*pair) for pair in zip(arrays, in_batched, strict=True)]
        found = _batched(fn, inputs, outputs, automatic)(*merged)
        split = tuple(x.reshape(size, -1, *x.shape[1:]) for x in found)
        return split, (True,) * len(split)

    return batched


def _varying(x: Array, axes: frozenset[str]) -> Array:
    missing = tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def _partitioned(
    fn: Callable, inputs: Sequence[str], outputs: Sequence[str], automatic: bool
) -> Callable:
    """Split fn over "b" and "h": as the compiler finds best, or as explicit shardings say."""
    if simulated_platform():  # It orders its effects, which a custom partitioning cannot carry.
        return fn
    if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        return functools.partial(_by_explicit_shardings, fn, inputs, outputs)
    if not automatic:
        return fn

    def partition(mesh: Mesh, arguments, _):
        shardings = [argument.sharding.spec for argument in arguments]
        spec = functools.partial(_spec, _split(shardings, inputs))

        def sharding(axes: str) -> NamedSharding:
            return NamedSharding(mesh, spec(axes))

        return mesh, fn, tuple(map(sharding, outputs)), tuple(map(sharding, inputs))

    def rule(axes: Sequence[str]) -> str:
        return ", ".join(" ".join(x) for x in axes)

    whole = [axis for axis in dict.fromkeys("".join((*inputs, *outputs))) if axis not in SPLIT]
    wrapped = custom_partitioning(fn)
    wrapped.def_partition(
        partition=partition,
        sharding_rule=f"{rule(inputs)} -> {rule(outputs)}",
        need_replication_factors=tuple(whole),
    )
    return wrapped


def _by_explicit_shardings(
    fn: Callable, inputs: Sequence[str], outputs: Sequence[str], *arrays: Array
) -> tuple[Array, ...]:
    split = _split([jax.typeof(x).sharding.spec for x in arrays], inputs)
    specs = tuple(_spec(split, axes) for axes in inputs)
    arrays = map(jax.sharding.reshard, arrays, specs)
    results = tuple(_spec(split, axes) for axes in outputs)
    return jax.shard_map(fn, in_specs=specs, out_specs=results, check_vma=False)(*arrays)


def _split(specs: Sequence[PartitionSpec], inputs: Sequence[str]) -> dict[str, Any]:
    """Return the mesh axes over which "b" and "h" are split, by the array with most axes."""
    widest = max(range(len(inputs)), key=lambda i: len(inputs[i]))
    found = dict(zip(inputs[widest], specs[widest], strict=False))
    return {axis: found.get(axis) for axis in SPLIT}


def _spec(split: dict[str, Any], axes: str) -> PartitionSpec:
    return PartitionSpec(*(split.get(axis) for axis in axes))
