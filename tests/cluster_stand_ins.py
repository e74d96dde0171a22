"""Stand-ins for the commands of clusters, which run on this machine what they would elsewhere."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Starts a command once per host, each told what Slurm tells, and fails if one of them does.
_ONCE_PER_HOST = """
import os, subprocess, sys
hosts, folders, command = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
running = []
for host in range(hosts):
    told = {
        "SLURM_JOB_ID": "@JOB@", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(hosts),
        "SLURM_PROCID": str(host), "SLURM_LOCALID": "0", "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    home = os.path.join(folders, str(host)) if folders else os.getcwd()
    os.makedirs(home, exist_ok=True)
    running.append(subprocess.Popen(command, env=os.environ | told, cwd=home))
sys.exit(max(process.wait() for process in running))
"""


class StandIns:
    """A folder of commands that come before those of the machine.

    Args:
        folder: an empty one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        job = str(os.getpid() % 4096)  # a port is made of it
        (folder / "once_per_host.py").write_text(_ONCE_PER_HOST.replace("@JOB@", job))
        self.once_per_host = f"{shlex.quote(sys.executable)} {folder}/once_per_host.py"

    def add(self, name: str, script: str) -> None:
        """Makes a command of a few lines of bash."""
        path = self.folder / name
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(0o755)

    def add_tpu_pod(self, mount: Path, bucket: str, workers: Path, calls: Path) -> None:
        """`gcloud` for a pod of two workers, and what these have: make, gcsfuse, sudo."""
        self.add("sudo", '"$@"')
        self.add("mountpoint", "exit 1")
        self.add("gcsfuse", f'[ "$*" = "--implicit-dirs {bucket} {mount}" ]')
        self.add(
            "make",
            '[ "$*" = "--silent -C swr_jax .venv/.test EXTRAS=tpu,text" ] || exit 9\n'
            f"ln -s {shlex.quote(sys.prefix)} swr_jax/.venv",
        )
        self.add(
            "gcloud",
            f'printf "%s\\n" "$*" >> {calls}\n'
            'action="$4"; shift 4\n'
            'for argument in "$@"; do\n'
            '  case "$argument" in --command=*) run="${argument#*=}";; esac\n'
            "done\n"
            f"workers={workers}\n"
            'case "$action" in\n'
            '  scp) mkdir -p "$workers"/0 "$workers"/1\n'
            '       cp "$1" "$workers/0/${2#*:}"; cp "$1" "$workers/1/${2#*:}";;\n'
            f'  ssh) exec {self.once_per_host} 2 "$workers" bash -c "$run";;\n'
            "esac",
        )

    def run(
        self, *command: str, cwd: Path = ROOT, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command that finds these before others."""
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | variables
        environment["PATH"] = f"{self.folder}{os.pathsep}{os.environ['PATH']}"
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        return subprocess.run(
            command, env=environment, cwd=cwd, capture_output=True, text=True, check=False
        )
