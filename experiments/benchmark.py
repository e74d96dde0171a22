"""Checks the project's operators, layers and models against float64, then times them.

    python experiments/benchmark.py --suite=cpu
    python experiments/benchmark.py --suite=device --out=DIR
    python experiments/benchmark.py --suite=decode
    python experiments/benchmark.py --suite=train

On any GPU or TPU the suite `device` checks every kernel, measures what the device can do, times
recurrences, layers, training and decoding, and tunes the kernels, in less than eight minutes. It
needs jax, flax, optax, absl-py and numpy. The suite `cpu` takes about ten minutes; run it on an
idle machine. The suite `decode` times one stream's next token after contexts of 1k to 128k, on any
device, the suite `train` the trainer's updates of four models, and what the rest of the trainer
costs, in half an hour; on a GPU or TPU updates of models of 350 million and 1.3 billion parameters
too. Run again with the same --out, `device` and `train` go on where they stopped.

Each section writes SUITE_SECTION.json into --out after every measurement, prints a table, and draws
a picture where matplotlib is installed. Nothing is timed while a check is red. What is left out is
written down with the reason. How things are timed is described in swr_jax/benchmark/timing.py and
repeated in the JSON.
"""

import importlib.util
import os
import sys
from pathlib import Path

# Before JAX starts: a GPU's memory for the models that are trained side by side.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import jax
from absl import app, flags, logging

from swr_jax.benchmark import records, report, suites, summary, timing
from swr_jax.benchmark.oracle import OracleError

SUITE = flags.DEFINE_enum("suite", "cpu", list(suites.NAMES), "What to measure.")
OUT = flags.DEFINE_string("out", "experiments/results", "Folder for the results, made if missing.")
SECTIONS = flags.DEFINE_list("sections", [], "Sections of the suite; all of them if not given.")
TINY = flags.DEFINE_bool("tiny", False, "Small sizes, to see whether everything runs.")
FRESH = flags.DEFINE_bool("fresh", False, "Measure again what earlier runs in --out measured.")
REDRAW = flags.DEFINE_bool("redraw", False, "Only print and draw what is in --out; no device.")

GOES_ON = ("device", "train")  # where they stopped: what is fast can be measured again
BUSY = 0.5  # cores in use by others from which on a warning is printed


def main(argv: list[str]) -> None:
    """Parses, measures, reports."""
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}: options begin with --")
    logging.set_verbosity(logging.WARNING)  # orbax tells of every file it writes
    suite = suites.load(SUITE.value)
    unknown = [name for name in SECTIONS.value if name not in suite]
    if unknown:
        sys.exit(f"error: --sections={','.join(unknown)}: must be of {', '.join(suite)}")
    folder = Path(OUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = SECTIONS.value or list(suite)
    if REDRAW.value:
        for name in chosen:
            path = folder / f"{SUITE.value}_{name}.json"
            if path.exists():
                show(name, suite[name], records.read_record(path), path)
        return
    if SUITE.value == "cpu":
        jax.config.update("jax_platforms", "cpu")
    elif SUITE.value == "device" and jax.default_backend() == "cpu" and not TINY.value:
        sys.exit("error: --suite=device: JAX sees no GPU or TPU here; --tiny runs it in small")
    if SUITE.value in ("cpu", "decode"):
        timing.prepare_allocator()  # before JAX has a device
    environment = report.environment(sys.argv[1:])
    if environment["load_average"] > BUSY:
        print(f"warning: the machine is busy (load average {environment['load_average']})")
    found = {}
    for name, section in suite.items():  # the suite's order: the allocator is set up along the way
        if name not in chosen and section.faults is None:
            path = folder / f"{SUITE.value}_{name}.json"
            if path.exists():
                found[name] = records.read_record(path)
            continue  # what checks, runs always: nothing is timed unchecked
        if section.device_only and jax.default_backend() == "cpu" and not TINY.value:
            print(f"{name}: left out, it needs a GPU or TPU and JAX sees none here")
            continue
        try:
            found[name] = measure(name, section, environment, folder, found)
        except (OracleError, records.RecordError) as error:
            sys.exit(f"error: {error}")


def measure(
    name: str, section: suites.Section, environment: dict, folder: Path, others: dict
) -> dict:
    """Runs one section, writing what is known after each measurement."""
    path = folder / f"{SUITE.value}_{name}.json"
    sizes = section.tiny if TINY.value else section.full
    header = {
        "suite": SUITE.value,
        "section": name,
        "tiny": TINY.value,
        "environment": environment,
        "protocol": section.protocol,
    }
    record = records.open_record(path, header, fresh=FRESH.value or SUITE.value not in GOES_ON)
    session = records.Session(record, others, float("inf") if TINY.value else section.seconds)
    earlier = f", {len(record['measurements'])} done before" if record["measurements"] else ""
    print(f"{name}: compiling and checking{earlier}", flush=True)
    machine = report.OtherProcesses()
    for item in section.run(sizes, session):
        if "case" in item and isinstance(item.get("left_out"), str):
            record["left_out"].append(item)
            print(f"  left out {item['case']}: {item['left_out']}", flush=True)
        else:
            item["cores_used_by_others"] = machine.cores()
            record["measurements"].append(item)
            print("  measured", summary.describe(item), flush=True)
        records.write_record(record, path)
    if section.targets:
        record["targets"] = section.targets(record, sizes)
    records.write_record(record, path)
    show(name, section, record, path)
    if section.faults and (faults := section.faults(record)):
        raise OracleError("; ".join(faults) + ". Nothing was timed: correct it first")
    busy = [m["cores_used_by_others"] or 0 for m in record["measurements"]]
    if SUITE.value != "device" and max(busy) > BUSY:
        print(
            f"warning: others used up to {max(busy)} cores meanwhile: repeat it on an idle machine"
        )
    return record


def show(name: str, section: suites.Section, record: dict, path: Path) -> None:
    """Prints what a record says, and draws it."""
    print(f"\n{summary.text(name, section, record)}\n\nwrote {path}")
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: no picture")
        return
    from swr_jax.benchmark import plots

    if picture := plots.draw(record, path.with_suffix(".png")):
        print(f"wrote {picture}")


if __name__ == "__main__":
    app.run(main)
