"""Pictures of the suite `device`; rows without contestants, left out, are not drawn."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from swr_jax.benchmark.plots.common import MODES, band, legend, log_axes, measured_on, save

_STYLES = (
    ("tab:blue", "-", "o"),
    ("tab:green", "-", "^"),
    ("tab:cyan", "--", "s"),
    ("tab:olive", "--", "p"),
    ("tab:red", "--", "D"),
    ("tab:pink", "--", "d"),
    ("tab:orange", ":", "v"),
    ("tab:gray", ":", "."),
)


def recurrence(record: dict, path: Path) -> None:
    """Draw share of copy bandwidth and speed-up over associative_scan, for every group."""
    groups = list(dict.fromkeys(m["group"] for m in record["measurements"]))
    figure, axes = plt.subplots(
        2 * len(groups), 2, figsize=(12, 1 + 7 * len(groups)), squeeze=False
    )
    for row, group in enumerate(groups):
        for column, mode in enumerate(MODES):
            rows = _like(record, group=group, mode=mode)
            share, speed = axes[2 * row, column], axes[2 * row + 1, column]
            _lines(share, rows, lambda c: c.get("copy_fraction"))
            _lines(speed, rows, lambda c: c["speedup"].get("associative_scan"))
            for axis in (share, speed):
                axis.axhline(1, color="black", linewidth=0.8)
            tokens = [m["tokens"] for m in rows]
            log_axes(share, tokens, "share of copy bandwidth")
            log_axes(speed, tokens, "speed-up over associative_scan (times)")
            share.set_title(f"{group}, {mode}")
            share.legend(fontsize=7)
    _finish(figure, record, "Recurrences", path)


def layers(record: dict, path: Path) -> None:
    """Draw time of every layer over that of Phalanx, for every width."""
    widths = sorted({m["features"] for m in record["measurements"] if "features" in m})
    figure, axes = plt.subplots(
        len(widths), 2, figsize=(12, 1.5 + 3.6 * len(widths)), squeeze=False
    )
    for row, features in enumerate(widths):
        for column, mode in enumerate(MODES):
            rows = _like(record, features=features, mode=mode)
            axis = axes[row, column]
            _lines(axis, rows, lambda c: c["speedup"].get("full_attention"))
            log_axes(axis, [m["tokens"] for m in rows], "speed-up over full attention")
            axis.set_title(f"width {features}, {mode}")
    legend(figure, axes.ravel())
    _finish(figure, record, "Layers of equal width", path)


def training(record: dict, path: Path) -> None:
    """Draw the speed-up over Transformer++ for all sizes and models."""
    figure, axis = plt.subplots(figsize=(7, 4.5))
    found: dict[tuple[str, str], dict[int, dict]] = {}
    for m in record["measurements"]:
        for name, contestant in m["contestants"].items():
            if name != "transformer++":
                spread = contestant["speedup"]["transformer++"]
                found.setdefault((m["model"], name), {})[m["tokens"]] = spread
    for (model, name), (color, style, marker) in zip(sorted(found), _STYLES, strict=False):
        spreads = dict(sorted(found[model, name].items()))
        line = {"color": color, "linestyle": style, "marker": marker}
        band(axis, list(spreads), list(spreads.values()), label=f"{model} {name}", **line)
    log_axes(axis, [m["tokens"] for m in record["measurements"]], "speed-up (times)")
    axis.axhline(1, color="black", linewidth=0.8)
    axis.legend(fontsize=8)
    _finish(figure, record, "Training updates, speed over Transformer++'s", path)


def mlstm(record: dict, path: Path) -> None:
    """Draw speed-up over full attention by length."""
    _speed_up(record, "full_attention", "full attention", "mLSTM against attention", path)


def gated_delta(record: dict, path: Path) -> None:
    """Draw speed-up over XLA's form by length."""
    _speed_up(record, "gated_delta_rule by XLA", "XLA's form", "Gated delta rule", path)


PICTURES = {
    "recurrence": recurrence,
    "mlstm": mlstm,
    "gated_delta": gated_delta,
    "layers": layers,
    "training": training,
}


def _speed_up(record: dict, reference: str, called: str, title: str, path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(12, 5.1), squeeze=False)
    for axis, mode in zip(axes[0], MODES, strict=True):
        rows = _like(record, mode=mode)
        _lines(axis, rows, lambda c: c["speedup"].get(reference))
        log_axes(axis, [m["tokens"] for m in rows], f"speed-up over {called}")
        axis.set_title(mode)
    legend(figure, axes.ravel())
    _finish(figure, record, title, path)


def _like(record: dict, **same: object) -> list[dict]:
    rows = record["measurements"]
    rows = [m for m in rows if all(m.get(key) == value for key, value in same.items())]
    return sorted(rows, key=lambda m: m["tokens"])


def _lines(axis: Axes, rows: Sequence[dict], value) -> None:
    """Draw one line for each contestant that has the value anywhere."""
    names = dict.fromkeys(name for m in rows for name in m["contestants"])
    for name, (color, style, marker) in zip(names, _STYLES, strict=False):
        points = list(_points(rows, name, value))
        if points:
            tokens, spreads = zip(*points, strict=True)
            line = {"color": color, "linestyle": style, "marker": marker}
            band(axis, tokens, spreads, label=name, **line)


def _points(rows: Sequence[dict], name: str, value) -> Iterator[tuple[int, dict]]:
    for m in rows:
        spread = value(m["contestants"][name]) if name in m["contestants"] else None
        if spread is not None:
            yield m["tokens"], spread


def _finish(figure, record: dict, title: str, path: Path) -> None:
    shapes = record["protocol"]["shapes"]
    save(figure, f"{title}, {shapes}\n{measured_on(record)}", path)
