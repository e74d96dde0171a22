"""What `compare.py` makes of its runs' metrics: numbers, a table, a plot."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import matplotlib

from swr_jax.data import make_dataset
from swr_jax.train.config import TrainConfig
from swr_jax.train.metrics import read_metrics
from swr_jax.train.sharding import batch_sharding, make_mesh, put_batch
from swr_jax.train.state import init_state, make_blueprint
from swr_jax.train.step import make_train_step

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def read_run(seed: int, workdir: Path) -> dict:
    """Read one run's metrics: bits per byte on held-out text."""
    held_out = [line for line in read_metrics(workdir) if line["split"] == "validation"]
    return {
        "seed": seed,
        "step": [x["step"] for x in held_out],
        "bits_per_byte": [round(x["bits_per_byte"], 5) for x in held_out],
        "unigram_bits_per_byte": round(held_out[-1]["unigram_bits_per_byte"], 5),
    }


def summarise(runs: list[tuple[str, int, Path, int]]) -> dict:
    """Gather (name, seed, folder, parameters) of every run by model."""
    models: dict[str, dict] = {}
    for name, seed, workdir, parameters in runs:
        model = models.setdefault(name, {"parameters": parameters, "runs": []})
        model["runs"].append(read_run(seed, workdir))
    for model in models.values():
        final = [run["bits_per_byte"][-1] for run in model["runs"]]
        model["bits_per_byte"] = round(statistics.mean(final), 4)
        model["bits_per_byte_sd"] = round(statistics.stdev(final), 4) if len(final) > 1 else None
    return models


def _updates(config: TrainConfig, count: int) -> Callable[[], None]:
    """Return a function that does `count` updates, compiled and warm."""
    mesh = make_mesh(config.mesh)
    blueprint = make_blueprint(config, mesh)
    step = make_train_step(blueprint, mesh)
    batch = put_batch(next(iter(make_dataset(config.data))), batch_sharding(mesh))
    state = init_state(config, blueprint)

    def run() -> None:
        nonlocal state
        for _ in range(count):
            state, _ = step(state, batch)
        jax.block_until_ready(state)

    run()
    return run


def time_updates(configs: dict[str, TrainConfig], *, rounds: int, count: int = 3) -> dict:
    """Time one update of every model in turn, round after round, in this process.

    Returns:
        For each model: the median seconds of an update, and the median and quartiles over rounds
        of its speed relative to the first model's in the same round.
    """
    contestants = {name: _updates(config, count) for name, config in configs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            began = time.perf_counter()
            run()
            seconds[name].append((time.perf_counter() - began) / count)
    first = next(iter(seconds.values()))
    speeds = {}
    for name, times in seconds.items():
        ratios = [other / mine for other, mine in zip(first, times, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        speeds[name] = {
            "seconds_per_step": round(statistics.median(times), 4),
            "relative_speed": round(middle, 3),
            "relative_speed_quartiles": [round(low, 3), round(high, 3)],
        }
    return speeds


def table(results: dict) -> str:
    """Write the results as a Markdown table."""
    models = results["models"]
    timed = "relative_speed" in next(iter(models.values()))
    columns = ["model", "parameters", "validation bits per byte"]
    if timed:
        columns.append(f"training speed over {next(iter(models))}")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, model in models.items():
        deviation = model["bits_per_byte_sd"]
        spread = "" if deviation is None else f" ± {deviation:.4f}"
        line = f"| {name} | {model['parameters']:,} | {model['bits_per_byte']:.4f}{spread} |"
        if timed:
            low, high = model["relative_speed_quartiles"]
            line += f" {model['relative_speed']:.2f} ({low:.2f} to {high:.2f}) |"
        lines.append(line)
    return "\n".join(lines) + "\n"


def draw(results: dict, path: Path) -> None:
    """Plot bits per byte against steps and, where it was measured, against wall time."""
    models = results["models"]
    timed = "seconds_per_step" in next(iter(models.values()))
    many = len(models) > 4
    figure, axes = plt.subplots(
        1, 1 + timed, figsize=(11.5 if timed else 8.5, 4.4), sharey=True, layout="constrained"
    )
    axes = list(axes) if timed else [axes]
    for number, (name, model) in enumerate(models.items()):
        runs = model["runs"]
        steps = runs[0]["step"]
        curves = list(zip(*(run["bits_per_byte"] for run in runs), strict=True))
        times = [[step * model["seconds_per_step"] for step in steps]] if timed else []
        style = {"color": plt.cm.tab20(number) if many else f"C{number}", "linewidth": 1.4}
        style["linestyle"] = "--" if many and number == 0 else "-"
        for axis, x in zip(axes, [steps, *times], strict=True):
            axis.plot(x, [statistics.mean(v) for v in curves], label=name, **style)
            if len(runs) > 1:
                low, high = [min(v) for v in curves], [max(v) for v in curves]
                axis.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)
    values = sorted(v for m in models.values() for r in m["runs"] for v in r["bits_per_byte"])
    axes[0].set(xlabel="updates", ylabel="validation bits per byte")
    axes[0].set_ylim(values[0] - 0.03, values[int(0.85 * len(values))])
    if timed:
        axes[1].set(xlabel="seconds of updates")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    seeds = f"mean and range of {results['seeds']} seeds" if results["seeds"] > 1 else "one seed"
    figure.suptitle(f"Equal width, depth and steps, {seeds}; {results['device']}", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)
