"""Checks the project's operators and layers against float64, then times them side by side.

    python experiments/benchmark.py --suite=cpu

Each section writes SUITE_SECTION.json and .png into --out, the JSON after every measurement, and
prints a table. Nothing is timed while a check is red. The picture needs matplotlib; without it the
script says so and leaves the picture out. How time and memory are measured is described in
swr_jax/benchmark/timing.py and repeated in the JSON. The cpu suite takes about ten minutes; run it
on an idle machine.
"""

import importlib.util
import json
import sys
from pathlib import Path

import jax
from absl import app, flags

from swr_jax.benchmark import report
from swr_jax.benchmark.oracle import OracleError
from swr_jax.benchmark.suites import SUITES, Section

SUITE = flags.DEFINE_enum("suite", "cpu", list(SUITES), "What to measure.")
OUT = flags.DEFINE_string("out", "experiments/results", "Folder for the results, made if missing.")
SECTIONS = flags.DEFINE_list("sections", [], "Sections of the suite; all of them if not given.")
TINY = flags.DEFINE_bool("tiny", False, "Small sizes, to see whether everything runs.")

BUSY = 0.5  # cores in use by others from which on a warning is printed


def main(argv: list[str]) -> None:
    """Parses, measures, reports."""
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}: options begin with --")
    suite = SUITES[SUITE.value]
    unknown = [name for name in SECTIONS.value if name not in suite]
    if unknown:
        sys.exit(f"error: --sections={','.join(unknown)}: must be of {', '.join(suite)}")
    if SUITE.value == "cpu":
        jax.config.update("jax_platforms", "cpu")
    folder = Path(OUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    environment = report.environment(sys.argv[1:])
    if environment["load_average"] > BUSY:
        print(f"warning: the machine is busy (load average {environment['load_average']})")
    for name, section in suite.items():  # the suite's order: the allocator is set up along the way
        if SECTIONS.value and name not in SECTIONS.value:
            continue
        try:
            measure(name, section, environment, folder / f"{SUITE.value}_{name}.json")
        except OracleError as error:
            sys.exit(f"error: {error}")


def measure(name: str, section: Section, environment: dict, path: Path) -> None:
    """Runs one section, writing what is known after each measurement."""
    sizes = section.tiny if TINY.value else section.full
    print(f"{name}: compiling and checking against float64 (minutes)", flush=True)
    record = {
        "suite": SUITE.value,
        "section": name,
        "tiny": TINY.value,
        "environment": environment,
        "protocol": section.protocol,
        "measurements": [],
        "targets": [],
    }
    others = report.OtherProcesses()
    for measurement in section.run(sizes):
        measurement["cores_used_by_others"] = others.cores()
        record["measurements"].append(measurement)
        write(record, path)
        print("  timed", *(measurement[key] for key in ("tokens", "mode", "allocator")), flush=True)
    if section.targets:
        record["targets"] = section.targets(record["measurements"], sizes)
    write(record, path)
    print(f"\n{report.table(record['measurements'], section.references)}\n")
    if section.targets:
        print(f"{report.targets_table(record['targets'])}\n")
    busy = [m["cores_used_by_others"] or 0 for m in record["measurements"]]
    if max(busy) > BUSY:
        print(
            f"warning: others used up to {max(busy)} cores meanwhile: repeat it on an idle machine"
        )
    print(f"wrote {path}")
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: no picture")
        return
    from swr_jax.benchmark import plots

    picture = path.with_suffix(".png")
    getattr(plots, name)(record, picture)
    print(f"wrote {picture}")


def write(record: dict, path: Path) -> None:
    """Replaces the file in one step, so that it is whole at any time."""
    unfinished = path.with_suffix(".json.part")
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    unfinished.replace(path)


if __name__ == "__main__":
    app.run(main)
