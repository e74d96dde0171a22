"""What a training step would take on chips that are not here, from their own compiler.

The step is the one that `swr_jax.train.loop` runs, compiled for the topology. Memory is what the
compiler allocates. Time is a sum of three predictions, none of them measured:

- operations of XLA: the TPU compiler's own estimates, loops times their trip counts;
- Pallas kernels, which it does not estimate: the larger of the time for their bytes at the memory's
  peak bandwidth and that for their products at the matrix units' peak, as their authors count them
  (for attention, whose kernels are far from that peak, this flatters attention);
- collectives: their bytes over all links of a chip, with no overlap and no latency. With perfect
  overlap the step takes the larger of this and the rest, which is given beside it.
"""

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pallas_kernels import targets
from pallas_kernels.targets import hlo
from swr_jax.train.config import TrainConfig
from swr_jax.train.cost import Cost, traced_cost
from swr_jax.train.flops import flops_per_token
from swr_jax.train.sharding import batch_sharding, check_split, make_mesh
from swr_jax.train.state import Blueprint, make_blueprint
from swr_jax.train.step import make_train_step

# How often the bytes that a collective returns cross a chip's links, on a ring.
_CROSSINGS = {"all-reduce": 2.0}
_DTYPES = {
    "tokens": jnp.int32,
    "targets": jnp.int32,
    "positions": jnp.int32,
    "segment_ids": jnp.int32,
    "target_bytes": jnp.int32,
    "loss_weights": jnp.float32,
}
_USED = re.compile(r"Used ([\d.]+)([GM]) of ([\d.]+)([GM]) hbm")


def parse_topology(text: str) -> tuple[str, str]:
    """Return chip and shape of a topology such as "v5e:16x16".

    Raises:
        ValueError: it is not of that form, or no such chip is known.
    """
    chip, colon, shape = text.partition(":")
    if not colon or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise ValueError(f"topology={text!r}: must be CHIP:AxB or CHIP:AxBxC, such as v5e:16x16")
    if chip not in targets.CHIPS:
        raise ValueError(f"topology={text!r}: the chip must be one of {', '.join(targets.CHIPS)}")
    return chip, shape


def make_plan(config: TrainConfig, topology: str) -> dict[str, Any]:
    """Compile a configuration's training step for a topology, and say what it would take.

    Args:
        config: with the mesh and batch to plan; `model.vocab_size` set.
        topology: such as "v5e:16x16"; see `parse_topology`.

    Returns:
        A JSON-able record. Bytes, FLOPs and seconds of a device and one update, unless a name says
        otherwise. "fits" is False where the compiler found no room, or failed for the reason that
        "failure" then gives; "seconds" is missing in both cases.

    Raises:
        ValueError: the mesh does not fit the topology or the batch, or there is a teacher.
        MissingCompilerError: the optional dependency `targets` is not installed.
    """
    if config.distill.teacher:
        raise ValueError(
            f"distill.teacher={config.distill.teacher!r}: updates with a teacher have no plan; "
            "leave it empty to plan those of the model alone"
        )
    name, shape = parse_topology(topology)
    chip = targets.CHIPS[name]
    devices = targets.devices(name, shape, kernels=False)
    mesh = make_mesh(config.mesh, devices)
    rows, length = config.data.batch_size, config.data.sequence_length
    check_split(mesh, batch_size=rows, sequence_length=length, accumulation=config.accumulation)
    blueprint = make_blueprint(config, mesh)
    plan = {
        "topology": topology,
        "devices": len(devices),
        "mesh": dict(mesh.shape),
        "rows": rows,
        "length": length,
        "tokens_per_update": rows * length,
        "parameters": blueprint.num_params,
        "memory_limit": chip.memory_bytes,
        "held": _held(blueprint, mesh, rows, length),
        "flops_per_token": flops_per_token(
            config.model, num_params=blueprint.num_params, length=length
        ),
    }
    step = make_train_step(blueprint, mesh, accumulation=config.accumulation, z_loss=config.z_loss)
    found, program, cost = compile_step(
        lambda: step.trace(blueprint.abstract, _batch(mesh, rows, length)), chip, devices[0]
    )
    plan |= found
    return plan if program is None else plan | _times(plan, chip, program, cost)


