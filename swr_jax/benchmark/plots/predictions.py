"""Pictures of what compilers predict for chips that are not here."""

from pathlib import Path

import matplotlib.pyplot as plt

from swr_jax.benchmark import chunkwise_tpu_baselines as chunkwise
from swr_jax.benchmark.plots.common import predicted_by, save
from swr_jax.benchmark.predictions import floor
from swr_jax.benchmark.tpu_baselines import CHIPS, FEATURES, HEADS, LENGTHS, MODES, TOKENS


def kernels(record: dict, path: Path) -> None:
    """Draw memory and issue time of every kernel over its floor, a panel for each chip."""
    reports = record["reports"]
    chips = list(dict.fromkeys(report["chip"]["name"] for report in reports))
    names = list(dict.fromkeys(report["name"] for report in reports))
    times = [r[f"{key}_seconds"] / floor(r) for r in reports for key in ("memory", "issue")]
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
        axis.set_xlim(0, 1.25 * max(times))
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
        "floor: inputs + outputs once, or products",
    )
    figure.legend(handles, labels, loc="lower center", ncols=3, fontsize=9, frameon=False)
    save(figure, f"Predicted from compiled code, {record['shape']}\n{predicted_by(record)}", path)


def tpu_baselines(record: dict, path: Path) -> None:
    """Draw time over the floor against length, a panel for each chip and mode."""
    figure, axes = plt.subplots(len(MODES), len(CHIPS), figsize=(13, 7.5), sharex=True, sharey=True)
    styles = {
        "associative_scan": ("tab:red", "D", "--"),
        "associative_scan, repeated decays": ("tab:orange", "s", "--"),
        "row-by-row kernel": ("tab:purple", "v", "-."),
        "window kernel": ("tab:blue", "o", "-"),
        "exact kernel": ("tab:green", "^", ":"),
    }
    for row, mode in enumerate(MODES):
        for column, chip in enumerate(CHIPS):
            axis = axes[row, column]
            for name, (color, marker, style) in styles.items():
                points = [
                    (p["tokens"], p["seconds"] / p["floor_seconds"])
                    for p in record["predictions"]
                    if (p["chip"], p["mode"], p["contestant"]) == (chip, mode, name)
                ]
                axis.plot(
                    *zip(*points, strict=True),
                    color=color,
                    marker=marker,
                    linestyle=style,
                    label=name,
                )
            axis.axhline(1, color="black", linewidth=0.8)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(LENGTHS, [f"{length // 1024}k" for length in LENGTHS])
            axis.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
            axis.minorticks_off()
            axis.grid(True, alpha=0.3)
            axis.set_title(f"{chip}, {mode}", fontsize=10)
            if column == 0:
                axis.set_ylabel("times the memory floor")
            if row == len(MODES) - 1:
                axis.set_xlabel("tokens T")
    axes[0, 0].legend(fontsize=8)
    title = f"Predicted by the TPU's compiler, {TOKENS} tokens, H {HEADS}, D {FEATURES}, bfloat16"
    save(figure, f"{title}\n{predicted_by(record)}", path)


def chunkwise_tpu_baselines(name: str, record: dict, path: Path) -> None:
    """Draw an operator's time against length, a panel for each chip."""
    chips, lengths = chunkwise.CHIPS, chunkwise.LENGTHS
    figure, axes = plt.subplots(1, len(chips), figsize=(13, 4.2), sharey=True)
    colors = dict(zip(chunkwise.CONTESTANTS, ("tab:red", "tab:blue"), strict=True))
    styles = dict(zip(chunkwise.MODES, (("o", "--"), ("s", "-")), strict=True))
    for axis, chip in zip(axes, chips, strict=True):
        for contestant, color in colors.items():
            for mode, (marker, style) in styles.items():
                points = [
                    (p["tokens"], p["seconds"] * 1e3)
                    for p in record["predictions"]
                    if (p["chip"], p["mode"], p["contestant"]) == (chip, mode, contestant)
                ]
                axis.plot(
                    *zip(*points, strict=True),
                    color=color,
                    marker=marker,
                    linestyle=style,
                    label=f"{contestant}, {mode}",
                )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(lengths, [f"{length // 1024}k" for length in lengths])
        axis.grid(True, which="both", alpha=0.3)
        axis.set_title(chip, fontsize=10)
        axis.set_xlabel("tokens T")
    axes[0].set_ylabel("milliseconds")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    sizes = f"{chunkwise.HEADS} heads of {chunkwise.Q_DIM}, {chunkwise.V_DIM}"
    title = f"{name}, predicted by the TPU's compiler, {chunkwise.TOKENS} tokens, {sizes}"
    save(figure, f"{title}, bfloat16\n{predicted_by(record)}", path)
