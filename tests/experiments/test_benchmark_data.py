"""experiments/benchmark_data.py: its ratios on known numbers, and that it runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from swr_jax.benchmark import preparation

ROOT = Path(__file__).parents[2]


def test_ratios_are_taken_within_rounds():
    def round_of(slowness):
        seconds = {"threads": 4.0, "processes": 3.0, "prepare": 5.0}
        return {
            name: {"seconds": s * slowness, "cpu_seconds": 2 * s} for name, s in seconds.items()
        }

    corpus = {"documents": 1, "text_bytes": 40, "tokens": 60}
    found = preparation.summary([round_of(1.0), round_of(10.0), round_of(100.0)], corpus)
    for clock in ("time", "processor_time"):
        for name, ratio in (("threads", 0.8), ("processes", 0.6)):
            spread = found["prepare_over_alone"][clock][name]
            assert spread == pytest.approx({"median": ratio, "lower": ratio, "upper": ratio})
    assert found["tokens_per_second"]["prepare"]["median"] == pytest.approx(60 / 50)


@pytest.mark.slow
def test_it_measures_and_writes(tmp_path):
    subprocess.run(
        [sys.executable, ROOT / "experiments" / "benchmark_data.py", "--tiny", f"--out={tmp_path}"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
        capture_output=True,
    )
    record = json.loads((tmp_path / "data_preparation.json").read_text())
    assert record["corpus"]["text_bytes"] >= preparation.TINY.text_bytes
    assert record["corpus"]["tokens"] > record["corpus"]["documents"] > 0
    ratios = record["prepare_over_alone"]["time"]
    for name in preparation.ALONE:
        (found,) = record["rounds"]
        assert ratios[name]["median"] == found[name]["seconds"] / found["prepare"]["seconds"]
    (target,) = record["targets"]
    assert target["measured"] == min(found["median"] for found in ratios.values())
