"""Pictures of what an evaluation has found; the only part of it with matplotlib."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: works without a display

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FuncFormatter

from swr_jax.eval.intervals import wilson
from swr_jax.eval.needle import VARIANTS
from swr_jax.eval.report import pooled, results


def draw(record: Mapping, stem: Path, *, beside: Mapping | None = None) -> list[Path]:
    """Draw every picture that the record has results for; returns their paths, STEM_WHAT.png.

    Args:
        record: of this evaluation.
        stem: path of the pictures without what tells them apart.
        beside: another record, drawn into the picture of perplexity too.
    """
    drawn = []
    for name, picture, has_results in (
        ("perplexity", perplexity, results(record, "perplexity")),
        ("needle", needles, results(record, "needle")),
        ("tasks", tasks, pooled(record)),
    ):
        if has_results:
            path = stem.with_name(f"{stem.name}_{name}.png")
            picture([record] if beside is None else [record, beside], path)
            drawn.append(path)
    return drawn


def _origin(record: Mapping) -> str:
    model, where = record["model"], record["environment"]
    return (
        f"{'+'.join(model['pattern'])}, {model['parameters']:,} parameters, step {model['step']:,}"
        f" (jax {where['jax']}, commit {where['commit'][:7]})"
    )


def _label(record: Mapping) -> str:
    model = record["model"]
    if "attention" in model["pattern"]:
        return "full attention"
    return f"window {model['window']:,}" if model["window"] else "/".join(model["pattern"])


def _save(figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _tokens_axis(axis, label: str) -> None:
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axis.tick_params(axis="x", labelrotation=35, labelsize=8)
    axis.set_xlabel(label)
    axis.grid(alpha=0.3)


def perplexity(records: list[Mapping], path: Path) -> None:
    """Draw bits per byte against position, a line for each context, where there is an interval."""
    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    for record, colours in zip(records, ("viridis", "autumn"), strict=False):
        found = sorted((int(length), r) for (length,), r in results(record, "perplexity").items())
        for number, (length, result) in enumerate(found):
            ranges = [r for r in result["ranges"] if r["interval"] is not None]
            if not ranges:
                continue  # too little text for an interval says nothing
            middle = [(r["from"] * r["to"]) ** 0.5 for r in ranges]
            colour = plt.get_cmap(colours)(0.85 * number / max(len(found) - 1, 1))
            label = f"{length:,}"
            if len(records) > 1:
                label += f", {_label(record)}"
            values = [r["bits_per_byte"] for r in ranges]
            axis.plot(middle, values, "o-", markersize=3, color=colour, label=label)
            ends = zip(*(r["interval"] for r in ranges), strict=True)
            axis.fill_between(middle, *ends, color=colour, alpha=0.15, linewidth=0)
    trained = records[0]["model"]["trained_length"]
    axis.axvline(trained, color="0.4", linestyle="--", linewidth=0.9)
    axis.annotate(
        f"rows of training: {trained:,}",
        (trained, 0.99),
        xycoords=("data", "axes fraction"),
        xytext=(4, -4),
        textcoords="offset points",
        va="top",
        fontsize=8,
        color="0.4",
    )
    _tokens_axis(axis, "position: tokens seen before the one that is named")
    axis.set_ylabel("bits per byte")
    if axis.lines[:-1]:  # besides the length of training
        axis.legend(title="context, tokens", fontsize=8)
    axis.set_title(f"{_origin(records[0])}; bands: 95 %, bootstrap", fontsize=9)
    _save(figure, path)


def needle_grid(record: Mapping, variant: str) -> tuple[list[int], list[int], np.ndarray]:
    """Share of references found, by depth and length.

    A reference counts at the depth where its needle stands, the nearest of those asked for.

    Returns:
        lengths, depths, and shares [depths, lengths], NaN where nothing was asked.
    """
    found = {
        int(length): result
        for (name, length), result in results(record, "needle").items()
        if name == variant
    }
    lengths = sorted(found)
    depths = sorted({depth for result in found.values() for depth in result["grid"]})
    right, asked = np.zeros((2, len(depths), len(lengths)))
    for column, length in enumerate(lengths):
        for hits, places in zip(found[length]["hits"], found[length]["depths"], strict=True):
            for hit, place in zip(hits, places, strict=True):
                row = int(np.argmin(np.abs(np.array(depths) - place)))
                right[row, column] += hit
                asked[row, column] += 1
    shares = np.divide(right, asked, out=np.full_like(right, np.nan), where=asked > 0)
    return lengths, depths, shares


def needles(records: list[Mapping], path: Path) -> None:
    """Draw a heat map of the first record for each variant of RULER's needles."""
    record = records[0]
    names = [n for n in VARIANTS if any(key[0] == n for key in results(record, "needle"))]
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3 * columns + 1, 2.7 * rows + 0.8), squeeze=False,
        layout="constrained", sharey=True,
    )  # fmt: skip
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        lengths, depths, shares = needle_grid(record, name)
        image = axis.imshow(shares, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        for (row, column), share in np.ndenumerate(shares):
            if not np.isnan(share):
                colour = "white" if share < 0.6 else "black"
                place = {"ha": "center", "va": "center", "fontsize": 7}
                axis.text(column, row, f"{share:.2f}", color=colour, **place)
        axis.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], rotation=35, fontsize=8)
        axis.set_yticks(range(len(depths)), [str(d) for d in depths], fontsize=8)
        axis.set_title(name, fontsize=10)
    for axis in axes[:, 0]:
        axis.set_ylabel("depth of the needle, %")
    figure.supxlabel("context, tokens", fontsize=10)
    figure.colorbar(image, ax=axes, label="share of references found", shrink=0.8)
    figure.suptitle(f"RULER's needles: {_origin(record)}", fontsize=10)
    _save(figure, path)


def tasks(records: list[Mapping], path: Path) -> None:
    """Draw shares of right answers of the first record against length, with Wilson intervals."""
    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    found = pooled(records[0])
    for number, (name, by_length) in enumerate(found.items()):
        lengths = sorted(by_length)
        shares = [by_length[n][0] / by_length[n][1] for n in lengths]
        ends = np.array([wilson(*by_length[n]) for n in lengths])
        # Neighbouring tasks side by side: bars that lie on each other cannot be told apart.
        x = np.array(lengths) * 2 ** (0.04 * (number - (len(found) - 1) / 2))
        axis.errorbar(
            x, shares, np.abs(ends.T - shares), fmt=".-", capsize=2, linewidth=0.8,
            color=plt.get_cmap("tab20")(number % 20), label=name,
        )  # fmt: skip
    axis.set_ylim(-0.03, 1.03)
    axis.set_ylabel("share of right answers")
    _tokens_axis(axis, "context, tokens")
    figure.legend(fontsize=8, loc="outside right upper")
    axis.set_title(f"{_origin(records[0])}; bars: 95 %, Wilson", fontsize=9)
    _save(figure, path)
