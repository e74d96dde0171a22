"""Our kernels at their reference shape, with what they are allowed to cost.

The reference shape is B 8, T 8192, H 128, D 16, bf16; of the kernels of the mLSTM and of the gated
delta rule, H 16, Dk 128, Dv 256.
`python -m pallas_kernels.targets --chip=h100` compiles every entry of the chip's platform and holds
it to its budget.

A backend lists its kernels in a function `entries() -> tuple[Entry, ...]` of a module in
`_MODULES`. For example

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.targets import (
    CHIPS,
    Budget,
    Chip,
    Launch,
    TargetReport,
    broken_budgets,
    compile_for,
    default_budget,
)

__all__ = ["Budget", "Entry", "Launch", "check", "default_budget", "entries"]

BATCH, TIME, HEADS, FEATURES = 8, 8192, 128, 16
_MATRIX_MEMORIES = "mLSTM, gated delta rule: H 16, Dk 128, Dv 256"
SHAPES = f"B {BATCH}, T {TIME}, H {HEADS}, D {FEATURES} ({_MATRIX_MEMORIES}), bfloat16"

_MODULES = (
    "pallas_kernels.mlstm.entries_gpu",
    "pallas_kernels.gated_delta.entries_gpu",
    "pallas_kernels.swr.entries_gpu",
    "pallas_kernels.swr.entries_tpu",
    "pallas_kernels.mlstm.entries_tpu",
    "pallas_kernels.gated_delta.entries_tpu",
)


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
        matrix_flops: operations of its matrix products, two for a multiplication and addition.
        launches: one per kernel of the call; () on a TPU where nothing need be said.
        chips: names of chips that this entry is for; None: all of the platform.
        budget: what it may take on a chip, `Budget`.
    """

    name: str
    platform: str
    build: Callable[[Chip], tuple[Callable[..., Any], tuple[Any, ...]]]
    bytes_minimum: int
    bytes_moved: int | None = None
    matrix_flops: int = 0
    launches: tuple[Launch, ...] = ()
    chips: tuple[str, ...] | None = None
    budget: Callable[[Chip], Budget] = default_budget

    def __post_init__(self):
        if self.platform not in ("gpu", "tpu"):
            raise ValueError(f"platform={self.platform!r}: must be 'gpu' or 'tpu'")
        if self.platform == "gpu" and self.bytes_moved is None:
            raise ValueError(f"{self.name}: bytes_moved must be given for a GPU kernel")


def entries() -> tuple[Entry, ...]:
    """All entries of all backends that exist."""
    return tuple(
        entry for module in _MODULES for entry in importlib.import_module(module).entries()
    )


def check(
    chip_name: str, kernel: str = "", dumps: Path | None = None
) -> list[tuple[TargetReport, list[str]]]:
    """Reports on every entry for a chip, each with the budgets that it breaks, in words.

    Sets `jax_platforms` to "cpu" for the process: no device is needed, and none should be taken.

    Args:
        chip_name: a name in `targets.CHIPS`.
        kernel: only entries whose name contains this.
        dumps: folder to keep the compilers' texts in, by chip and entry.
    """
    jax.config.update("jax_platforms", "cpu")
    chip = CHIPS[chip_name]
    results = []
    for entry in entries():
        supported = entry.chips is None or chip.name in entry.chips
        if entry.platform != chip.platform or not supported or kernel not in entry.name:
            continue
        fn, shapes = entry.build(chip)
        report = compile_for(
            chip,
            fn,
            *shapes,
            launches=entry.launches,
            bytes_moved=entry.bytes_moved,
            bytes_minimum=entry.bytes_minimum,
            matrix_flops=entry.matrix_flops,
            name=entry.name,
            dumps=None if dumps is None else dumps / chip.name / entry.name.replace("/", "-"),
        )
        results.append((report, broken_budgets(report, entry.budget(chip))))
    return results
