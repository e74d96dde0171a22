"""Which implementations the device at hand has, and which of them a call may use."""

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.interpreter import simulated_platform

# GPUs with a tensor memory accelerator: Hopper, and the data-centre Blackwells.
_WITH_TMA = re.compile(r"\b(G?H(100|200|800|20)|G?B(100|200|300))\b|^simulated$")
# Those with Hopper's instructions for products of matrices, which its successors do not have.
_WITH_WGMMA = re.compile(r"\bG?H(100|200|800|20)\b|^simulated$")


class Target(NamedTuple):
    """The kind of device that a function is being traced for."""

    platform: str  # "cpu", "gpu", "tpu", ...
    kind: str  # as its maker calls it: "NVIDIA H100 80GB HBM3"


def target() -> Target:
    """Return what the present trace is for: the mesh in context, else the default device.

    So a function that is compiled for devices that are not there, under `jax.set_mesh` with a mesh
    of a `jax.experimental.topologies` description, gets the kernels of those devices. Where a
    Pallas interpreter is forced, it is the chip that this simulates.
    """
    if platform := simulated_platform():
        return Target(platform, "simulated")
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.config.jax_default_device
    if device is None:
        device = jax.devices()[0]
    elif isinstance(device, str):
        device = jax.devices(device)[0]
    return Target(device.platform, device.device_kind)


def has_wgmma() -> bool:
    """Whether the present trace is for a GPU with Hopper's products of matrices."""
    return _WITH_WGMMA.search(target().kind) is not None


def matrix_memory_kernel(
    implementation: str, modules: Mapping[str, str], dtype: jnp.dtype
) -> ModuleType:
    """Return the module of an operator with a matrix memory, imported when it is first used.

    Args:
        implementation: a key of `modules`.
        modules: their names.
        dtype: of the maths.

    Raises:
        NotImplementedError: kernels do not have this dtype, or the GPU lacks Hopper's products.
    """
    if dtype != jnp.float32:
        raise NotImplementedError(f"the maths is in {dtype}: kernels have float32")
    if implementation == "mosaic_gpu" and not has_wgmma():
        raise NotImplementedError(f"{target().kind}: the kernels use Hopper's products of matrices")
    return importlib.import_module(modules[implementation])


def _has_tma(target: Target) -> bool:
    return target.platform in ("gpu", "cuda") and _WITH_TMA.search(target.kind) is not None


# Every implementation that exists, best first, and whether a target has it.
IMPLEMENTATIONS: dict[str, Callable[[Target], bool]] = {
    "mosaic_gpu": _has_tma,
    "mosaic_tpu": lambda target: target.platform == "tpu",
    "xla": lambda _: True,
}


def candidates(implementation: str | None) -> tuple[str, ...]:
    """Return the implementations that a call may try, in order: with a name given only that one.

    Raises:
        ValueError: it does not exist, or the target lacks it.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{implementation=}: unknown; must be None or one of {sorted(IMPLEMENTATIONS)}"
        )
    here = target()
    names = tuple(name for name, has in IMPLEMENTATIONS.items() if has(here))
    if implementation is None:
        return names
    if implementation not in names:
        raise ValueError(
            f"{implementation=}: not available on {here.kind} ({here.platform}), which has "
            f"{list(names)}"
        )
    return (implementation,)


def by_first_able[Result](names: Sequence[str], call: Callable[[str], Result]) -> Result:
    """Return call(name) of the first implementation that covers the case.

    Raises:
        NotImplementedError: none does; says why, of each.
    """
    refusals = []
    for name in names:
        try:
            return call(name)
        except NotImplementedError as error:
            refusals.append(f"{name}: {error}")
    raise NotImplementedError("; ".join(refusals))
