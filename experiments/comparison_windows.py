"""The text half of SWAX's claim in small: models, and what they know at other windows and lengths.

Windows are scaled to the models, 16 against 256 at rows of 512 (arXiv 2509.24552: 128 against 2048
at 16,384); the third schedule draws one of the two for each batch, and the long one in the last
tenth of the updates.
"""

import dataclasses
import statistics
from pathlib import Path

import matplotlib
from flax import nnx

from swr_jax.data import open_corpus
from swr_jax.train.checkpoint import load_model
from swr_jax.train.evaluation import evaluate, validation_batches
from swr_jax.train.sharding import batch_sharding, make_mesh
from swr_jax.train.state import make_blueprint
from swr_jax.train.step import make_eval_step

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHORT, LONG = 16, 256
LENGTHS = (512, 2048)  # of rows: the trained one, and four times that
_COMMON = {"model.features": 64, "eval_every": 100, "optimizer.learning_rate": 5e-3}


def _model(pattern: tuple[str, ...], *windows: int) -> dict:
    overrides = _COMMON | {"model.pattern": pattern, "model.window": max(windows, default=LONG)}
    if len(windows) > 1:
        overrides |= {
            "window_schedule.sizes": windows,
            "window_schedule.probabilities": (0.5, 0.5),
        }
    return overrides


MODELS = {
    f"SWAX, window {SHORT}": _model(("swa", "mlstm"), SHORT),
    f"SWAX, window {LONG}": _model(("swa", "mlstm"), LONG),
    f"SWAX, stochastic {SHORT} or {LONG}": _model(("swa", "mlstm"), SHORT, LONG),
    f"SWA + Gated DeltaNet, stochastic {SHORT} or {LONG}": _model(
        ("swa", "gated_delta"), SHORT, LONG
    ),
    f"SWA alone, window {LONG}": _model(("swa",), LONG),
    "mLSTM alone": _model(("mlstm",)),
}


def measure(workdirs: list[Path]) -> list[dict[str, dict[str, float]]]:
    """Return bits per byte of several runs of one model: of each, by window, by length of rows.

    All lengths are cut from the same held-out text.
    """
    _, config, _ = load_model(workdirs[0])
    mesh = make_mesh(config.mesh)
    blueprint, sharding = make_blueprint(config, mesh), batch_sharding(mesh)
    corpus = open_corpus(config.data)
    trained = config.data.sequence_length
    held_out = {}
    for length in LENGTHS:
        rows = config.data.batch_size * trained // length
        data = dataclasses.replace(config.data, sequence_length=length, batch_size=rows)
        held_out[length] = validation_batches(data, corpus, count=config.eval_batches)

    results: list[dict] = [{} for _ in workdirs]
    for window in (SHORT, LONG) if "swa" in config.model.pattern else (LONG,):
        model = dataclasses.replace(config.model, window=window)
        eval_step = make_eval_step(blueprint.of_model(model), mesh)
        for result, workdir in zip(results, workdirs, strict=True):
            params = nnx.to_pure_dict(nnx.state(load_model(workdir)[0], nnx.Param))
            result[str(window)] = {
                str(length): round(
                    evaluate(eval_step, params, batches, sharding)["bits_per_byte"], 5
                )
                for length, batches in held_out.items()
            }
    return results


def add_measurements(models: dict, workdirs: dict[str, list[Path]]) -> None:
    """Add to every run of `models` what `measure` finds."""
    for name, model in models.items():
        for run, measured in zip(model["runs"], measure(workdirs[name]), strict=True):
            run["at_windows"] = measured


def _at(model: dict, window: int, length: int) -> list[float]:
    """Bits per byte of all seeds; of a model without attention whatever the window."""
    runs = [run["at_windows"] for run in model["runs"]]
    return [run.get(str(window), run[str(LONG)])[str(length)] for run in runs]


def _show(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def table(results: dict) -> str:
    """Write bits per byte at both windows and both lengths as a Markdown table."""
    cases = [(window, length) for window in (SHORT, LONG) for length in LENGTHS]
    heads = [f"tested at {window}, rows of {length}" for window, length in cases]
    lines = [f"| model | parameters | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
    for name, model in results["models"].items():
        cells = [_show(_at(model, window, length)) for window, length in cases]
        lines.append(f"| {name} | {model['parameters']:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(results: dict, path: Path) -> None:
    """Plot bits per byte at both windows, each seed a dot, for both lengths of rows."""
    models = results["models"]
    figure, axes = plt.subplots(
        1, len(LENGTHS), figsize=(11, 0.45 * len(models) + 1.6), sharey=True, layout="constrained"
    )
    for axis, length in zip(axes, LENGTHS, strict=True):
        for window, color, shift in ((SHORT, "C0", -0.12), (LONG, "C1", 0.12)):
            for row, model in enumerate(models.values()):
                values = _at(model, window, length)
                place = [row + shift] * len(values)
                axis.plot(values, place, "o", color=color, markersize=4, alpha=0.6)
                axis.plot(statistics.mean(values), row + shift, "|", color=color, markersize=14)
            axis.plot([], [], "o", color=color, label=f"tested at window {window}")
        axis.set(xlabel="validation bits per byte", title=f"rows of {length} bytes")
        axis.set_yticks(range(len(models)), list(models))
        axis.grid(alpha=0.3)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=8)
    figure.suptitle(
        f"Text, {results['steps']} updates of 2,048 bytes in rows of 512, {results['seeds']} seeds "
        f"(dots; bars: means); {results['device']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)
