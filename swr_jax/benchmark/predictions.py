"""Predictions for chips that are not here, as a table.

A kernel's floor is the time in which the chip's memory, at its full bandwidth, moves the inputs
once and the outputs once, or that of its matrix products at the matrix units' peak, if that is
more. Its memory time is that of the bytes that it really moves, its issue time what the scheduled
instructions take; the largest of the three times is the prediction.
"""

from collections.abc import Sequence


def microseconds(seconds: float) -> str:
    """A time with three digits."""
    return f"{seconds * 1e6:,.0f}"


def table(reports: Sequence[dict]) -> str:
    """Markdown: a row for each kernel on each chip, from `TargetReport.to_json`."""
    lines = [
        "| kernel | chip | floor, us | predicted, us | floor over predicted | bytes over minimum "
        "| issue over memory time | spills |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        chip = report["chip"]
        cells = (
            f"`{report['name']}`",
            chip["name"],
            microseconds(floor(report)),
            microseconds(report["seconds"]),
            f"{report['roofline_fraction']:.2f}",
            f"{report['bytes_ratio']:.2f}",
            f"{report['issue_ratio']:.2f}",
            str(spills(report)),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def floor(report: dict) -> float:
    """Seconds in which the chip moves the least that must be moved, and multiplies matrices."""
    memory = report["bytes_minimum"] / report["chip"]["hbm_bytes_per_second"]
    # Records of kernels without matrix products need not have the figure.
    return max(memory, report.get("matrix_seconds", 0.0))


def spills(report: dict) -> int:
    """Bytes (GPU) or slots (TPU) spilled, of all kernels."""
    return sum(
        kernel.get("spill_slots", 0)
        + kernel.get("spill_store_bytes", 0)
        + kernel.get("spill_load_bytes", 0)
        for kernel in report["kernels"]
    )
