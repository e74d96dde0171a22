"""Compiles the TPU kernels and `associative_scan` for TPUs that are not here, side by side.

    python experiments/tpu_baselines.py

Needs the compilers (`make report` sets them up and runs this too). Writes tpu_baselines.json and
.png into --out and prints a table. What is compared and how: swr_jax/benchmark/tpu_baselines.py,
repeated in the JSON.
"""

import concurrent.futures
import json
import multiprocessing
import sys
from pathlib import Path

import jax
from absl import app, flags

from swr_jax.benchmark import report, tpu_baselines
from swr_jax.benchmark.plots import predictions as plots

OUT = flags.DEFINE_string("out", "experiments/results", "Folder for the results, made if missing.")
SHOWN = 8192  # tokens of the table


def predict(chip: str, kind: str) -> list[dict]:
    """Runs in a process of its own: the compiler is set up for one kind of report only."""
    jax.config.update("jax_platforms", "cpu")
    return list(tpu_baselines.predict(chip, kind))


def main(argv: list[str]) -> None:
    """Compiles, writes, draws."""
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}: options begin with --")
    jax.config.update("jax_platforms", "cpu")
    record = {
        "environment": report.environment(sys.argv[1:]),
        "protocol": " ".join(tpu_baselines.__doc__.split()),
        "predictions": [],
    }
    tasks = [(chip, kind) for chip in tpu_baselines.CHIPS for kind in ("programs", "kernels")]
    with concurrent.futures.ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        for task, found in zip(tasks, pool.map(predict, *zip(*tasks, strict=True)), strict=True):
            record["predictions"] += found
            print("compiled for", *task, flush=True)
    out = Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "tpu_baselines.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    plots.tpu_baselines(record, path.with_suffix(".png"))
    print(f"\n{tpu_baselines.table(record['predictions'], SHOWN)}\n\nwrote {path} and its picture")


if __name__ == "__main__":
    app.run(main)
