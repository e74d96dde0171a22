"""Pictures of the suite `cpu`."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from swr_jax.benchmark.plots.common import MODES, band, legend, log_axes, measured_on, save

_LINES = {
    "sliding_window_recurrence": ("sliding_window_recurrence", "tab:blue", "-", "o"),
    "gated_sliding_window_recurrence": ("gated SWR, over gated scans", "tab:cyan", "-", "s"),
    "linear_recurrence": ("linear_recurrence (exact)", "tab:green", "-", "^"),
    "sequential_scan": ("lax.scan (exact)", "tab:orange", "--", "v"),
    "associative_scan": ("associative_scan", "tab:red", "--", "D"),
    "associative_scan_broadcast": (
        "associative_scan, decay broadcast first",
        "tab:pink",
        "--",
        "d",
    ),
    "copy": ("plain copy, u + 1 (bound)", "tab:gray", ":", "."),
    "phalanx": ("Phalanx", "tab:blue", "-", "o"),
    "sliding_window_attention": ("SlidingWindowAttention", "tab:orange", "--", "v"),
    "full_attention": ("full attention", "tab:red", "--", "D"),
}


def recurrence(record: dict, path: Path) -> None:
    """Draw speed-up over associative_scan and temporary memory against length."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 8.5), sharex=True)
    shown = _preferred_allocator(record["measurements"])
    for column, mode in enumerate(MODES):
        rows = [m for m in shown if m["mode"] == mode]
        drawn = ["sliding_window_recurrence", "gated_sliding_window_recurrence"]
        drawn += ["linear_recurrence", "sequential_scan", *(["copy"] if column == 0 else [])]
        speed, memory = axes[:, column]
        for name in drawn:
            _draw_speedup(speed, rows, name, "associative_scan")
        speed.axhline(1, color="black", linewidth=0.8)
        speed.set_title(mode)
        log_axes(speed, [m["tokens"] for m in rows], "speed-up over associative_scan (times)")
        drawn = [name for name in drawn if name != "copy"]
        for name in [*drawn, "associative_scan", "associative_scan_broadcast"]:
            _draw_memory(memory, rows, name)
        log_axes(memory, [m["tokens"] for m in rows], "temporary memory (MiB)")
    legend(figure, axes.ravel())
    title = f"Recurrences through XLA, {record['protocol']['shapes']}; higher is better above"
    save(figure, f"{title}\n{measured_on(record)}", path)


def layers(record: dict, path: Path) -> None:
    """Draw the speed-up of Phalanx over attention, and temporary memory, for every width."""
    shown = record["measurements"]
    widths = sorted({m["features"] for m in shown})
    figure, axes = plt.subplots(
        len(widths), 3, figsize=(15, 1.2 + 3.8 * len(widths)), sharex=True, squeeze=False
    )
    for row, features in enumerate(widths):
        of_width = [m for m in shown if m["features"] == features]
        speed = axes[row, 0]
        for reference in ("sliding_window_attention", "full_attention"):
            label, color, _, marker = _LINES[reference]
            for mode, style in zip(MODES, ("-", "--"), strict=True):
                rows = [m for m in of_width if m["mode"] == mode]
                band(
                    speed,
                    [m["tokens"] for m in rows],
                    [m["contestants"]["phalanx"]["speedup"][reference] for m in rows],
                    label=f"over {label}, {mode}",
                    color=color,
                    linestyle=style,
                    marker=marker,
                )
        speed.axhline(1, color="black", linewidth=0.8)
        tokens = [m["tokens"] for m in of_width]
        log_axes(speed, tokens, f"width {features}\nspeed-up of Phalanx (times)")
        for column, mode in enumerate(MODES, start=1):
            rows = [m for m in of_width if m["mode"] == mode]
            for name in ("phalanx", "sliding_window_attention", "full_attention"):
                _draw_memory(axes[row, column], rows, name)
            log_axes(axes[row, column], [m["tokens"] for m in rows], "temporary memory (MiB)")
            axes[0, column].set_title(f"temporary memory, {mode}")
    axes[0, 0].set_title("speed-up")
    axes[0, 0].legend(fontsize=8)
    axes[0, 1].legend(fontsize=8)
    title = f"Layers of equal width, {record['protocol']['shapes']}"
    save(figure, f"{title}\n{measured_on(record)}", path)


def _preferred_allocator(measurements: Sequence[dict]) -> list[dict]:
    kept = [m for m in measurements if m["allocator"] == "kept"]
    return sorted(kept or measurements, key=lambda m: m["tokens"])


def _draw_speedup(axis: Axes, rows: Sequence[dict], name: str, reference: str) -> None:
    points = [
        (m["tokens"], m["contestants"][name]["speedup"][reference])
        for m in _first_group_with(rows, name)
    ]
    label, color, style, marker = _LINES[name]
    tokens, spreads = zip(*points, strict=True)
    band(axis, tokens, spreads, label=label, color=color, linestyle=style, marker=marker)


def _draw_memory(axis: Axes, rows: Sequence[dict], name: str) -> None:
    points = [
        (m["tokens"], m["contestants"][name]["temporary_bytes"] / 2**20)
        for m in _first_group_with(rows, name)
    ]
    label, color, style, marker = _LINES[name]
    axis.plot(
        *zip(*points, strict=True),
        label=label,
        color=color,
        linestyle=style,
        marker=marker,
        markersize=4,
    )


def _first_group_with(rows: Sequence[dict], name: str) -> list[dict]:
    """Rows that have the contestant, those of the ungated group where both have it."""
    having = [m for m in rows if name in m["contestants"]]
    plain = [m for m in having if m.get("group") == "plain"]
    return plain or having


PICTURES = {"recurrence": recurrence, "layers": layers}
