"""The README says what is so: its example runs, and its tables are the committed results."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from swr_jax.benchmark import predictions, tpu_baselines

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "experiments" / "results"


def test_the_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["y_packed"].shape == names["x"].shape == (2, 1000, 512)


@pytest.mark.parametrize("study", ["mixers", "ablations"])
def test_tables_are_the_committed_results(study):
    spec = importlib.util.spec_from_file_location(
        "comparison", ROOT / "experiments" / "comparison.py"
    )
    comparison = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(comparison)
    results = json.loads((RESULTS / f"compare_{study}.json").read_text())
    assert comparison.table(results) in README


@pytest.mark.parametrize(("platform", "chip"), [("gpu", "h100"), ("tpu", "v5e")])
def test_predictions_are_the_committed_reports(platform, chip):
    record = json.loads((RESULTS / f"kernels_{platform}.json").read_text())
    reports = [report for report in record["reports"] if report["chip"]["name"] == chip]
    assert predictions.table(reports) in README
    for report in record["reports"]:
        assert report["broken_budgets"] == [], (report["name"], report["chip"]["name"])


def test_the_tpu_comparison_is_the_committed_one():
    predictions = json.loads((RESULTS / "tpu_baselines.json").read_text())["predictions"]
    assert tpu_baselines.table(predictions, 8192) in README


def test_pictures_and_files_that_it_names_exist():
    named = re.findall(r"(?:experiments|swr_jax)/[\w/.]+\.(?:png|json|py)", README)
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).exists()] == []
