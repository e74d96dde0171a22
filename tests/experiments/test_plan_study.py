"""The study of plans: its cases, and what it makes of files that are there."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels.targets import CHIPS
from swr_jax.train.plan import parse_topology

ROOT = Path(__file__).parents[2]


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    return importlib.import_module("plan_study_cases")


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    return importlib.import_module("plan_study_report")


def devices_of(topology: str) -> int:
    chip, _, shape = topology.partition(":")
    return (2 if chip == "tpu7x" else 1) * math.prod(map(int, shape.split("x")))


def test_every_device_gets_as_many_tokens(study):
    cases = study.cases()
    assert len({case.name for case in cases}) == len(set(cases))
    for case in cases:
        chip, _ = parse_topology(case.topology)
        assert chip in CHIPS
        options = case.options
        tokens = options["data.batch_size"] * options["data.sequence_length"]
        copies = devices_of(case.topology) // options["mesh.tensor"]
        assert tokens in (copies * study.TOKENS[chip], copies * study.TOKENS[chip] // 4), case.name
        rows_at_once = copies // options["mesh.sequence"]
        assert options["data.batch_size"] % rows_at_once == 0, case.name


def plan(case, seconds: float, **changed) -> dict:
    devices, tokens = devices_of(case.topology), 2**21
    return {
        "config": case.config,
        "topology": case.topology,
        "devices": devices,
        "mesh": {"data": 1, "fsdp": devices, "tensor": 1, "sequence": 1},
        "length": case.length,
        "parameters": 7e9 if case.config.endswith("7b") else 1.3e9,
        "tokens_per_update": tokens,
        "memory": 2**33,
        "memory_limit": 2**34,
        "fits": True,
        "unknown_loops": 0,
        "seconds": seconds,
        "seconds_if_overlapped": seconds,
        "tokens_per_second": tokens / seconds,
    } | changed


def test_what_is_planned_is_reported_and_not_planned_again(study, tmp_path):
    cases = {case.name: case for case in study.cases()}
    seconds = {"transformer_1b v5e:16x16 8192": 1.2, "phalanx_1b v5e:16x16 8192": 1.0}
    out = tmp_path / "out"
    out.mkdir()
    before = {"plans": [plan(cases[name], value) for name, value in seconds.items()]}
    (out / "plan_study.json").write_text(json.dumps(before))
    command = ["experiments/plan_study.py", f"--out={out}"]
    call = subprocess.run(
        [sys.executable, *command, "--only=v5e:16x16", "--minutes=0"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert call.returncode == 0, call.stderr
    assert "1.00 (1.20x)" in call.stdout
    record = json.loads((out / "plan_study.json").read_text())
    assert [plan["seconds"] for plan in record["plans"]] == [1.2, 1.0]
    assert len(record["missing"]) == len(cases) - 2
    assert (out / "plan_study.png").stat().st_size > 10_000


def test_growing_slices_are_compared_with_the_smallest(study, report):
    cases = [study.Case("phalanx_1b", topology, 8192) for topology in study.GROWING]
    plans = [
        plan(case, 1.0, tokens_per_second=devices_of(case.topology) * speed)
        for case, speed in zip(cases, (100.0, 99.0, 98.0, 90.0), strict=True)
    ]
    text = report.tables({"plans": plans})
    for part in ("| 16 | 100 | 100.0%", "| 1,024 | 90 | 90.0%"):
        assert part in text


def test_what_does_not_fit_or_has_no_time_is_said(study, report):
    tight = plan(study.Case("swax_7b", "v5e:16x16", 8192), 1.0, fits=False, memory=None)
    node = plan(study.Case("phalanx_1b", "h100:1x8x1", 8192), 1.0)
    for single in (tight, node):
        del single["seconds"]
    broken = plan(study.Case("swax_7b", "v5e:16x16", 4096), 1.0, fits=False, memory=None)
    del broken["seconds"]
    broken["failure"] = "INTERNAL: no routes"
    endless = plan(study.Case("swax_1b", "v5e:16x16", 8192), 1.0, unknown_loops=1)
    text = report.tables({"plans": [tight, node, endless, broken]})
    assert text.count("| fits |") == 2
    assert "| the compiler fails |" in text
    assert "does not fit" in text
    assert "| fits |" in text
