"""Compiles for a named chip with no chip present, and reports what the result takes.

    from pallas_kernels import targets

    report = targets.compile_for("h100", kernel, jax.ShapeDtypeStruct((8, 4096), jnp.float32))
    print(targets.table([report]))

`compile_for` is for functions made of Pallas kernels (Mosaic GPU or Mosaic TPU), `compile_program`
for whole XLA programs. `python -m pallas_kernels.targets --chip=h100` holds our own kernels to
their budgets. The compilers come with the optional dependency `targets`.

Nothing is run and nothing is timed: all figures are read or predicted from compiled text. They say
whether a kernel can reach the chip's memory bandwidth, not that it does.
"""

from pallas_kernels.targets.budgets import Budget, broken_budgets, default_budget
from pallas_kernels.targets.chips import CHIPS, Chip, chip_named
from pallas_kernels.targets.compiling import (
    MissingCompilerError,
    compile_for,
    compile_program,
    devices,
)
from pallas_kernels.targets.gpu import GpuKernel
from pallas_kernels.targets.launch import Launch
from pallas_kernels.targets.report import ProgramReport, TargetReport, table
from pallas_kernels.targets.tpu import TpuKernel

__all__ = [
    "CHIPS",
    "Budget",
    "Chip",
    "GpuKernel",
    "Launch",
    "MissingCompilerError",
    "ProgramReport",
    "TargetReport",
    "TpuKernel",
    "broken_budgets",
    "chip_named",
    "compile_for",
    "compile_program",
    "default_budget",
    "devices",
    "table",
]
