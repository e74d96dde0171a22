"""The files that start a run on a cluster, with the cluster's own commands played by stand-ins."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "experiments" / "launch"
TINY = (
    "--config.steps=4",
    "--config.log_every=1",
    "--config.eval_batches=1",
    "--config.data.batch_size=8",
    "--config.data.sequence_length=64",
    "--config.data.shuffle_tokens=4096",
    "--config.model.features=32",
    "--config.model.depth=2",
    "--config.sample_prompt=an  uneven 'prompt'",
    "--config.sample_tokens=0",
)

# Starts a command once per host, each told what Slurm tells, and fails if one of them does.
ONCE_PER_HOST = """
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


def stand_in(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def commands(tmp_path) -> Path:
    """A folder of stand-ins that comes first on PATH."""
    folder = tmp_path / "commands"
    folder.mkdir()
    job = str(os.getpid() % 4096)  # a port is made of it
    (folder / "once_per_host.py").write_text(ONCE_PER_HOST.replace("@JOB@", job))
    return folder


def launch(script: str, commands: Path, *arguments: str, **variables: str):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | variables
    environment["PATH"] = f"{commands}{os.pathsep}{os.environ['PATH']}"
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def steps(workdir: Path) -> list[int]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if line["split"] == "train"]


@pytest.mark.slow
def test_slurm_trains_on_all_nodes(commands, tmp_path):
    stand_in(commands, "make", "exit 0")
    python = shlex.quote(sys.executable)
    stand_in(
        commands,
        "srun",
        f'[ "$1" = --kill-on-bad-exit=1 ] || exit 9; shift; '
        f'exec {python} {commands}/once_per_host.py 2 "" "$@"',
    )
    done = launch(
        "slurm.sbatch",
        commands,
        *TINY,
        CONFIG="phalanx_tiny",
        WORKDIR=str(tmp_path / "run"),
        VENV=sys.prefix,
    )
    assert done.returncode == 0, done.stderr
    assert "devices: 2 x cpu" in done.stdout
    assert steps(tmp_path / "run") == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_tpu_pod_trains_on_all_workers(commands, tmp_path):
    python, bucket = shlex.quote(sys.executable), tmp_path / "bucket"
    stand_in(commands, "sudo", '"$@"')
    stand_in(commands, "mountpoint", "exit 1")
    stand_in(commands, "gcsfuse", f'[ "$*" = "--implicit-dirs my-bucket {bucket}" ]')
    stand_in(
        commands,
        "make",
        f'[ "$*" = "--silent -C swr_jax .venv/.test EXTRAS=tpu,text" ] || exit 9; '
        f"ln -s {shlex.quote(sys.prefix)} swr_jax/.venv",
    )
    stand_in(
        commands,
        "gcloud",
        'printf "%s\\n" "$*" >> ' + f"{tmp_path}/calls\n"
        'action="$4"; shift 4\n'
        'for argument in "$@"; do\n'
        '  case "$argument" in --command=*) run="${argument#*=}";; esac\n'
        "done\n"
        f"workers={tmp_path}/workers\n"
        'case "$action" in\n'
        '  scp) mkdir -p "$workers"/0 "$workers"/1\n'
        '       cp "$1" "$workers/0/${2#*:}"; cp "$1" "$workers/1/${2#*:}";;\n'
        f'  ssh) exec {python} {commands}/once_per_host.py 2 "$workers" bash -c "$run";;\n'
        "esac",
    )
    done = launch(
        "tpu_pod.sh",
        commands,
        *TINY,
        TPU="my-pod",
        ZONE="us-east5-a",
        BUCKET="my-bucket",
        MOUNT=str(bucket),
        CONFIG="phalanx_tiny",
        RUN="first",
    )
    assert done.returncode == 0, done.stderr
    assert "devices: 2 x cpu" in done.stdout
    assert steps(bucket / "runs" / "first") == [1, 2, 3, 4]
    calls = (tmp_path / "calls").read_text()
    assert calls.count("--zone=us-east5-a --worker=all") == 3
    sources = tmp_path / "workers" / "1" / "swr_jax"
    assert (sources / "swr_jax" / "__init__.py").exists()
    assert not (sources / ".git").exists()


@pytest.mark.parametrize(
    ("script", "missing"),
    [("slurm.sbatch", "CONFIG"), ("tpu_pod.sh", "TPU")],
)
def test_what_is_not_filled_in_is_named(script, missing, commands):
    done = launch(script, commands)
    assert done.returncode != 0
    assert f"{missing}: name " in done.stderr


def test_the_manifest_fits_itself_and_the_command():
    manifest = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert (manifest["kind"], manifest["apiVersion"]) == ("JobSet", "jobset.x-k8s.io/v1alpha2")
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert spec["parallelism"] == spec["completions"] == rows * columns / chips
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert "--distributed" in container["args"]
    script = [part for part in container["command"] if part.endswith(".py")]
    files = [a.partition("=")[2] for a in container["args"] if a.startswith("--config=")]
    assert all((ROOT / path).exists() for path in script + files)


def test_the_manifests_command_is_understood():
    """All of its options exist: the run ends where the first of its files is missing."""
    manifest = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    template = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    arguments = template["spec"]["containers"][0]["args"]
    arguments = [a for a in arguments if a != "--distributed" and "fsdp" not in a]
    arguments.append("--config.model.vocab_size=50304")
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "experiments" / "pretrain.py"), *arguments],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "tokenizer='/bucket/tokenizer.json' cannot be read" in done.stderr.splitlines()[-1]
