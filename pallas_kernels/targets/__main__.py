"""Compiles our kernels for a chip and holds them to their budgets.

    python -m pallas_kernels.targets --chip=h100[,v5e,...] [--kernel=PART OF A NAME] [--json=FILE]

Prints a table, and exits 1 when a budget is broken, naming it.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import sys
from collections.abc import Sequence
from pathlib import Path

from pallas_kernels import catalogue, targets


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.targets", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--chip",
        required=True,
        type=_chips,
        help=f"one or more of {', '.join(targets.CHIPS)}, separated by commas",
    )
    parser.add_argument("--kernel", default="", help="only entries whose name contains this")
    parser.add_argument("--json", type=Path, help="also write the reports to this file")
    parser.add_argument("--dumps", type=Path, help="also keep the compilers' texts in this folder")
    options = parser.parse_args(arguments)

    tasks = [(chip, options.kernel, options.dumps) for chip in options.chip]
    if len(tasks) == 1:
        results = catalogue.check(*tasks[0])
    else:  # one process for each, since a process compiles for one kind of GPU only
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(
            1, mp_context=context, max_tasks_per_child=1
        ) as pool:
            per_chip = pool.map(catalogue.check, *zip(*tasks, strict=True))
            results = [result for checked in per_chip for result in checked]

    if not results:
        print(f"No kernel with {options.kernel!r} in its name is for {', '.join(options.chip)}.")
        return 1
    print(targets.table([report for report, _ in results]))
    for report, broken in results:
        for message in broken:
            print(f"{report.name} on {report.chip.name}: {message}", file=sys.stderr)
    if options.json is not None:
        written = [report.to_json() | {"broken_budgets": broken} for report, broken in results]
        options.json.write_text(json.dumps(written, indent=1) + "\n")
    return int(any(broken for _, broken in results))


def _chips(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in targets.CHIPS:
            raise argparse.ArgumentTypeError(f"{name!r}: must be one of {', '.join(targets.CHIPS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
