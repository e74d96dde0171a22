"""What all pictures share; importing it needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: works without a display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

MODES = ("forward", "forward+backward")


def band(axis: Axes, tokens: Sequence[int], spreads: Sequence[dict], *, color: str, **line) -> None:
    """Draw medians as a line and quartiles as a band."""
    axis.plot(tokens, [s["median"] for s in spreads], color=color, markersize=4, **line)
    lower, upper = ([s[key] for s in spreads] for key in ("lower", "upper"))
    axis.fill_between(tokens, lower, upper, color=color, alpha=0.15, linewidth=0)


def log_axes(axis: Axes, tokens: Sequence[int], label: str) -> None:
    """Make both axes logarithmic, with ticks at `tokens` and plain numbers."""
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("tokens T")
    axis.set_ylabel(label)
    axis.xaxis.set_major_locator(FixedLocator(sorted(set(tokens))))
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


def legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """Draw one legend of all axes below them."""
    entries = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(
        entries.values(), entries.keys(), loc="lower center", ncols=4, fontsize=9, frameon=False
    )


def save(figure: Figure, title: str, path: Path) -> None:
    """Give the figure its title, write it, and close it."""
    figure.suptitle(title, fontsize=11)
    legend_room = 0.07 if figure.legends else 0.0
    figure.tight_layout(rect=(0, legend_room, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def measured_on(record: dict) -> str:
    """Say where a suite was run."""
    where = record["environment"]
    return (
        f"{where['device']}, {where['cores']} cores, jax {where['jax']}, "
        f"commit {where['commit']}; bands: quartiles"
    )


def predicted_by(record: dict) -> str:
    """Say what made a prediction."""
    where = record["environment"]
    return f"jax {where['jax']}, commit {where['commit']}"
