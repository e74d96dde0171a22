"""What compiling for a chip tells: reports, their JSON and their tables."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from pallas_kernels.targets.chips import Chip
from pallas_kernels.targets.gpu import GpuKernel
from pallas_kernels.targets.hlo import Collective
from pallas_kernels.targets.tpu import TpuKernel


@dataclasses.dataclass(frozen=True)
class TargetReport:
    """What a function of Pallas kernels takes on a chip, as predicted from its compiled form.

    Attributes:
        name: the caller's name for it.
        chip: figures that the predictions rest on.
        jax_version: of the JAX that compiled it.
        kernels: one per kernel.
        other_operations: what XLA runs beside the kernels (copies, transpositions, fusions), with
            how often; their time is `xla_seconds` where the compiler estimates it.
        argument_bytes, output_bytes, temporary_bytes: of the whole function, as XLA allocates.
        bytes_moved: to and from HBM, declared, or from the BlockSpecs of a TPU's kernels, or, on a
            GPU where nothing was declared, arguments once and outputs once. None: unknown.
        bytes_minimum: declared; else arguments once and outputs once.
        memory_seconds: bytes_moved / peak HBM bandwidth.
        matrix_flops: declared: operations of the matrix products, two for a multiplication and
            addition.
        issue_seconds: of all calls of all kernels; None: trip counts of a loop are unknown.
        xla_seconds: the compiler's estimate for the other operations; 0 on a GPU.
    """

    name: str
    chip: Chip
    jax_version: str
    kernels: tuple[GpuKernel, ...] | tuple[TpuKernel, ...]
    other_operations: dict[str, int]
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    bytes_moved: int | None
    bytes_minimum: int
    memory_seconds: float | None
    matrix_flops: int
    issue_seconds: float | None
    xla_seconds: float

    @property
    def matrix_seconds(self) -> float:
        """Time of the matrix products at the matrix units' peak."""
        return self.matrix_flops / self.chip.matrix_flops_per_second

    @property
    def floor_seconds(self) -> float:
        """The larger of the least bytes at peak bandwidth and of the matrix products."""
        return max(self.bytes_minimum / self.chip.hbm_bytes_per_second, self.matrix_seconds)

    @property
    def bound(self) -> str | None:
        """What limits the prediction: "memory", "matrix" or "issue"; None: a part is unknown."""
        if self.memory_seconds is None or self.issue_seconds is None:
            return None
        times = {
            "memory": self.memory_seconds,
            "issue": self.issue_seconds,
            "matrix": self.matrix_seconds,
        }
        return max(times, key=times.__getitem__)

    @property
    def seconds(self) -> float | None:
        """Predicted time: the largest of memory, matrix and issue, and XLA's own operations."""
        if self.memory_seconds is None or self.issue_seconds is None:
            return None
        return max(self.memory_seconds, self.issue_seconds, self.matrix_seconds) + self.xla_seconds

    @property
    def issue_ratio(self) -> float | None:
        """Predicted issue time over predicted memory time."""
        if self.memory_seconds is None or self.issue_seconds is None:
            return None
        return self.issue_seconds / self.memory_seconds

    @property
    def bytes_ratio(self) -> float | None:
        """Bytes moved over the least that the function must move."""
        return None if self.bytes_moved is None else self.bytes_moved / self.bytes_minimum

    @property
    def roofline_fraction(self) -> float | None:
        """The floor over the predicted time."""
        return None if self.seconds is None else self.floor_seconds / self.seconds

    def to_json(self) -> dict[str, Any]:
        """The report as nested dicts and lists of plain values, predictions included."""
        derived = ("bound", "seconds", "issue_ratio", "bytes_ratio", "roofline_fraction")
        derived += ("matrix_seconds", "floor_seconds")
        return _plain(self) | {name: getattr(self, name) for name in derived}


@dataclasses.dataclass(frozen=True)
class ProgramReport:
    """What a whole XLA program takes on one device of a chip, as its compiler estimates.

    Attributes:
        name, chip, jax_version: as in `TargetReport`.
        cycles: estimated cycles x known trip counts, kernels not included; None on a GPU.
        cycles_seconds: cycles / clock.
        bytes_accessed: by XLA's cost analysis: what each operation reads and writes, be it in HBM
            or VMEM; a loop's body counts once. None on a GPU.
        memory_seconds: bytes_accessed / peak HBM bandwidth.
        argument_bytes, output_bytes, temporary_bytes: as XLA allocates them.
        kernels: Pallas kernels with their calls: no estimate exists for them.
        collectives: of the device's program.
        unknown_loops: loops whose trip count is unknown; they count once.
    """

    name: str
    chip: Chip
    jax_version: str
    cycles: int | None
    cycles_seconds: float | None
    bytes_accessed: float | None
    memory_seconds: float | None
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    kernels: dict[str, int]
    collectives: tuple[Collective, ...]
    unknown_loops: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as nested dicts and lists of plain values."""
        return _plain(self)


def _plain(report: Any) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(report)))


def table(reports: Sequence[TargetReport]) -> str:
    """A text table of reports, one line per function and one per kernel where it has several."""
    rows = [_COLUMNS]
    for report in reports:
        several = len(report.kernels) > 1
        rows.append(_row(report, report.kernels))
        if several:
            rows.extend(_kernel_row(kernel) for kernel in report.kernels)
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


_COLUMNS = (
    "function", "chip", "registers|VMEM", "spills", "shared", "CTAs/SM", "in flight",
    "MB moved", "/minimum", "memory us", "matrix us", "issue us", "bound", "roofline", "beside",
)  # fmt: skip


def _row(report: TargetReport, kernels: Sequence[GpuKernel | TpuKernel]) -> tuple[str, ...]:
    held = [_resources(kernel) for kernel in kernels]
    return (
        report.name,
        report.chip.name,
        *(held[0] if len(held) == 1 else [""] * len(held[0])),
        _number(report.bytes_moved, 1e-6, 1),
        _number(report.bytes_ratio, 1, 3),
        _number(report.memory_seconds, 1e6, 1),
        _number(report.matrix_seconds, 1e6, 1),
        _number(report.issue_seconds, 1e6, 1),
        report.bound or "?",
        _number(report.roofline_fraction, 1, 2),
        str(len(report.other_operations)),
    )


def _kernel_row(kernel: GpuKernel | TpuKernel) -> tuple[str, ...]:
    memory = kernel.memory_seconds if isinstance(kernel, TpuKernel) else None
    moved = kernel.moved_bytes if isinstance(kernel, TpuKernel) else None
    return (
        f"  {kernel.name} x{kernel.calls}",
        "",
        *_resources(kernel),
        "" if moved is None else _number(moved, 1e-6, 1),
        "",
        "" if memory is None else _number(memory, 1e6, 1),
        "",
        _number(kernel.issue_seconds, 1e6, 1),
        "",
        "",
        "",
    )


def _resources(kernel: GpuKernel | TpuKernel) -> tuple[str, ...]:
    if isinstance(kernel, TpuKernel):
        return (_kib(kernel.vmem_bytes), str(kernel.spills), "", "", "")
    return (
        str(kernel.registers),
        str(kernel.spills),
        _kib(kernel.static_shared_bytes + kernel.dynamic_shared_bytes),
        str(kernel.ctas_per_sm),
        "?" if kernel.bytes_in_flight is None else _kib(kernel.bytes_in_flight),
    )


def _kib(size: int) -> str:
    return f"{size / 1024:.0f}K"


def _number(value: float | None, factor: float, digits: int) -> str:
    return "?" if value is None else f"{value * factor:.{digits}f}"
