"""What `compare.py` makes of its runs' metrics: numbers, a table, a plot."""

import statistics
from pathlib import Path

import matplotlib

from swr_jax.train.metrics import read_metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def read_run(seed: int, workdir: Path, tokens_per_step: int) -> dict:
    """Read one run's metrics: bits per byte on held-out text, and how fast it trained."""
    lines = read_metrics(workdir)
    held_out = [line for line in lines if line["split"] == "validation"]
    speed = statistics.median(x["tokens_per_second"] for x in lines if "tokens_per_second" in x)
    return {
        "seed": seed,
        "step": [x["step"] for x in held_out],
        "bits_per_byte": [round(x["bits_per_byte"], 5) for x in held_out],
        "unigram_bits_per_byte": round(held_out[-1]["unigram_bits_per_byte"], 5),
        "tokens_per_second": round(speed, 1),
        "seconds_per_step": round(tokens_per_step / speed, 5),
    }


def summarise(runs: list[tuple[str, int, Path, int, int]]) -> dict:
    """Gather (name, seed, folder, parameters, tokens per step) of every run by model.

    Speeds are given relative to the first model's run with the same seed.
    """
    models: dict[str, dict] = {}
    for name, seed, workdir, parameters, tokens in runs:
        model = models.setdefault(name, {"parameters": parameters, "runs": []})
        model["runs"].append(read_run(seed, workdir, tokens))
    baseline = [run["tokens_per_second"] for run in next(iter(models.values()))["runs"]]
    for model in models.values():
        final = [run["bits_per_byte"][-1] for run in model["runs"]]
        ratios = [
            run["tokens_per_second"] / other
            for run, other in zip(model["runs"], baseline, strict=True)
        ]
        model["bits_per_byte"] = round(statistics.mean(final), 4)
        model["bits_per_byte_sd"] = round(statistics.stdev(final), 4) if len(final) > 1 else None
        model["relative_speed"] = round(statistics.median(ratios), 3)
    return models


def table(results: dict) -> str:
    """Write the results as a Markdown table."""
    first = next(iter(results["models"]))
    lines = [
        f"| model | parameters | validation bits per byte | tokens/s over {first} |",
        "|---|---|---|---|",
    ]
    for name, model in results["models"].items():
        deviation = model["bits_per_byte_sd"]
        spread = "" if deviation is None else f" ± {deviation:.4f}"
        lines.append(
            f"| {name} | {model['parameters']:,} | {model['bits_per_byte']:.4f}{spread} "
            f"| {model['relative_speed']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def draw(results: dict, path: Path) -> None:
    """Plot bits per byte against steps and against wall time, the mean and range over seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.4), sharey=True, layout="constrained")
    many = len(results["models"]) > 4
    for number, (name, model) in enumerate(results["models"].items()):
        runs = model["runs"]
        steps = runs[0]["step"]
        curves = list(zip(*(run["bits_per_byte"] for run in runs), strict=True))
        mean = [statistics.mean(values) for values in curves]
        seconds = statistics.median(run["seconds_per_step"] for run in runs)
        style = {"color": plt.cm.tab20(number) if many else f"C{number}", "linewidth": 1.4}
        style["linestyle"] = "--" if many and number == 0 else "-"
        for axis, x in zip(axes, (steps, [step * seconds for step in steps]), strict=True):
            axis.plot(x, mean, label=name, **style)
            if len(runs) > 1:
                low, high = [min(v) for v in curves], [max(v) for v in curves]
                axis.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)
    last = [
        value for m in results["models"].values() for r in m["runs"] for value in r["bits_per_byte"]
    ]
    axes[0].set(xlabel="updates", ylabel="validation bits per byte")
    axes[0].set_ylim(min(last) - 0.03, sorted(last)[int(0.85 * len(last))])
    axes[1].set(xlabel="seconds of training on one core")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8)
    seeds = f"mean and range of {results['seeds']} seeds" if results["seeds"] > 1 else "one seed"
    figure.suptitle(
        f"Equal width and depth, equal steps, {seeds}; {results['device']}", fontsize=10
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)
