"""Compiles TPU kernels and what XLA makes of the same for TPUs that are not here, side by side.

    python experiments/tpu_baselines.py
    python experiments/tpu_baselines.py --operator=mlstm
    python experiments/tpu_baselines.py --operator=gated_delta
    python experiments/tpu_baselines.py --operator=mlstm --contestant=kernels

Needs the compilers (`make report` sets them up and runs the first three). Writes
tpu_baselines.json, mlstm_tpu_baselines.json or gated_delta_tpu_baselines.json and its .png into
--out and prints a table. With --contestant only that is compiled, and what the JSON in --out says
of the others stays, if it is of the same JAX: XLA's programs of an mLSTM take hours. What is
compared and how: the modules of these names in swr_jax/benchmark and chunkwise_tpu_baselines.py,
repeated in the JSON.
"""

import concurrent.futures
import functools
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import jax
from absl import app, flags

from swr_jax.benchmark import (
    chunkwise_tpu_baselines,
    gated_delta_tpu_baselines,
    mlstm_tpu_baselines,
    records,
    report,
    tpu_baselines,
)
from swr_jax.benchmark.plots import predictions as plots


class Baselines(NamedTuple):
    """What is compared: predictions of a chip and a contestant, their table and their picture."""

    name: str
    protocol: str
    chips: tuple[str, ...]
    contestants: tuple[str, ...]
    predict: Callable[[str, str], Iterator[dict]]
    table: Callable[[list[dict], int], str]
    draw: Callable[[dict, Path], None]


def chunkwise(module: ModuleType, title: str) -> Baselines:
    """The baselines of a matrix memory."""
    general = chunkwise_tpu_baselines
    return Baselines(
        module.__name__.rpartition(".")[2],
        f"{general.__doc__} {module.__doc__}",
        general.CHIPS,
        general.CONTESTANTS,
        functools.partial(general.predict, module.OPERATOR),
        general.table,
        functools.partial(plots.chunkwise_tpu_baselines, title),
    )


OPERATORS = {
    "recurrence": Baselines(
        "tpu_baselines",
        tpu_baselines.__doc__,
        tpu_baselines.CHIPS,
        tuple(tpu_baselines.CONTESTANTS),
        tpu_baselines.predict,
        tpu_baselines.table,
        plots.tpu_baselines,
    ),
    "mlstm": chunkwise(mlstm_tpu_baselines, "mLSTM"),
    "gated_delta": chunkwise(gated_delta_tpu_baselines, "Gated delta rule"),
}

OPERATOR = flags.DEFINE_enum("operator", "recurrence", list(OPERATORS), "What is compared.")
CONTESTANTS = flags.DEFINE_multi_string("contestant", [], "What is compiled; none given: all.")
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
    contestants = tuple(CONTESTANTS.value or baselines.contestants)
    if unknown := set(contestants) - set(baselines.contestants):
        sys.exit(f"error: --contestant: {unknown} are none of {baselines.contestants}")
    out = Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{baselines.name}.json"
    record = {
        "environment": report.environment(sys.argv[1:]),
        "protocol": " ".join(baselines.protocol.split()),
        "predictions": [],
    }
    if set(contestants) != set(baselines.contestants):
        try:
            record |= records.predictions_of_others(path, contestants, jax.__version__)
        except records.RecordError as error:
            sys.exit(f"error: --contestant: {error}")
    tasks = [(OPERATOR.value, chip, kind) for chip in baselines.chips for kind in contestants]
    with concurrent.futures.ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        for task, found in zip(tasks, pool.map(predict, *zip(*tasks, strict=True)), strict=True):
            record["predictions"] += found
            print("compiled for", *task[1:], flush=True)
    records.write_record(record, path)
    baselines.draw(record, path.with_suffix(".png"))
    print(f"\n{baselines.table(record['predictions'], SHOWN)}\n\nwrote {path} and its picture")


if __name__ == "__main__":
    app.run(main)
