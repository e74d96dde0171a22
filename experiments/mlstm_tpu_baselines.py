"""Compiles the mLSTM's TPU kernels and its XLA form for TPUs that are not here, side by side.

    python experiments/mlstm_tpu_baselines.py

Needs the compilers (`make report` sets them up and runs this too). Writes mlstm_tpu_baselines.json
and .png into --out and prints a table. What is compared and how:
swr_jax/benchmark/mlstm_tpu_baselines.py, repeated in the JSON.
"""

import concurrent.futures
import json
import multiprocessing
import sys
from pathlib import Path

import jax
from absl import app, flags

from swr_jax.benchmark import mlstm_tpu_baselines as baselines
from swr_jax.benchmark import report
from swr_jax.benchmark.plots import predictions as plots

OUT = flags.DEFINE_string("out", "experiments/results", "Folder for the results, made if missing.")
SHOWN = 8192  # tokens of the table


def predict(chip: str, contestant: str) -> list[dict]:
    """Runs in a process of its own: the compiler is set up for one kind of report only."""
    jax.config.update("jax_platforms", "cpu")
    return list(baselines.predict(chip, contestant))


def main(argv: list[str]) -> None:
    """Compiles, writes, draws."""
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}: options begin with --")
    jax.config.update("jax_platforms", "cpu")
    record = {
        "environment": report.environment(sys.argv[1:]),
        "protocol": " ".join(baselines.__doc__.split()),
        "predictions": [],
    }
    tasks = [(chip, name) for chip in baselines.CHIPS for name in baselines.CONTESTANTS]
    with concurrent.futures.ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        for task, found in zip(tasks, pool.map(predict, *zip(*tasks, strict=True)), strict=True):
            record["predictions"] += found
            print("compiled for", *task, flush=True)
    out = Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "mlstm_tpu_baselines.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    plots.mlstm_tpu_baselines(record, path.with_suffix(".png"))
    print(f"\n{baselines.table(record['predictions'], SHOWN)}\n\nwrote {path} and its picture")


if __name__ == "__main__":
    app.run(main)
