"""What a kernel may take, and how far a report stays within it."""

import dataclasses

from pallas_kernels.targets.chips import Chip
from pallas_kernels.targets.report import TargetReport
from pallas_kernels.targets.tpu import TpuKernel


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a kernel may take; None: reported, but not held to anything.

    Attributes:
        spill: bytes spilled per thread (GPU), or spill slots used (TPU).
        bytes_ratio: bytes moved over the least that the function must move.
        bytes_in_flight: GPU only: bytes of loads under way per SM, at least.
        issue_ratio: predicted issue time over predicted memory time.
        floor_ratio: predicted time over the floor, the larger of the least bytes' and the matrix
            products' time.
        vmem_bytes: TPU only: VMEM of one kernel.
    """

    spill: int | None = 0
    bytes_ratio: float | None = 1.15
    bytes_in_flight: int | None = None
    issue_ratio: float | None = None
    floor_ratio: float | None = None
    vmem_bytes: int | None = None


def default_budget(chip: Chip) -> Budget:
    """The budget of our kernels, unless an entry names another."""
    if chip.platform == "gpu":
        return Budget(bytes_in_flight=40 * 1024, issue_ratio=0.7)
    held = chip.name in ("v5e", "v5p", "v6e")
    return Budget(issue_ratio=0.8 if held else None, vmem_bytes=chip.vmem_limit_bytes)


def broken_budgets(report: TargetReport, budget: Budget) -> list[str]:
    """What a report breaks, in words; what a budget bounds and a report does not know is broken."""
    broken: list[str] = []

    def at_most(what: str, value: float | None, limit: float | None) -> None:
        if limit is not None and (value is None or value > limit):
            broken.append(f"{what} {_said(value)}, may be {_said(limit)}")

    at_most("bytes moved over the minimum:", report.bytes_ratio, budget.bytes_ratio)
    at_most("issue time over memory time:", report.issue_ratio, budget.issue_ratio)
    if budget.floor_ratio is not None:
        ratio = None if report.seconds is None else report.seconds / report.floor_seconds
        at_most("predicted time over the floor:", ratio, budget.floor_ratio)
    for kernel in report.kernels:
        at_most(f"spills of {kernel.name}:", kernel.spills, budget.spill)
        if isinstance(kernel, TpuKernel):
            at_most(f"VMEM bytes of {kernel.name}:", kernel.vmem_bytes, budget.vmem_bytes)
        elif budget.bytes_in_flight is not None and (
            kernel.bytes_in_flight is None or kernel.bytes_in_flight < budget.bytes_in_flight
        ):
            broken.append(
                f"bytes of loads in flight per SM of {kernel.name}: "
                f"{_said(kernel.bytes_in_flight)}, must be {_said(budget.bytes_in_flight)}"
            )
    return broken


def _said(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
