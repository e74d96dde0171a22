"""What `recall.py` makes of its runs: accuracies by range of distances, a table, a plot."""

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# What is plotted: label and colour of each condition of `recall_study.conditions`.
_STYLES = {
    "short": ("whole, window {short}", {"color": "C0"}),
    "long": ("whole, window {long}", {"color": "C1"}),
    "window 2": ("whole, window 2: neighbours only", {"color": "C2", "linestyle": "--"}),
    "no attention": ("attention zeroed", {"color": "C3", "linestyle": ":"}),
    "no recurrence": ("recurrence zeroed, window {long}", {"color": "C4", "linestyle": "--"}),
}


def _conditions(results: dict) -> dict[str, str]:
    """Name of each plotted condition as the runs have it."""
    short, long = results["setting"]["windows"]
    return {
        "short": f"window {short}",
        "long": f"window {long}",
        "window 2": "window 2",
        "no attention": "no attention",
        "no recurrence": f"window {long}, no recurrence",
    }


def ranges(run: dict, condition: str, length: int) -> list[dict] | None:
    """Accuracies by distance of one run, None where it was not tested so."""
    test = run["tests"].get(condition, {}).get(str(length))
    return test and test["by_distance"]


def accuracy(run: dict, condition: str, length: int, low: int, high: int) -> float | None:
    """Accuracy of one run at the distances from `low` to `high`, None where it was not tested."""
    by_distance = ranges(run, condition, length)
    if by_distance is None:
        return None
    inside = [r for r in by_distance if low <= r["from"] and r["to"] <= high]
    total = sum(r["queries"] for r in inside)
    return sum(r["accuracy"] * r["queries"] for r in inside) / total


def summarise(runs: dict[str, list[dict]]) -> dict:
    """Gather the runs of every model, the number of its parameters said once."""
    return {
        name: {
            "parameters": done[0]["parameters"],
            "runs": [{k: v for k, v in run.items() if k != "parameters"} for run in done],
        }
        for name, done in runs.items()
    }


def _cell(model: dict, condition: str, length: int, low: int, high: int) -> str:
    values = [accuracy(run, condition, length, low, high) for run in model["runs"]]
    if None in values:
        return "-"
    return " ".join(f"{value:.2f}" for value in values)


def table(results: dict) -> str:
    """Write two Markdown tables: the models whole, then with one path removed.

    A cell holds the accuracy of every seed: a run that has found a way to recall answers nearly
    everything, another nearly nothing, so that a mean would describe neither.
    """
    (short, long), (length, longer) = (results["setting"][k] for k in ("windows", "test_lengths"))
    near, far = (short, long - 1), (long, length - 1)
    whole = [
        (f"tested at {window}: {low}-{high} tokens back", f"window {window}", rows, low, high)
        for window in (short, long)
        for rows, (low, high) in ((length, near), (length, far), (longer, (length, longer - 1)))
    ]
    parts = [
        (f"{label}: {low}-{high}", condition, length, low, high)
        for label, condition in (
            ("window 2", "window 2"),
            ("no attention", "no attention"),
            (f"no recurrence, window {long}", f"window {long}, no recurrence"),
        )
        for low, high in (near, far)
    ]
    tables = []
    for columns in (whole, parts):
        heads = ["model", *(column[0] for column in columns)]
        lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for name, model in results["models"].items():
            cells = [_cell(model, *column[1:]) for column in columns]
            if set(cells) != {"-"}:
                lines.append(f"| {name} | {' | '.join(cells)} |")
        tables.append("\n".join(lines) + "\n")
    return "\n".join(tables)


def _curves(results: dict, model: dict, condition: str) -> list[tuple[str, list[float]]]:
    """By range of distances: its name and the accuracies of all seeds."""
    length, longer = results["setting"]["test_lengths"]
    points = []
    for rows, least in ((length, 0), (longer, length)):
        tests = [ranges(run, condition, rows) for run in model["runs"]]
        if None in tests:
            continue
        for same in zip(*tests, strict=True):
            if same[0]["from"] >= least:
                name = f"{same[0]['from']}-{same[0]['to']}"
                points.append((name, [r["accuracy"] for r in same]))
    return points


def draw(results: dict, path: Path) -> None:
    """Plot accuracy against distance: a panel per model, a line per condition."""
    models = results["models"]
    short, long = results["setting"]["windows"]
    columns = 3
    rows = -(-len(models) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(4.2 * columns, 2.9 * rows + 0.9),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (name, model) in zip(axes.flat, models.items(), strict=False):
        for key, condition in _conditions(results).items():
            label, style = _STYLES[key]
            points = _curves(results, model, condition)
            if not points:
                continue
            names, values = [n for n, _ in points], [v for _, v in points]
            for seed in zip(*values, strict=True):
                axis.plot(names, seed, **style, linewidth=0.8, alpha=0.45)
            means = [statistics.mean(v) for v in values]
            label = label.format(short=short, long=long)
            axis.plot(names, means, marker="o", markersize=3, label=label, **style)
        axis.axhline(1 / results["setting"]["pairs"], color="0.5", linewidth=0.8)
        axis.set_title(name, fontsize=10)
        axis.set_ylim(-0.03, 1.03)
        axis.grid(alpha=0.3)
        axis.tick_params(axis="x", labelrotation=35, labelsize=8)
    for axis in axes.flat[len(models) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy")
    for axis in axes[-1]:
        axis.set_xlabel("tokens from the value to the query", fontsize=9)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=5
    )
    seeds = (
        f"{results['seeds']} seeds (thin) and their mean" if results["seeds"] > 1 else "one seed"
    )
    figure.suptitle(
        f"Recall of {results['setting']['pairs']} pairs after {results['steps']} updates, {seeds}; "
        "grey: one of the row's values, blindly",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
