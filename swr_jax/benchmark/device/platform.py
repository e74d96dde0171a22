"""The device that is measured: its kernels, its memory. A CPU stands in for both, simulating."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from swr_jax.ops import dispatch


@dataclasses.dataclass(frozen=True)
class Backend:
    """An implementation of the operators: `name` as their `implementation` takes it."""

    name: str
    simulated: bool = False

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """Trace under it: what is traced runs on the device, or simulated where there is none."""
        if not self.simulated:
            yield
        elif self.name == "mosaic_gpu":
            with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
                yield
        else:
            with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
                yield


def backends() -> tuple[Backend, ...]:
    """Return the kernels that the device has; on a CPU all of them, simulated; then XLA's form."""
    if jax.default_backend() == "cpu":
        kernels = [Backend(name, simulated=True) for name in dispatch.IMPLEMENTATIONS]
    else:
        kernels = [Backend(name) for name in dispatch.candidates(None)]
    return (*(backend for backend in kernels if backend.name != "xla"), Backend("xla"))


def free_bytes() -> int | None:
    """Return how much of the device's memory is free; None where it does not tell, as a CPU."""
    stats = jax.devices()[0].memory_stats()
    return stats["bytes_limit"] - stats["bytes_in_use"] if stats else None


@functools.cache
def is_pipelined() -> bool:
    """Whether calls are worth dispatching back to back: a CPU would run them at the same time."""
    return jax.default_backend() != "cpu"


# The names of chips in `pallas_kernels.targets`, by what `jax.Device.device_kind` contains.
_CHIPS = {
    "H100": "h100",
    "H200": "h200",
    "B200": "b200",
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6": "v6e",
    "TPU7x": "tpu7x",
}


def chip_of(device_kind: str) -> str | None:
    """Return the name under which predictions for a device are filed; None where there are none."""
    return next((chip for part, chip in _CHIPS.items() if part in device_kind), None)
