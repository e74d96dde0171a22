"""The files that start a run on a cluster, with the cluster's own commands played by stand-ins."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cluster_stand_ins import StandIns

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


@pytest.fixture
def stand_ins(tmp_path) -> StandIns:
    return StandIns(tmp_path / "commands")


def launch(script: str, stand_ins: StandIns, *arguments: str, **variables: str):
    return stand_ins.run("bash", str(LAUNCH / script), *arguments, **variables)


def steps(workdir: Path) -> list[int]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if line["split"] == "train"]


@pytest.mark.slow
def test_slurm_trains_on_all_nodes(stand_ins, tmp_path):
    stand_ins.add("make", "exit 0")
    stand_ins.add(
        "srun",
        f'[ "$1" = --kill-on-bad-exit=1 ] || exit 9; shift; '
        f'exec {stand_ins.once_per_host} 2 "" "$@"',
    )
    done = launch(
        "slurm.sbatch",
        stand_ins,
        *TINY,
        CONFIG="phalanx_tiny",
        WORKDIR=str(tmp_path / "run"),
        VENV=sys.prefix,
    )
    assert done.returncode == 0, done.stderr
    assert "devices: 2 x cpu" in done.stdout
    assert steps(tmp_path / "run") == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_tpu_pod_trains_on_all_workers(stand_ins, tmp_path):
    bucket = tmp_path / "bucket"
    stand_ins.add_tpu_pod(bucket, "my-bucket", tmp_path / "workers", tmp_path / "calls")
    done = launch(
        "tpu_pod.sh",
        stand_ins,
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
def test_what_is_not_filled_in_is_named(script, missing, stand_ins):
    done = launch(script, stand_ins)
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
