"""Predictions for chips that are not here: as a table, as a picture.

A kernel's floor is the time in which the chip's memory, at its full bandwidth, moves the inputs
once and the outputs once. Its memory time is that of the bytes that it really moves, its issue time
what the scheduled instructions take; the larger of the two is the prediction.
"""

from collections.abc import Sequence
from pathlib import Path


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
    """Seconds in which the chip's memory moves the least that must be moved."""
    return report["bytes_minimum"] / report["chip"]["hbm_bytes_per_second"]


def spills(report: dict) -> int:
    """Bytes (GPU) or slots (TPU) spilled, of all kernels."""
    return sum(
        kernel.get("spill_slots", 0)
        + kernel.get("spill_store_bytes", 0)
        + kernel.get("spill_load_bytes", 0)
        for kernel in report["kernels"]
    )


def draw(record: dict, path: Path) -> None:
    """Draw memory and issue time of every kernel over its floor, a panel for each chip."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    reports = record["reports"]
    chips = list(dict.fromkeys(report["chip"]["name"] for report in reports))
    names = list(dict.fromkeys(report["name"] for report in reports))
    figure, axes = plt.subplots(
        1, len(chips), figsize=(4 + 3.2 * len(chips), 1.8 + 0.42 * len(names)), sharey=True
    )
    for axis, chip in zip([axes] if len(chips) == 1 else axes, chips, strict=True):
        of_chip = {report["name"]: report for report in reports if report["chip"]["name"] == chip}
        for row, name in enumerate(names):
            report = of_chip.get(name)
            if report is None:
                continue
            for offset, key, color in ((-0.2, "memory", "tab:blue"), (0.2, "issue", "tab:orange")):
                value = report[f"{key}_seconds"] / floor(report)
                axis.barh(row + offset, value, height=0.36, color=color)
                axis.text(value + 0.02, row + offset, f"{value:.2f}", va="center", fontsize=7)
        bandwidth = reports[[r["chip"]["name"] for r in reports].index(chip)]["chip"]
        axis.set_title(f"{chip}, {bandwidth['hbm_bytes_per_second'] / 1e12:.2f} TB/s")
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xlim(0, 1.9)
        axis.set_xlabel("times the floor")
        axis.grid(True, axis="x", alpha=0.3)
    first = figure.axes[0]
    first.set_yticks(range(len(names)), names, fontsize=8)
    first.invert_yaxis()
    handles = [
        plt.Rectangle((0, 0), 1, 1, color=color) for color in ("tab:blue", "tab:orange", "black")
    ]
    labels = (
        "memory: bytes moved",
        "issue: scheduled instructions",
        "floor: inputs + outputs once",
    )
    figure.legend(handles, labels, loc="lower center", ncols=3, fontsize=9, frameon=False)
    where = record["environment"]
    figure.suptitle(
        f"Predicted from compiled code, {record['shape']}\njax {where['jax']}, commit "
        f"{where['commit']}",
        fontsize=11,
    )
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