def compile_step(
    trace: Callable[[], jax.stages.Traced], chip: targets.Chip, device: jax.Device
) -> tuple[dict[str, Any], hlo.Program | None, Cost]:
    """Compile a step for a chip, and say what memory it takes.

    Args:
        trace: returns the step, traced for arguments with shardings on the chip's devices.
        chip: what is compiled for.
        device: one of these devices.

    Returns:
        "fits", "memory", "traced_flops", and what else `make_plan` says of a compiled step; the
        program, None if it does not fit; and what it computes.
    """
    started = time.monotonic()
    # Which kernels there are, is asked of the default device.
    with jax.default_device(device):
        traced = trace()
        cost = traced_cost(traced)
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            message = str(error)
            found = {"fits": False, "memory": _used(message), "traced_flops": cost.flops}
            if "RESOURCE_EXHAUSTED" not in message:
                found["failure"] = message.splitlines()[0]
            return found, None, cost
    seconds = time.monotonic() - started
    memory = compiled.memory_analysis()
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    used += memory.output_size_in_bytes - memory.alias_size_in_bytes
    program = hlo.parse(compiled.as_text(), chip.platform)
    found = {
        "compile_seconds": seconds,
        "fits": used <= chip.memory_bytes,
        "memory": used,
        "temporary": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "traced_flops": cost.flops,
        "unknown_loops": len(program.unknown_loops) + cost.unknown_loops,
        "unestimated_operations": program.unestimated,
    }
    return found, program, cost


def _times(plan: Mapping, chip: targets.Chip, program: hlo.Program, cost: Cost) -> dict[str, Any]:
    found = step_times(chip, program, cost)
    if "seconds" not in found:
        return found
    model_flops = plan["flops_per_token"] * plan["tokens_per_update"] / plan["devices"]
    return found | {
        "tokens_per_second": plan["tokens_per_update"] / found["seconds"],
        "mfu": model_flops / found["seconds"] / chip.matrix_flops_per_second,
    }


def step_times(chip: targets.Chip, program: hlo.Program, cost: Cost) -> dict[str, Any]:
    """Predict how long a compiled step takes, by its parts: see the module.

    Returns:
        "kernels" and "collectives" by name and kind; and on TPUs, whose compiler estimates the
        rest, "xla_seconds", "compute_seconds", "collective_seconds", "seconds" and
        "seconds_if_overlapped".
    """
    kernels: dict[str, dict[str, float]] = {}
    for kernel in cost.kernels:
        total = kernels.setdefault(kernel.name, {"calls": 0, "seconds": 0.0})
        total["calls"] += kernel.calls
        total["seconds"] += kernel.calls * max(
            kernel.bytes / chip.hbm_bytes_per_second,
            kernel.flops / chip.matrix_flops_per_second,
        )
    calls, moved = Counter(), Counter()
    for collective in program.collectives:
        calls[collective.kind] += collective.calls
        moved[collective.kind] += collective.calls * collective.bytes
    collectives = {
        kind: {
            "calls": calls[kind],
            "bytes": moved[kind],
            "seconds": _CROSSINGS.get(kind, 1.0) * moved[kind] / chip.link_bytes_per_second,
        }
        for kind in moved
    }
    found: dict[str, Any] = {"kernels": kernels, "collectives": collectives}
    if program.cycles is None:  # GPUs: their compiler estimates nothing.
        return found
    compute = program.cycles / chip.clock_hz + sum(k["seconds"] for k in kernels.values())
    links = sum(c["seconds"] for c in collectives.values())
    return found | {
        "xla_seconds": program.cycles / chip.clock_hz,
        "compute_seconds": compute,
        "collective_seconds": links,
        "seconds": compute + links,
        "seconds_if_overlapped": max(compute, links),
    }


def _held(blueprint: Blueprint, mesh: Mesh, rows: int, length: int) -> dict[str, int]:
    """Bytes of a device that stay from update to update, by kind."""

    def total(tree: Any) -> int:
        return sum(
            math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize
            for x in jax.tree.leaves(tree)
        )

    return {
        "parameters": total(blueprint.abstract.params),
        "optimizer": total(blueprint.abstract.opt_state),
        "batch": total(_batch(mesh, rows, length)),
    }


def _batch(mesh: Mesh, rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    sharding = batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((rows, length), dtype, sharding=sharding)
        for name, dtype in _DTYPES.items()
    }


def _used(message: str) -> float | None:
    """Bytes that the compiler wanted, as it says."""
    found = _USED.search(message)
    units = {"G": 2**30, "M": 2**20}
    return None if found is None else float(found[1]) * units[found[2]]
