"""Pictures of the measurements; the only part that needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: works without a display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

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
MODES = ("forward", "forward+backward")


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
        _log_axes(speed, rows, "speed-up over associative_scan (times)")
        drawn = [name for name in drawn if name != "copy"]
        for name in [*drawn, "associative_scan", "associative_scan_broadcast"]:
            _draw_memory(memory, rows, name)
        _log_axes(memory, rows, "temporary memory (MiB)")
    _legend(figure, axes.ravel())
    sizes = record["protocol"]["shapes"]
    _finish(figure, record, f"Recurrences through XLA, {sizes}; higher is better above", path)


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
                _band(
                    speed,
                    [m["tokens"] for m in rows],
                    [m["contestants"]["phalanx"]["speedup"][reference] for m in rows],
                    label=f"over {label}, {mode}",
                    color=color,
                    linestyle=style,
                    marker=marker,
                )
        speed.axhline(1, color="black", linewidth=0.8)
        _log_axes(speed, of_width, f"width {features}\nspeed-up of Phalanx (times)")
        for column, mode in enumerate(MODES, start=1):
            rows = [m for m in of_width if m["mode"] == mode]
            for name in ("phalanx", "sliding_window_attention", "full_attention"):
                _draw_memory(axes[row, column], rows, name)
            _log_axes(axes[row, column], rows, "temporary memory (MiB)")
            axes[0, column].set_title(f"temporary memory, {mode}")
    axes[0, 0].set_title("speed-up")
    axes[0, 0].legend(fontsize=8)
    axes[0, 1].legend(fontsize=8)
    _finish(figure, record, f"Layers of equal width, {record['protocol']['shapes']}", path)


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
    _band(axis, tokens, spreads, label=label, color=color, linestyle=style, marker=marker)


def _band(axis: Axes, tokens, spreads, *, color: str, **line) -> None:
    axis.plot(tokens, [s["median"] for s in spreads], color=color, markersize=4, **line)
    lower, upper = ([s[key] for s in spreads] for key in ("lower", "upper"))
    axis.fill_between(tokens, lower, upper, color=color, alpha=0.15, linewidth=0)


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


def _log_axes(axis: Axes, rows: Sequence[dict], label: str) -> None:
    tokens = sorted({m["tokens"] for m in rows})
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("tokens T")
    axis.set_ylabel(label)
    axis.xaxis.set_major_locator(FixedLocator(tokens))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axis.yaxis.set_minor_formatter(FuncFormatter(_minor_label))
    axis.tick_params(axis="y", which="minor", labelsize=7)
    axis.tick_params(labelbottom=True)
    axis.grid(True, which="both", alpha=0.3)


def _minor_label(y: float, _) -> str:
    leading = f"{y:.0e}"[0]
    return f"{y:g}" if leading in "235" else ""


def _legend(figure, axes) -> None:
    entries = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(
        entries.values(), entries.keys(), loc="lower center", ncols=4, fontsize=9, frameon=False
    )


def _finish(figure, record: dict, title: str, path: Path) -> None:
    where = record["environment"]
    figure.suptitle(
        f"{title}\n{where['device']}, {where['cores']} cores, jax {where['jax']}, "
        f"commit {where['commit']}; bands: quartiles",
        fontsize=11,
    )
    legend_room = 0.07 if figure.legends else 0.0
    figure.tight_layout(rect=(0, legend_room, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
