"""Meshes over several TPU slices, which the compiler's description of their devices stands for."""

import math
import re

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from training_cases import random_batch

from pallas_kernels import targets
from swr_jax.train.config import MeshConfig, make_train_config
from swr_jax.train.sharding import BATCH_SPEC, MESH_AXES, make_mesh
from swr_jax.train.state import make_blueprint
from swr_jax.train.step import make_train_step

pytestmark = pytest.mark.targets


@pytest.fixture(scope="module")
def two_slices():
    targets.devices("v5e", "2x2", kernels=False)  # sets the compiler up
    found = topologies.get_topology_desc("v5e:2x2", platform="tpu", num_slices=2).devices
    assert len(found) == 8
    return found


def slices_along(mesh, axis) -> int:
    """How many slices a group of devices that differ in this axis alone spans."""
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    slices = np.moveaxis(slices, MESH_AXES.index(axis), -1).reshape(-1, mesh.shape[axis])
    (count,) = {len(set(group)) for group in slices.tolist()}
    return count


@pytest.mark.parametrize(
    ("sizes", "axes"),
    [
        ({"data": 2, "fsdp": 4}, ["data"]),
        ({"data": 8}, ["data"]),
        ({"data": 2, "tensor": 2, "sequence": 2}, ["data"]),
        ({"data": 1, "fsdp": 8}, ["fsdp"]),
        ({"data": 1, "fsdp": 2, "tensor": 4}, ["fsdp"]),
        ({"data": 1, "sequence": 4, "tensor": 2}, ["sequence"]),
    ],
)
def test_the_axis_that_communicates_least_runs_between_slices(two_slices, sizes, axes):
    mesh = make_mesh(MeshConfig(**sizes), two_slices)
    assert math.prod(mesh.shape.values()) == len({device.id for device in two_slices})
    assert {a: slices_along(mesh, a) for a in MESH_AXES} == {
        a: 2 if a in axes else 1 for a in MESH_AXES
    }


def test_an_update_sends_its_gradient_to_the_other_slice_and_no_more(two_slices):
    """Each chip that part of it which it keeps."""
    config = make_train_config(
        {
            "model": {"vocab_size": 512, "features": 256, "depth": 2, "num_heads": 2},
            "data": {"sequence_length": 256, "batch_size": 8},
            "mesh": {"data": 2, "fsdp": 4},
        }
    )
    mesh = make_mesh(config.mesh, two_slices)
    blueprint = make_blueprint(config, mesh)
    rows = NamedSharding(mesh, BATCH_SPEC)
    batch = {
        name: jax.ShapeDtypeStruct((8, 256), array.dtype, sharding=rows)
        for name, array in random_batch(8, 256).items()
    }
    with jax.default_device(two_slices[0]):
        step = make_train_step(blueprint, mesh)
        text = step.trace(blueprint.abstract, batch).lower().compile().as_text()
    received = re.findall(r"= \((\w)(\d+)\[([\d,]*)\]\S* u32\S* token\S* recv\(", text)
    assert received
    found = sum(
        int(bits) // 8 * math.prod(int(size) for size in sizes.split(",") if size)
        for _, bits, sizes in received
    )
    gradient = 4 * blueprint.num_params / 4  # bytes of float32, over the four chips of a slice
    # What is too small to be split, and rows that are filled up, make an eighth here.
    assert gradient <= found < 1.2 * gradient


def test_an_axis_may_be_a_part_of_a_physical_one():
    """16 devices of 4 x 8 x 8, of which no axes multiply to 16."""
    devices = targets.devices("v5p", "4x8x8", kernels=False)
    mesh = make_mesh(MeshConfig(data=-1, fsdp=16), devices)
    assert dict(mesh.shape) == {"data": 16, "fsdp": 16, "tensor": 1, "sequence": 1}
    assert len(set(mesh.devices.flat)) == 256
