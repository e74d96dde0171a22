"""Plans models of a billion parameters and more on slices of TPUs and H100s, and compares them.

    make plan-study

Compiles the training step of every case below with the chips' own compilers on this machine's CPU,
one process of `experiments/plan.py` after the other, minutes each: a study that was cut off goes on
where it stopped, and what is there by then is written. --only=phalanx_1b,v5e:16x16 plans the cases
whose names have all of these words. Writes OUT/plan_study.json and .png, and prints tables.

Tokens per chip are the same at every length, on slices of every size: where a row is longer, chips
share it by the mesh axis `sequence`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import plan_study_report
from absl import app, flags
from plan_study_cases import Case, cases
from tqdm import tqdm

from swr_jax.benchmark.records import write_record
from swr_jax.benchmark.report import environment

_OUT = flags.DEFINE_string("out", "experiments/results", "Folder of the results.")
_RUNS = flags.DEFINE_string("runs", "runs/plan_study", "Folder of the plans, one file each.")
_ONLY = flags.DEFINE_list("only", [], "Words that names of cases must have, as MODEL,CHIP:SHAPE.")
_MINUTES = flags.DEFINE_float("minutes", float("inf"), "Start no case after so many.")

FOLDER = Path(__file__).parent


def plan(case: Case, path: Path) -> None:
    """Has a case planned by a process of its own, unless it has been."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".part.json")
    command = [
        sys.executable,
        str(FOLDER / "plan.py"),
        f"--config={FOLDER / 'configs' / case.config}.py",
        f"--topology={case.topology}",
        *(f"--config.{name}={value}" for name, value in case.options.items()),
        f"--out={whole}",
    ]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        sys.exit(f"error: {case.name}: {' '.join(command)}\n{found.stdout}\n{found.stderr}")
    whole.rename(path)


def main(argv: list[str]) -> None:
    """Plans what has not been planned, then reports all that has."""
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}: options begin with --")
    here = environment(sys.argv[1:])
    every = cases()
    paths = {
        case: Path(_RUNS.value) / f"{case.name.replace(' ', '_').replace(':', '_')}.json"
        for case in every
    }
    with tqdm([c for c in every if all(word in c.name for word in _ONLY.value)]) as bar:
        for case in bar:
            bar.set_description(case.name)
            if bar.format_dict["elapsed"] < 60 * _MINUTES.value:
                plan(case, paths[case])
    done = [json.loads(path.read_text()) for path in paths.values() if path.exists()]
    record = {
        "environment": here,
        "plans": [
            single | {"commit": found["environment"]["commit"]}
            for found in done
            for single in found["plans"]
        ],
        "missing": [case.name for case in every if not paths[case].exists()],
    }
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    write_record(record, out / "plan_study.json")
    plan_study_report.draw(record, out / "plan_study.png")
    print(plan_study_report.tables(record))


if __name__ == "__main__":
    app.run(main)
