"""Compiles every kernel for chips that are not here, and writes what it would take there.

    python experiments/kernel_report.py --platform=gpu

Needs the compilers (`pip install -e '.[targets]'`, best in an environment of its own: `make
report` does it). Writes kernels_PLATFORM.json and .png into --out: registers, spills, shared
memory, instructions, bytes and the predicted time, for a real device to confirm or refute. Exits
with 1 when a kernel breaks its budget.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
from absl import app, flags

from pallas_kernels import catalogue
from swr_jax.benchmark import predictions, report
from swr_jax.benchmark.plots import predictions as plots

CHIPS = {"gpu": ("h100", "h200", "b200"), "tpu": ("v4", "v5e", "v5p", "v6e", "tpu7x")}

PLATFORM = flags.DEFINE_enum("platform", "gpu", list(CHIPS), "Which chips.")
OUT = flags.DEFINE_string("out", "experiments/results", "Folder for the results, made if missing.")
KERNEL = flags.DEFINE_string(
    "kernel", "", "Only kernels with this in their name; others stay in the files as they are."
)


def main(argv: list[str]) -> None:
    """Compiles, writes, draws."""
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}: options begin with --")
    jax.config.update("jax_platforms", "cpu")
    environment = report.environment(sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reports.json"
        chips = ",".join(CHIPS[PLATFORM.value])
        command = [sys.executable, "-m", "pallas_kernels.targets", f"--chip={chips}"]
        # In a process of its own, which may set up the compilers before JAX starts.
        status = subprocess.run(
            [*command, f"--kernel={KERNEL.value}", f"--json={path}"], check=False
        ).returncode
        if not path.exists():
            sys.exit(status)
        reports = json.loads(path.read_text())
    out = Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"kernels_{PLATFORM.value}.json"
    if KERNEL.value and target.exists():
        before = json.loads(target.read_text())["reports"]
        reports = [r for r in before if KERNEL.value not in r["name"]] + reports
    record = {"environment": environment, "shape": catalogue.SHAPES, "reports": reports}
    target.write_text(json.dumps(record, indent=1) + "\n")
    plots.kernels(record, target.with_suffix(".png"))
    print(f"\n{predictions.table(reports)}\n\nwrote {target} and {target.with_suffix('.png')}")
    sys.exit(status)


if __name__ == "__main__":
    app.run(main)
