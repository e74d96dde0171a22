"""`experiments/benchmark.py --suite=device`, in small on the CPU."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from swr_jax.benchmark import timing
from swr_jax.benchmark.device import check, platform
from swr_jax.benchmark.device.check_recurrence import Recurrence

ROOT = Path(__file__).parents[2]
SECTIONS = ("check", "speed", "recurrence", "layers", "training", "decode", "tuning")
# What a GPU machine in a cluster may lack.
ABSENT = (
    *("array_record", "grain", "matplotlib", "ml_collections", "orbax", "pyarrow"),
    *("sentencepiece", "tensorboardX", "tokamax", "tokenizers", "tqdm"),
)


@pytest.fixture
def benchmark(monkeypatch, tmp_path, capsys):
    """Runs the script in this process, with XLA's form alone to check; returns what it prints."""
    spec = importlib.util.spec_from_file_location(
        "benchmark_script", ROOT / "experiments" / "benchmark.py"
    )
    defined = set(flags.FLAGS)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    case = Recurrence((1, 18, 2, 8), gated=False, lookback=1, dtypes=("float32",))
    monkeypatch.setattr(platform, "backends", lambda: (platform.Backend("xla"),))
    suite = script.suites.load("device")
    section = dataclasses.replace(suite["check"], tiny=check.Sizes((case,)))
    monkeypatch.setitem(suite, "check", section)

    def run(*arguments):
        flags.FLAGS.unparse_flags()
        command = ["benchmark.py", "--suite=device", "--tiny", f"--out={tmp_path}", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        flags.FLAGS(command)
        try:
            script.main(command[:1])
        finally:
            for name in ("fresh", "redraw", "sections", "tiny"):
                flags.FLAGS[name].unparse()
        return capsys.readouterr().out

    yield run
    for name in set(flags.FLAGS) - defined:
        delattr(flags.FLAGS, name)


def test_sections_run_after_the_check_and_go_on_where_they_stopped(
    benchmark, monkeypatch, tmp_path
):
    printed = benchmark("--sections=speed")
    assert "green" in printed
    assert "a second" in printed
    written = {
        name: json.loads((tmp_path / f"device_{name}.json").read_text())
        for name in ("check", "speed")
    }
    cases = [m["case"] for m in written["speed"]["measurements"]]
    assert cases == [
        "copy, [32768] bfloat16",
        "product, [64, 64] and [64, 64] bfloat16",
        "product, [64, 64] and [64, 64] float32",
        "dispatch, [8] float32",
    ]
    copy = written["speed"]["measurements"][0]["contestants"]["copy"]
    assert copy["rate"]["median"] == pytest.approx(131072 / copy["milliseconds"]["median"] * 1e3)
    assert "back to back" in written["speed"]["protocol"]["timing"]

    measure = timing.measure
    monkeypatch.setattr(timing, "measure", None)  # Nothing is left to be timed ...
    assert "4 done before" in benchmark("--sections=speed")
    monkeypatch.setattr(timing, "measure", measure)
    path = tmp_path / "device_speed.json"
    record = json.loads(path.read_text())
    lost = record["measurements"].pop(1)
    path.write_text(json.dumps(record))
    benchmark("--sections=speed")  # ... and what is lost is measured again, alone.
    record = json.loads(path.read_text())
    assert [m["case"] for m in record["measurements"]][-1] == lost["case"]
    assert record["measurements"][0] == written["speed"]["measurements"][0]


def test_nothing_is_timed_while_a_check_is_red(benchmark, monkeypatch, tmp_path):
    monkeypatch.setitem(Recurrence.tolerances, "float32", 1e-12)
    with pytest.raises(SystemExit, match=r"error of .*Nothing was timed"):
        benchmark("--sections=speed")
    assert json.loads((tmp_path / "device_check.json").read_text())["measurements"][0]["fault"]
    assert not (tmp_path / "device_speed.json").exists()
    monkeypatch.setitem(Recurrence.tolerances, "float32", 1e-6)
    with pytest.raises(SystemExit, match="Nothing was timed"):  # The fault is on record.
        benchmark("--sections=speed")
    assert "green" in benchmark("--sections=speed", "--fresh")


def test_without_a_device_it_says_so(tmp_path):
    call = subprocess.run(
        [sys.executable, "experiments/benchmark.py", "--suite=device", f"--out={tmp_path}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert call.returncode == 1
    assert "JAX sees no GPU or TPU here; --tiny runs it in small" in call.stderr


BLOCKED = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in {ABSENT} else find_spec(name, *a)
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_bare(folder, *arguments):
    """The command on a machine that has only what it says that it needs."""
    script = ["experiments/benchmark.py", "--suite=device", "--tiny", f"--out={folder}"]
    quick = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-c", BLOCKED, *script, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **quick, "PYTHONPATH": str(ROOT)},
        check=False,
    )


def test_it_needs_no_more_than_it_says():
    call = run_bare("unused", "--helpfull")
    assert "--[no]tiny" in call.stdout, call.stderr


@pytest.mark.slow
def test_all_sections_from_end_to_end_with_simulated_kernels(tmp_path):
    call = run_bare(tmp_path)
    assert call.returncode == 0, call.stderr
    assert "matplotlib is not installed: no picture" in call.stdout
    found = {name: json.loads((tmp_path / f"device_{name}.json").read_text()) for name in SECTIONS}
    backends = {m["backend"] for m in found["check"]["measurements"]}
    assert backends == {"mosaic_gpu", "mosaic_tpu", "xla"}
    assert any("lane order" in m["case"] for m in found["check"]["measurements"])
    assert {m["backend"] for m in found["tuning"]["measurements"]} == {"mosaic_gpu", "mosaic_tpu"}
    assert set(found["training"]["measurements"][0]["contestants"]) == {
        "phalanx_hybrid",
        "transformer++",
    }
    for name, record in found.items():
        assert record["left_out"] == []
        assert not any(m.get("left_out") for m in record["measurements"])
        assert str(tmp_path) not in json.dumps(record)
        for m in record["measurements"]:
            for contestant in m.get("contestants", {}).values():
                assert contestant["milliseconds"]["median"] > 0, name
    redrawn = run_bare(tmp_path, "--redraw")
    assert redrawn.returncode == 0, redrawn.stderr
    assert "x transformer++" in redrawn.stdout
