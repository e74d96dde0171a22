"""Which path of a hybrid carries associative recall: SWAX's claim (arXiv 2509.24552), in small.

    python experiments/recall.py

Trains every model of `recall_study.VARIANTS` with several seeds, each run in a process on one core
of its own, and tests it at both windows, whole and with one of its paths removed. A study that was
cut off keeps its finished runs. Writes OUT/swax_recall_STEPS.json and .png, and prints a table.
"""

import json
import multiprocessing
import os
import platform
import re
import shlex
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from importlib import metadata
from pathlib import Path

from absl import app, flags
from recall_report import draw, summarise, table
from recall_study import SETTING, VARIANTS, run
from tqdm import tqdm

_OUT = flags.DEFINE_string("out", "experiments/results", "Folder of the results.")
_RUNS = flags.DEFINE_string("runs", "runs/recall", "Folder of the runs themselves.")
_STEPS = flags.DEFINE_integer("steps", 2000, "Updates of each run.", lower_bound=1)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds of each model.", lower_bound=1)
_ONLY = flags.DEFINE_string("only", "", "Regular expression for names of the models to run.")
_WORKERS = flags.DEFINE_integer("workers", 0, "Processes; 0: one for each core.")


def take_core(cores: multiprocessing.Queue) -> None:
    """Keep this process on a core of its own."""
    os.sched_setaffinity(0, {cores.get()})


def finish(path: Path, name: str, seed: int, steps: int) -> None:
    """Do one run and keep what came of it, unless it has been done already."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(run(name, seed=seed, steps=steps)))
        partial.rename(path)


def main(_: list[str]) -> None:
    """Run the study, then report it."""
    names = [name for name in VARIANTS if re.search(_ONLY.value, name)]
    context = multiprocessing.get_context("spawn")
    available, cores = sorted(os.sched_getaffinity(0)), context.Queue()
    workers = _WORKERS.value or len(available)
    for number in range(workers):
        cores.put(available[number % len(available)])
    paths: dict[str, list[Path]] = {name: [] for name in names}
    with ProcessPoolExecutor(workers, context, take_core, (cores,)) as pool:
        futures = []
        # Seed by seed, so that whatever disturbs the machine disturbs all models alike.
        for seed in range(_SEEDS.value):
            for name in names:
                slug = re.sub(r"\W+", "_", name)
                path = Path(_RUNS.value) / str(_STEPS.value) / f"{slug}_{seed}.json"
                paths[name].append(path)
                futures.append(pool.submit(finish, path, name, seed, _STEPS.value))
        for future in tqdm(futures, unit="run"):
            future.result()

    results = {
        "study": "recall",
        "command": shlex.join(["python", os.path.relpath(__file__), *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip(),
        "device": f"CPU ({platform.machine()}, one core for each run)",
        "jax": metadata.version("jax"),
        "steps": _STEPS.value,
        "seeds": _SEEDS.value,
        "setting": SETTING,
        "models": summarise(
            {n: [json.loads(p.read_text()) for p in ps] for n, ps in paths.items()}
        ),
    }
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    # Thousands of numbers: those that belong together on one line.
    text = re.sub(r"{[^{}]*}", lambda m: " ".join(m[0].split()), json.dumps(results, indent=1))
    stem = out / f"swax_recall_{_STEPS.value}"
    stem.with_suffix(".json").write_text(text + "\n")
    draw(results, stem.with_suffix(".png"))
    print(table(results))


if __name__ == "__main__":
    app.run(main)
