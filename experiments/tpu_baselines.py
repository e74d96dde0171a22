"""Compiles TPU kernels and what XLA makes of the same for TPUs that are not here, side by side.

    python experiments/tpu_baselines.py
    python experiments/tpu_baselines.py --operator=mlstm

Needs the compilers (`make report` sets them up and runs both). Writes tpu_baselines.json or
mlstm_tpu_baselines.json and its .png into --out and prints a table. What is compared and how: the
modules of these names in swr_jax/benchmark, repeated in the JSON.
"""

import concurrent.futures
import json
import multiprocessing
import sys
from pathlib import Path

import jax
from absl import app, flags

from swr_jax.benchmark import mlstm_tpu_baselines, report, tpu_baselines
from swr_jax.benchmark.plots import predictions as plots

OPERATORS = {"recurrence": tpu_baselines, "mlstm": mlstm_tpu_baselines}

OPERATOR = flags.DEFINE_enum("operator", "recurrence", list(OPERATORS), "What is compared.")
OUT = flags.DEFINE_string("out", "experiments/results", "Folder for the results, made if missing.")
SHOWN = 8192  # tokens of the table


def predict(operator: str, chip: str, kind: str) -> list[dict]:
    """Runs in a process of its own: the compiler is set up for one kind of report only."""
    jax.config.update("jax_platforms", "cpu")
    return list(OPERATORS[operator].predict(chip, kind))


def main(argv: list[str]) -> None:
    """Compiles, writes, draws."""
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}: options begin with --")
    jax.config.update("jax_platforms", "cpu")
    baselines = OPERATORS[OPERATOR.value]
    name = baselines.__name__.rpartition(".")[2]
    record = {
        "environment": report.environment(sys.argv[1:]),
        "protocol": " ".join(baselines.__doc__.split()),
        "predictions": [],
    }
    tasks = [
        (OPERATOR.value, chip, kind) for chip in baselines.CHIPS for kind in baselines.CONTESTANTS
    ]
    with concurrent.futures.ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        for task, found in zip(tasks, pool.map(predict, *zip(*tasks, strict=True)), strict=True):
            record["predictions"] += found
            print("compiled for", *task[1:], flush=True)
    out = Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    getattr(plots, name)(record, path.with_suffix(".png"))
    print(f"\n{baselines.table(record['predictions'], SHOWN)}\n\nwrote {path} and its picture")


if __name__ == "__main__":
    app.run(main)
