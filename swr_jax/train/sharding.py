"""Which array lives where: the mesh, and one table from logical axis names to mesh axes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from swr_jax.train.config import MeshConfig

MESH_AXES = ("data", "fsdp", "tensor", "sequence")
# Axes in the order in which they run over several slices.
_BETWEEN_SLICES = ("data", "fsdp", "sequence", "tensor")
BATCH_AXES = ("data", "fsdp")
BATCH_SPEC = jax.P(BATCH_AXES, "sequence")  # [B, T]
MICRO_BATCH_SPEC = jax.P(None, BATCH_AXES, "sequence")  # [micro-batches, B, T]

# Logical name of a parameter's axis -> mesh axis that splits it (None: kept whole).
AXIS_RULES: dict[str, str | None] = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "norm": None,
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A (data, fsdp, tensor, sequence) mesh over all devices, or over those given.

    Over several slices, between which the network is slow, the axes that communicate least run
    first: `data`, then `fsdp`, `sequence`, `tensor`. Two slices of 16 chips with data=2, fsdp=16
    hold one copy of the model each, and exchange nothing but its gradient. Within a slice an axis
    may be a part of a physical one, as 16 devices of 4 x 8 x 8.

    Raises ValueError when the axis sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"at most one mesh axis may be -1, got {' and '.join(free)}")
    if bad := [axis for axis, size in sizes.items() if size < 1 and size != -1]:
        raise ValueError(f"mesh.{bad[0]} must be >= 1 or -1, got {sizes[bad[0]]}")
    if free:
        fixed = math.prod(size for size in sizes.values() if size != -1)
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        shown = ", ".join(f"{axis}={getattr(config, axis)}" for axis in MESH_AXES)
        raise ValueError(
            f"mesh ({shown}) does not fit {len(devices)} device(s): the sizes must multiply to "
            f"{len(devices)}; set one of them to -1 to take what is left"
        )
    # Auto: parameters and batches are placed here, the compiler places what lies between.
    types = (AxisType.Auto,) * 4
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        arranged = mesh_utils.create_device_mesh(
            tuple(sizes.values()), devices, allow_split_physical_axes=True
        )
        return Mesh(arranged, MESH_AXES, axis_types=types)
    between = dict.fromkeys(MESH_AXES, 1)  # slices along each axis
    for axis in _BETWEEN_SLICES:
        between[axis] = math.gcd(sizes[axis], slices)
        slices //= between[axis]
    arranged = mesh_utils.create_hybrid_device_mesh(
        [sizes[axis] // between[axis] for axis in MESH_AXES],
        [between[axis] for axis in MESH_AXES],
        devices,
        allow_split_physical_axes=True,
    )
    return Mesh(arranged, MESH_AXES, axis_types=types)


def logical_axes(state: nnx.State) -> dict[str, Any]:
    """The logical axis names of every parameter, a tuple each, nested like the parameters.

    Raises ValueError for a parameter whose axes are not all named.
    """

    def names(path: tuple, variable: nnx.Variable) -> tuple[str | None, ...]:
        found = variable.get_metadata("out_sharding", None)
        if found is None or len(found) != len(variable.shape):
            raise ValueError(
                f"parameter {'.'.join(map(str, path))} of shape {variable.shape} has logical axis "
                f"names {found}: name each of its axes"
            )
        return tuple(found)

    flat = {path: names(path, variable) for path, variable in nnx.to_flat_state(state)}
    return nnx.traversals.unflatten_mapping(flat)


def param_shardings(params: Any, axes: Any, mesh: Mesh) -> Any:
    """One NamedSharding per parameter by `AXIS_RULES`.

    A dimension that its mesh axis does not divide is kept whole (a vocabulary of 257 on 2 devices).
    Raises ValueError for a logical name that the table does not have.
    """

    def spec(param: jax.ShapeDtypeStruct, names: tuple[str | None, ...]) -> NamedSharding:
        dims = []
        for size, name in zip(param.shape, names, strict=True):
            if name is not None and name not in AXIS_RULES:
                raise ValueError(
                    f"logical axis name {name!r} is not in AXIS_RULES; it has {sorted(AXIS_RULES)}"
                )
            axis = None if name is None else AXIS_RULES[name]
            # An axis can split one dimension of an array only: the first that asks gets it.
            usable = axis is not None and size % mesh.shape[axis] == 0 and axis not in dims
            dims.append(axis if usable else None)
        return NamedSharding(mesh, jax.P(*dims))

    return jax.tree.map(spec, params, axes)


def gathered(sharding: NamedSharding) -> NamedSharding:
    """A parameter's sharding while it is in use: whole again along fsdp."""
    spec = jax.P(*(None if axis == "fsdp" else axis for axis in sharding.spec))
    return NamedSharding(sharding.mesh, spec)


def opt_state_shardings(
    optimizer: optax.GradientTransformation, opt_state: Any, shardings: Any, mesh: Mesh
) -> Any:
    """Shardings of the optimizer state: moments like their parameters, counters on every device."""
    replicated = NamedSharding(mesh, jax.P())
    return optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        opt_state,
        shardings,
        transform_non_params=lambda _: replicated,
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a [B, T] batch: sequences over data and fsdp, time over the sequence axis."""
    return NamedSharding(mesh, BATCH_SPEC)


def check_split(mesh: Mesh, *, batch_size: int, sequence_length: int, accumulation: int) -> None:
    """Raises ValueError when a mesh does not divide a [batch_size, sequence_length] batch."""
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % (shards * accumulation):
        raise ValueError(
            f"data.batch_size={batch_size} must be a multiple of mesh.data x mesh.fsdp x "
            f"accumulation = {mesh.shape['data']} x {mesh.shape['fsdp']} x {accumulation} = "
            f"{shards * accumulation}"
        )
    if sequence_length % mesh.shape["sequence"]:
        raise ValueError(
            f"data.sequence_length={sequence_length} must be a multiple of mesh.sequence="
            f"{mesh.shape['sequence']}"
        )


def check_batch(mesh: Mesh, *, batch_size: int, sequence_length: int, accumulation: int) -> None:
    """Raises ValueError when a batch cannot be split on the mesh, or among the processes."""
    check_split(
        mesh, batch_size=batch_size, sequence_length=sequence_length, accumulation=accumulation
    )
    shape = (batch_size, sequence_length)
    places = batch_sharding(mesh).addressable_devices_indices_map(shape).values()
    rows = {row for index in places for row in range(*index[0].indices(batch_size))}
    if len(rows) != batch_size // jax.process_count():
        raise ValueError(
            f"mesh.tensor={mesh.shape['tensor']} x mesh.sequence={mesh.shape['sequence']} reaches "
            "over several processes, which read different rows of a batch: make it fit the "
            f"{jax.local_device_count()} device(s) of one process"
        )


def put_batch(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """This process's rows of a batch, as global arrays."""
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }
