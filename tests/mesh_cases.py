"""Meshes for tests, and what a program compiled for one sends between devices."""

import re

import jax
from jax.sharding import AxisType

AXES = ("data", "fsdp", "tensor", "sequence")
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def mesh_of(*sizes):
    """A mesh with the axes that the operators know, sharded by the compiler."""
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 4)


def collectives(text):
    """How many of each kind a compiled program has; those that it has none of are left out."""
    counts = {name: len(re.findall(rf"\b{name}(?:-start)?\(", text)) for name in COLLECTIVES}
    return {name: count for name, count in counts.items() if count}
