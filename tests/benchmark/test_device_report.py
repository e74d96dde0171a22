"""Records that go on, targets judged on known numbers, predictions beside measurements."""

import json
from pathlib import Path

import pytest

from pallas_kernels.targets import CHIPS
from swr_jax.benchmark import records, suites
from swr_jax.benchmark.device import platform, report

RESULTS = Path(__file__).parents[2] / "experiments" / "results"
ENVIRONMENT = {"platform": "gpu", "device": "H100", "jax": "0.11.2", "source": "abc", "date": "1"}
HEADER = {"suite": "device", "section": "speed", "tiny": False, "environment": ENVIRONMENT}


def test_a_record_goes_on_on_the_same_device(tmp_path):
    path = tmp_path / "device_speed.json"
    record = records.open_record(path, HEADER, fresh=False)
    record["measurements"].append({"case": "copy"})
    record["left_out"].append({"case": "product", "left_out": "no time"})
    records.write_record(record, path)
    later = {**HEADER, "environment": {**ENVIRONMENT, "date": "2"}}
    again = records.open_record(path, later, fresh=False)
    assert again["measurements"] == [{"case": "copy"}]
    assert again["environment"]["date"] == "2"
    assert again["left_out"] == []  # It may have its time now.
    assert records.Session(again).is_done("copy")
    assert not records.Session(again).is_done("product")
    assert records.open_record(path, HEADER, fresh=True)["measurements"] == []


@pytest.mark.parametrize("key", ["device", "jax", "source"])
def test_a_record_of_something_else_is_not_continued(tmp_path, key):
    path = tmp_path / "device_speed.json"
    records.write_record(records.open_record(path, HEADER, fresh=False), path)
    other = {**HEADER, "environment": {**ENVIRONMENT, key: "other"}}
    with pytest.raises(records.RecordError, match=f"another {key}: begin anew with --fresh"):
        records.open_record(path, other, fresh=False)
    with pytest.raises(records.RecordError, match="another sizes"):
        records.open_record(path, {**HEADER, "tiny": True}, fresh=False)


def test_a_device_is_done_in_less_than_eight_minutes():
    assert sum(section.seconds for section in suites.load("device").values()) < 480


def test_a_section_stops_when_a_step_would_take_it_over_its_time(monkeypatch):
    clock = iter([0.0, 1.0, 31.0, 59.0, 71.0])
    monkeypatch.setattr(records.time, "perf_counter", lambda: next(clock))
    session = records.Session({"measurements": []}, seconds=100)
    # The longest step took 30 s: at 71 s there is no time for another.
    assert [session.is_over() for _ in range(4)] == [False, False, False, True]


def timed(milliseconds, size, **speedup):
    return {
        "milliseconds": {"median": milliseconds},
        "bytes": size,
        "speedup": {name: spread(value) for name, value in speedup.items()},
        "copy_fraction": spread(0.9),
    }


def spread(value):
    return {"median": value, "lower": value - 0.1, "upper": value + 0.1}


def judged(targets):
    return [(t["required"], round(t["measured"], 6), t["met"]) for t in targets]


def recurrences(contestants):
    return {
        "measurements": [
            {"group": "plain", "tokens": tokens, "mode": mode, "contestants": contestants[mode]}
            for tokens in (8192, 2048)
            for mode in contestants
        ]
    }


def test_operators_are_judged():
    name, scan = "sliding_window_recurrence", "associative_scan"
    both = {scan: 30.0, f"{scan}, broadcast": 19.0}
    contestants = {
        "forward": {name: timed(2.0, 90), "copy": timed(1.0, 50)},
        # 160 bytes more in 4 ms more: 40 bytes a millisecond, where the copy moves 50.
        "forward+backward": {name: timed(6.0, 250, **both)},
    }
    found = report.recurrence_targets(recurrences(contestants), None)
    # Among the two forms of the scan the faster one counts.
    assert judged(found) == [(">= 0.85", 0.9, True), (">= 0.8", 0.8, True), (">= 20", 19.0, False)]
    del contestants["forward+backward"][name]
    assert report.recurrence_targets(recurrences(contestants), None) == []


def test_layers_and_training_are_judged_where_they_were_measured():
    layer = {
        "features": 2048,
        "tokens": 8192,
        "mode": "forward",
        "contestants": {"phalanx": timed(1, 1, sliding_window_attention=1.7)},
    }
    others = [{**layer, "features": 1024}, {**layer, "mode": "forward+backward"}]
    check = {"case": "check", "contestants": {}}
    found = report.layer_targets({"measurements": [check, layer, *others]}, None)
    assert judged(found) == [(">= 1.8", 1.7, False)]
    updates = [
        {
            "model": "1.3B",
            "tokens": tokens,
            "contestants": {"phalanx_hybrid": timed(1, 1, **{"transformer++": 1.2})},
        }
        for tokens in (4096, 8192, 32768)
    ]
    found = report.training_targets({"measurements": updates}, None)
    assert judged(found) == [(">= 1.1", 1.2, True), (">= 1.4", 1.2, False)]


@pytest.mark.parametrize(
    ("kind", "chip"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA A100-SXM4-40GB", None),
    ],
)
def test_chips_by_the_names_that_devices_have(kind, chip):
    assert platform.chip_of(kind) == chip
    assert chip is None or chip in CHIPS


def test_predictions_stand_beside_measurements():
    kernels, baselines = (
        json.loads((RESULTS / f"{name}.json").read_text())
        for name in ("kernels_gpu", "tpu_baselines")
    )
    predicted = report.predictions("h100", kernels, baselines)
    assert {row["group"] for row in predicted} == {"plain", "gated", "mlstm", "gated_delta"}
    assert len(predicted) == 12
    for row in predicted:
        assert 0 < row["floor_seconds"] <= row["predicted_seconds"]
    record = recurrences({"forward": {"sliding_window_recurrence": timed(0.25, 1)}})
    rows = list(report.compare(predicted, record["measurements"]))
    measured = [row for row in rows if row["measured_seconds"] is not None]
    (row,) = measured
    assert (row["contestant"], row["mode"]) == ("sliding_window_recurrence", "forward")
    assert row["measured_seconds"] == pytest.approx(250e-6)
    lines = report.comparison_table(rows).splitlines()
    ratio = row["measured_seconds"] / row["predicted_seconds"]
    assert lines[2].endswith(f"| 250 | {ratio:.2f} |")
    assert all(line.endswith("|  |  |") for line in lines[3:])


def test_tpu_predictions_are_of_the_kernels_own_layout():
    baselines = json.loads((RESULTS / "tpu_baselines.json").read_text())
    predicted = report.predictions("v5e", {"reports": []}, baselines)
    assert {row["tokens"] for row in predicted} == {2048, 8192, 32768, 131072}
    assert {"window kernel", "exact kernel"} <= {row["contestant"] for row in predicted}
