"""What the record of a section says, as text."""

import json
from collections.abc import Mapping
from pathlib import Path

from swr_jax.benchmark import report
from swr_jax.benchmark.device import report as device_report
from swr_jax.benchmark.device import tuning

PREDICTED = ("recurrence", "mlstm", "gated_delta")  # sections
RESULTS = Path(__file__).parents[2] / "experiments" / "results"


def describe(measurement: Mapping) -> str:
    """Name one measurement in a line, with its times."""
    name = measurement.get("case")
    if name is None:
        name = ", ".join(str(measurement[key]) for key in ("tokens", "mode", "allocator"))
    times = {
        contestant: found["milliseconds"]["median"]
        for contestant, found in measurement.get("contestants", {}).items()
    }
    first = next(iter(times.items()), None)
    fault = f": RED, {measurement['fault']}" if measurement.get("fault") else ""
    return name + (f": {first[0]} {first[1]:.3f} ms" if first else "") + fault


def text(name: str, section, record: Mapping) -> str:
    """Return tables of measurements, targets, predictions; and what was left out.

    Args:
        name: of the section.
        section: a `suites.Section`.
        record: what it has measured.
    """
    rows = record["measurements"]
    timed = [m for m in rows if m.get("contestants")]
    parts = []
    if name == "check":
        parts.append(report.check_table(rows))
    elif name == "speed":
        parts.append(report.rates_table(timed))
    elif name == "tuning":
        parts.append(_tuning(rows))
        if pasted := tuning.table(record):
            parts.append(f"To paste as the new defaults:\n{pasted}")
    elif timed:
        parts.append(report.table(timed, section.references))
    if record["targets"]:
        parts.append(report.targets_table(record["targets"]))
    if record["suite"] == "device" and name in PREDICTED and (predicted := _predicted(record)):
        parts.append(predicted)
    parts += [f"left out: {item['case']}: {item['left_out']}" for item in record["left_out"]]
    for m in rows:
        for contestant, reason in (m.get("left_out") or {}).items():
            parts.append(f"left out: {m['case']}: {contestant}: {reason}")
    return "\n\n".join(parts)


def _tuning(rows) -> str:
    """One line for each step: what it tried, and what stayed."""
    lines = [("step", "tried", "best", "x default", "refused")]
    for m in rows:
        speedups = {
            name: contestant["speedup"]["default"]["median"]
            for name, contestant in m["contestants"].items()
            if "default" in contestant["speedup"]
        }
        best = next((n for n, config in m["configs"].items() if config == m["best"]), "-")
        lines.append(
            (
                m["case"],
                str(len(m["contestants"])),
                best,
                f"{speedups[best]:.3f}" if best in speedups else "-",
                str(len(m["left_out"])),
            )
        )
    return report.align(lines) if rows else ""


def _predicted(record: Mapping) -> str | None:
    chip = device_report.chip_of(record)
    if chip is None:
        return None
    kernels, baselines = (
        json.loads((RESULTS / f"{name}.json").read_text())
        for name in ("kernels_gpu", "tpu_baselines")
    )
    predicted = device_report.predictions(chip, kernels, baselines)
    groups = {m["group"] for m in record["measurements"]}
    predicted = [row for row in predicted if row["group"] in groups]
    rows = list(device_report.compare(predicted, record["measurements"]))
    return device_report.comparison_table(rows) if rows else None
