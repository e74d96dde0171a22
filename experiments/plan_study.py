"""Plans models of a billion parameters and more on slices of TPUs and H100s, and compares them.

    make plan-study

Compiles the training step of every case of plan_study_cases.py with the chips' own compilers on
this machine's CPU, one process of `experiments/plan.py` after the other, a minute or more each.
Writes OUT/plan_study.json after every one, and goes on from what is in it, the last time's or what
is committed, unless --fresh begins anew; draws OUT/plan_study.png and prints tables.
--only=phalanx_1b,v5e:16x16 plans the cases whose names have all of these words.

Tokens per chip are the same at every length, on slices of every size: where a row is longer, chips
share it by the mesh axis `sequence`.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import plan_study_report
from absl import app, flags
from plan_study_cases import Case, cases
from tqdm import tqdm

from swr_jax.benchmark.records import read_record, write_record
from swr_jax.benchmark.report import environment

_OUT = flags.DEFINE_string("out", "experiments/results", "Folder of the results.")
_ONLY = flags.DEFINE_list("only", [], "Words that names of cases must have, as MODEL,CHIP:SHAPE.")
_FRESH = flags.DEFINE_bool("fresh", False, "Plan again what is in the results.")
_MINUTES = flags.DEFINE_float("minutes", float("inf"), "Start no case after so many.")

FOLDER = Path(__file__).parent


def plan(case: Case) -> dict:
    """Has a case planned by a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        command = [
            sys.executable,
            str(FOLDER / "plan.py"),
            f"--config={FOLDER / 'configs' / case.config}.py",
            f"--topology={case.topology}",
            *(f"--config.{name}={value}" for name, value in case.options.items()),
            f"--out={path}",
        ]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode:
            sys.exit(f"error: {case.name}: {' '.join(command)}\n{found.stdout}\n{found.stderr}")
        record = json.loads(path.read_text())
    return record["plans"][0] | {"commit": record["environment"]["commit"]}


def earlier(path: Path) -> dict[Case, Mapping]:
    """Returns the plans that a file has, if there is one."""
    if not path.exists():
        return {}
    plans = read_record(path)["plans"]
    return {Case(plan["config"], plan["topology"], plan["length"]): plan for plan in plans}


def main(argv: list[str]) -> None:
    """Plans what has not been planned, and reports all that has."""
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}: options begin with --")
    here = environment(sys.argv[1:])
    every = cases()
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "plan_study.json"
    plans = {} if _FRESH.value else earlier(path)

    def write() -> dict:
        record = {
            "environment": here,
            "plans": [plans[case] for case in every if case in plans],
            "missing": [case.name for case in every if case not in plans],
        }
        write_record(record, path)
        return record

    waiting = [case for case in every if case not in plans]
    with tqdm([c for c in waiting if all(word in c.name for word in _ONLY.value)]) as bar:
        for case in bar:
            bar.set_description(case.name)
            if bar.format_dict["elapsed"] >= 60 * _MINUTES.value:
                break
            plans[case] = plan(case)
            write()
    record = write()
    plan_study_report.draw(record, path.with_suffix(".png"))
    print(plan_study_report.tables(record))


if __name__ == "__main__":
    app.run(main)
