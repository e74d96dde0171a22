"""Train the small models side by side and say which learns better, and faster.

    python experiments/compare.py --study=mixers       # three architectures, three seeds
    python experiments/compare.py --study=ablations    # one change to the Phalanx hybrid each
    python experiments/compare.py --study=windows      # SWAX and its windows, smaller models

Every run is `experiments/pretrain.py` with the overrides listed below, the same data, steps and
learning rate, on one core of its own. A study that was cut off goes on where it stopped. Speed is
measured afterwards: updates of all models in turn, in one process. Writes OUT/compare_STUDY.json
and .png, and prints a table.
"""

import json
import os
import platform
import queue
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib import metadata
from pathlib import Path

import comparison
import comparison_windows
from absl import app, flags
from configs import phalanx_tiny
from flax import nnx
from tqdm import tqdm

from swr_jax.nn import LanguageModel, num_parameters
from swr_jax.train.config import TrainConfig, make_train_config

_STUDY = flags.DEFINE_enum("study", "mixers", ["mixers", "ablations", "windows"], "Which runs.")
_OUT = flags.DEFINE_string("out", "experiments/results", "Folder of the results.")
_RUNS = flags.DEFINE_string("runs", "runs/compare", "Folder of the runs themselves.")
_STEPS = flags.DEFINE_integer("steps", 300, "Updates of each run.", lower_bound=1)
_SEEDS = flags.DEFINE_integer("seeds", 0, "Seeds of each model; 0: three, or one for ablations.")
_ROUNDS = flags.DEFINE_integer("rounds", 15, "Rounds in which updates are timed.", lower_bound=2)

FOLDER = Path(__file__).parent
PHALANX = {"model.pattern": ("phalanx", "attention")}
STUDIES = {
    "mixers": {
        "Transformer++": {"model.pattern": ("attention",)},
        "SWA hybrid 1:1": {"model.pattern": ("swa", "attention")},
        "Phalanx hybrid 1:1": PHALANX,
    },
    "ablations": {
        "Phalanx hybrid 1:1": PHALANX,
        "decay at most 0.8": PHALANX | {"model.phalanx.decay_max": 0.8},
        "decay fixed at 0.9": PHALANX | {"model.phalanx.fixed_decay": 0.9},
        "no pre-gate": PHALANX | {"model.phalanx.pre_gate": False},
        "no post-gate": PHALANX | {"model.phalanx.post_gate": False},
        "lookback 0": PHALANX | {"model.phalanx.lookback": 0},
        "lookback None": PHALANX | {"model.phalanx.global_heads": 8},
        "half of the heads global": PHALANX | {"model.phalanx.global_heads": 4},
        "block 32": PHALANX | {"model.phalanx.block_size": 32},
        "block 64": PHALANX | {"model.phalanx.block_size": 64},
        "Phalanx 3:1": {"model.pattern": ("phalanx", "phalanx", "phalanx", "attention")},
        "Phalanx only": {"model.pattern": ("phalanx",)},
    },
    "windows": comparison_windows.MODELS,
}


def all_overrides(overrides: dict, seed: int) -> dict:
    """Return what one run changes in the configuration `phalanx_tiny`."""
    common = {"steps": _STEPS.value, "seed": seed, "data.seed": seed, "sample_tokens": 0}
    common |= {"data.sequence_length": 512, "data.batch_size": 4}
    common |= {"eval_every": 50, "eval_batches": 32, "checkpoint_every": _STEPS.value}
    return common | overrides


def train_config(overrides: dict) -> TrainConfig:
    """Return the configuration that a run with these overrides has."""
    config = phalanx_tiny.get_config()
    config.update_from_flattened_dict(overrides)
    return make_train_config(config.to_dict())


def run(overrides: dict, workdir: Path, cores: "queue.Queue[int]") -> None:
    """Train one model on a core of its own, unless it has been trained already."""
    if (workdir / "done").exists():
        return
    arguments = [
        str(FOLDER / "pretrain.py"),
        f"--config={FOLDER / 'configs' / 'phalanx_tiny.py'}",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in overrides.items()),
    ]
    workdir.mkdir(parents=True, exist_ok=True)
    core = cores.get()
    try:
        with (workdir / "output.txt").open("w") as output:
            subprocess.run(
                ["taskset", "-c", str(core), sys.executable, *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                check=True,
            )
    finally:
        cores.put(core)
    (workdir / "done").touch()


def main(_: list[str]) -> None:
    """Run the study, then report it."""
    models = STUDIES[_STUDY.value]
    seeds = _SEEDS.value or (1 if _STUDY.value == "ablations" else 3)
    cores: queue.Queue[int] = queue.Queue()
    for core in sorted(os.sched_getaffinity(0)):
        cores.put(core)
    # Seed by seed, so that whatever disturbs the machine disturbs all models alike.
    runs, futures = [], []
    with ThreadPoolExecutor(cores.qsize()) as pool:
        for seed in range(seeds):
            for number, (name, changes) in enumerate(models.items()):
                overrides = all_overrides(changes, seed)
                workdir = Path(_RUNS.value) / f"{_STUDY.value}_{number}_{seed}"
                config = train_config(overrides)
                model = nnx.eval_shape(lambda c=config.model: LanguageModel(c, rngs=nnx.Rngs(0)))
                runs.append((name, seed, workdir, num_parameters(model)))
                futures.append(pool.submit(run, overrides, workdir, cores))
        for future in tqdm(futures, unit="run"):
            future.result()

    results = {
        "study": _STUDY.value,
        "command": shlex.join(["python", os.path.relpath(__file__), *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip(),
        "device": f"CPU ({platform.machine()}, {cores.qsize()} cores)",
        "jax": metadata.version("jax"),
        "steps": _STEPS.value,
        "seeds": seeds,
        "models": comparison.summarise(runs),
    }
    if _STUDY.value == "mixers":
        configs = {
            name: train_config(all_overrides(changes, 0)) for name, changes in models.items()
        }
        speeds = comparison.time_updates(configs, rounds=_ROUNDS.value)
        results["models"] = {name: m | speeds[name] for name, m in results["models"].items()}
    if _STUDY.value == "windows":
        workdirs = {name: [w for n, _, w, _ in runs if n == name] for name in models}
        comparison_windows.add_measurements(results["models"], workdirs)
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"compare_{_STUDY.value}"
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    reporter = comparison_windows if _STUDY.value == "windows" else comparison
    reporter.draw(results, stem.with_suffix(".png"))
    print(reporter.table(results))


if __name__ == "__main__":
    app.run(main)
