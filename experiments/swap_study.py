"""Swap the windowed attention of a trained model for Phalanx, and distil only what is new.

    python experiments/swap_study.py

For every seed trains the hybrid of `configs/swa_hybrid_tiny.py`, made smaller, then the models of
`STUDENTS` for a few per cent of its steps, each by `experiments/pretrain.py` with the overrides
below. A study that was cut off goes on where it stopped. Writes OUT/swap_study.json and .png, and
prints a table.
"""

import subprocess
import sys
from pathlib import Path

import swap_report
from absl import app, flags, logging
from comparison import read_run
from configs import swa_hybrid_tiny
from tqdm import tqdm

from swr_jax.benchmark.records import write_record
from swr_jax.benchmark.report import environment
from swr_jax.train.config import TrainConfig, make_train_config
from swr_jax.train.sharding import make_mesh
from swr_jax.train.state import make_blueprint
from swr_jax.train.teacher import new_layers, new_parameters

_OUT = flags.DEFINE_string("out", "experiments/results", "Folder of the results.")
_RUNS = flags.DEFINE_string("runs", "runs/swap", "Folder of the runs themselves.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1"], "Seeds, as 0,1,2: a teacher and all students each.")
_TEACHER_STEPS = flags.DEFINE_integer("teacher_steps", 10000, "Updates of teachers.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 500, "Updates of students.", lower_bound=1)

FOLDER = Path(__file__).parent
COMMON = {
    "model.features": 64,
    "model.window": 32,
    "data.sequence_length": 128,
    "sample_tokens": 0,
}
# Rows of an update, and as many batches as make the same rows that are scored.
TEACHER_ROWS = {"data.batch_size": 4, "eval_batches": 64}
STUDENT_ROWS = {"data.batch_size": 16, "eval_batches": 16}
SWAPPED = STUDENT_ROWS | {
    "model.pattern": ("phalanx", "attention"),
    "optimizer.learning_rate": 1e-2,
    "distill.train": "all",
}
# What each student changes; all but the last get their teacher's folder.
STUDENTS = {
    "distilled": SWAPPED,
    "distilled, as few rows as the teacher": SWAPPED | TEACHER_ROWS,
    "distilled, fresh Phalanx": SWAPPED | {"distill.init": "fresh"},
    "distilled, new mixers alone": SWAPPED | {"distill.train": "new"},
    "no distillation": SWAPPED | {"distill.hidden": 0.0, "distill.logits": 0.0},
    "from scratch": SWAPPED,
}


def teacher_overrides(seed: int) -> dict:
    """Return what a teacher's run changes in the configuration `swa_hybrid_tiny`."""
    steps = _TEACHER_STEPS.value
    run = {"seed": seed, "data.seed": seed, "steps": steps}
    run |= {"eval_every": steps, "checkpoint_every": steps, "log_every": 200}
    return COMMON | TEACHER_ROWS | run


def student_overrides(name: str, seed: int) -> dict:
    """Return what a student's run changes, with its seed and its teacher's folder."""
    steps = _STEPS.value
    run = {"seed": seed, "data.seed": seed + 100, "steps": steps, "optimizer.warmup_steps": 8}
    run |= {"eval_every": max(steps // 10, 1), "checkpoint_every": steps}
    if name != "from scratch":
        run["distill.teacher"] = str(Path(_RUNS.value) / f"teacher_{seed}")
    return COMMON | run | STUDENTS[name]


def train_config(overrides: dict) -> TrainConfig:
    """Return the configuration that a run with these overrides has."""
    config = swa_hybrid_tiny.get_config()
    config.update_from_flattened_dict(overrides)
    return make_train_config(config.to_dict())


def train(overrides: dict, workdir: Path) -> None:
    """Do a run, or what is missing of it."""
    if (workdir / "done").exists():
        return
    arguments = [
        str(FOLDER / "pretrain.py"),
        f"--config={FOLDER / 'configs' / 'swa_hybrid_tiny.py'}",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in overrides.items()),
    ]
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "output.txt").open("w") as output:
        subprocess.run(
            [sys.executable, *arguments], stdout=output, stderr=subprocess.STDOUT, check=True
        )
    (workdir / "done").touch()


def trained_parameters(overrides: dict, teacher: TrainConfig) -> int:
    """Count the parameters that a student's run updates."""
    config, new = train_config(overrides), None
    if config.distill.teacher:
        new = new_parameters(config.model, new_layers(teacher.model, config.model))
    return make_blueprint(config, make_mesh(config.mesh), new=new).num_trained


def main(argv: list[str]) -> None:
    """Run the study, then report it."""
    logging.set_verbosity(logging.ERROR)
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}: options begin with --")
    seeds = [int(seed) for seed in _SEEDS.value]
    runs, here = Path(_RUNS.value), environment(sys.argv[1:])
    teachers: list[dict] = []
    students: dict[str, dict] = {name: {"runs": []} for name in STUDENTS}
    cases = [(name, seed) for seed in seeds for name in (None, *STUDENTS)]
    for name, seed in tqdm(cases, unit="run"):
        if name is None:
            train(teacher_overrides(seed), runs / f"teacher_{seed}")
            teachers.append(read_run(seed, runs / f"teacher_{seed}"))
            continue
        overrides = student_overrides(name, seed)
        workdir = runs / f"student_{list(STUDENTS).index(name)}_{seed}"
        train(overrides, workdir)
        students[name]["runs"].append(read_run(seed, workdir))
        teacher = train_config(teacher_overrides(seed))
        students[name]["trained_parameters"] = trained_parameters(overrides, teacher)
    record = {
        "environment": here,
        "teacher_steps": _TEACHER_STEPS.value,
        "steps": _STEPS.value,
        "seeds": len(seeds),
        "overrides": {name: student_overrides(name, 0) for name in STUDENTS},
        "teachers": teachers,
        "students": students,
    }
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    write_record(record, out / "swap_study.json")
    swap_report.draw(record, out / "swap_study.png")
    print(swap_report.table(record))


if __name__ == "__main__":
    app.run(main)
