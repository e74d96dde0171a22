"""Training runs as commands of their own, on one host or, all on this machine, on several."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start(
    workdir: Path,
    *options: str,
    hosts: int = 1,
    of_one: Sequence[Sequence[str]] = (),
    file_kib: int | None = None,
) -> list[subprocess.Popen]:
    """One process of one CPU device per host; what they print goes to `log_of`.

    Args:
        workdir: of the run.
        options: of all processes.
        hosts: how many.
        of_one: more options, of process 0, of process 1 and so on.
        file_kib: longest file that a process may write; longer ones fail as on a full disk.
    """
    command = [
        sys.executable,
        str(ROOT / "experiments" / "pretrain.py"),
        f"--config={ROOT}/experiments/configs/phalanx_tiny.py",
        f"--workdir={workdir}",
        *options,
    ]
    if hosts > 1:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        command += ["--distributed", f"--coordinator=localhost:{port}", f"--num_processes={hosts}"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }

    if file_kib is not None:
        # The log, which is a file too, is written by a process without that limit.
        limited = f'(ulimit -f {file_kib}; exec "$@") 2>&1 | cat; exit "${{PIPESTATUS[0]}}"'
        command = ["bash", "-c", limited, "bash", *command]
    processes = []
    for index in range(hosts):
        log = log_of(workdir, index, hosts).open("w")
        own = [f"--process_id={index}"] if hosts > 1 else []
        own += of_one[index] if index < len(of_one) else []
        processes.append(
            subprocess.Popen([*command, *own], stdout=log, stderr=log, env=environment)
        )
        log.close()
    return processes


def log_of(workdir: Path, index: int = 0, hosts: int = 1) -> Path:
    """The file with what a process printed."""
    return workdir.with_name(f"{workdir.name}.{hosts}.{index}.log")


def losses(workdir: Path) -> dict[int, float]:
    """Training loss by step, as reported so far."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return {line["step"]: line["loss"] for line in found if line["split"] == "train"}


def newest_checkpoint(workdir: Path) -> int:
    """Step of the newest finished checkpoint; 0 if there is none."""
    names = (path.name for path in (workdir / "checkpoints").glob("*"))
    return max((int(name) for name in names if name.isdigit()), default=0)
