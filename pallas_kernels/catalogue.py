"""Our kernels at their reference shape, with what they are allowed to cost.

The reference shape is B 8, T 8192, H 128, D 16, bf16. `python -m pallas_kernels.targets
--chip=h100` compiles every entry of the chip's platform and holds it to its budget.

A backend lists its kernels in a function `entries() -> tuple[Entry, ...]`: Mosaic GPU's in
`pallas_kernels/swr/entries_gpu.py`, Mosaic TPU's in `pallas_kernels/swr/entries_tpu.py`. For
example

    def entries():
        def build(chip):  # chip: pallas_kernels.targets.Chip, to choose a tuning by chip.name
            u = jax.ShapeDtypeStruct((8, 8192, 128, 16), jnp.bfloat16)
            a = jax.ShapeDtypeStruct((8, 8192, 128), jnp.bfloat16)
            config = tuning.default_for(chip.name)
            return functools.partial(forward, config=config), (a, u)

        return (
            Entry(
                name="swr/plain/forward",
                platform="gpu",
                build=build,
                bytes_minimum=REFERENCE_BYTES,            # inputs once + outputs once
                bytes_moved=REFERENCE_BYTES + halo_bytes, # what the TMA copies add up to
                launches=(
                    Launch(
                        trip_counts=(64, 16),      # of the SASS's loops, by address of their head
                        bytes_in_flight=4 * 32768, # per CTA: stages in flight x bytes of a stage
                    ),
                ),
            ),
        )

`targets.compile_for(chip, fn, *arguments)` shows the loops of a kernel with their addresses, which
is what `trip_counts` has to match.
"""

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pallas_kernels.targets import Chip, Loop

BATCH, TIME, HEADS, FEATURES = 8, 8192, 128, 16

TripCounts = Sequence[int] | Callable[[Sequence["Loop"]], Sequence[int]] | None
_BACKENDS = ("entries_gpu", "entries_tpu")  # modules of pallas_kernels.swr


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a kernel may take; None: reported, but not held to anything.

    Attributes:
        spill: bytes spilled per thread (GPU), or spill slots used (TPU).
        bytes_ratio: bytes moved over `Entry.bytes_minimum`.
        bytes_in_flight: GPU only: bytes of loads under way per SM, at least.
        issue_ratio: predicted issue time over predicted memory time.
        vmem_bytes: TPU only: VMEM of one kernel; the default is the chip's own limit.
    """

    spill: int | None = 0
    bytes_ratio: float | None = 1.15
    bytes_in_flight: int | None = None
    issue_ratio: float | None = None
    vmem_bytes: int | None = None


def default_budget(chip: "Chip") -> Budget:
    """The budget of a kernel that names none of its own."""
    if chip.platform == "gpu":
        return Budget(bytes_in_flight=40 * 1024, issue_ratio=0.7)
    held = chip.name in ("v5e", "v5p", "v6e")
    return Budget(issue_ratio=0.8 if held else None, vmem_bytes=chip.vmem_limit_bytes)


@dataclasses.dataclass(frozen=True)
class Launch:
    """What the compiled text does not say about one of an entry's kernels.

    Attributes:
        kernel: a part of the kernel's name (the `name` given to `plgpu.kernel` or `pallas_call`)
            that no other kernel of the entry has; "" where the entry has only one.
        trip_counts: how often each loop of the machine code runs, per entry into it (an inner
            loop's count is per turn of the loop around it): a sequence in order of the loops'
            first addresses, a callable that gets the `targets.Loop`s in that order, or None. None
            on a TPU: counts that the compiler knows, the grid's among them, are found, and an
            error names the loops whose counts are not. None on a GPU: the kernel has no loops.
        grid: CTAs of the launch (GPU), None: read from the lowered kernel.
        bytes_in_flight: GPU: bytes of loads that one CTA keeps under way.
        warps: GPU: warps that run each loop, by address as `trip_counts`; None: all warps of the
            CTA. For kernels whose warp groups run different code: the loops of the other warps are
            not counted for a warp.
    """

    kernel: str = ""
    trip_counts: TripCounts = None
    grid: tuple[int, ...] | None = None
    bytes_in_flight: int | None = None
    warps: Sequence[int] | None = None


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of our kernels at the reference shape.

    Attributes:
        name: "operator/variant/pass", such as "swr/gated/backward".
        platform: "gpu" or "tpu".
        build: given the `targets.Chip`, returns the function to compile and its arguments, a tuple
            of pytrees of `jax.ShapeDtypeStruct`. Called once per chip, without a device.
        bytes_minimum: inputs read once + outputs written once, in bytes, over the whole call.
        bytes_moved: bytes that the call moves to and from HBM. None: from the BlockSpecs (TPU).
        launches: one per kernel of the call; () on a TPU where nothing need be said.
        chips: names of chips that this entry is for; None: all of the platform.
        budget: what it may take on a chip.
    """

    name: str
    platform: str
    build: Callable[["Chip"], tuple[Callable[..., Any], tuple[Any, ...]]]
    bytes_minimum: int
    bytes_moved: int | None = None
    launches: tuple[Launch, ...] = ()
    chips: tuple[str, ...] | None = None
    budget: Callable[["Chip"], Budget] = default_budget

    def __post_init__(self):
        if self.platform not in ("gpu", "tpu"):
            raise ValueError(f"platform={self.platform!r}: must be 'gpu' or 'tpu'")
        if self.platform == "gpu" and self.bytes_moved is None:
            raise ValueError(f"{self.name}: bytes_moved must be given for a GPU kernel")


def entries() -> tuple[Entry, ...]:
    """All entries of all backends that exist."""
    if importlib.util.find_spec("pallas_kernels.swr") is None:
        return ()
    modules = [f"pallas_kernels.swr.{backend}" for backend in _BACKENDS]
    present = [module for module in modules if importlib.util.find_spec(module) is not None]
    return tuple(entry for module in present for entry in importlib.import_module(module).entries())
