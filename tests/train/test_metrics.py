"""The numbers a run reports and the files it leaves."""

import json
import math
import types

import pytest

from swr_jax.train import metrics
from swr_jax.train.metrics import (
    Meter,
    Reporter,
    Stopwatch,
    format_line,
    peak_flops,
    plot_losses,
    read_metrics,
)


def device(kind: str):
    return types.SimpleNamespace(device_kind=kind, memory_stats=lambda: None)


def update(nats: float, weight: float, target_bytes: int, grad_norm: float = 1.0) -> dict:
    return {
        "nats": nats,
        "weight": weight,
        "target_bytes": target_bytes,
        "grad_norm": grad_norm,
        "learning_rate": 0.1,
    }


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    now = types.SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now.seconds)
    return now


def test_intervals_are_averaged_over_targets_and_timed_without_pauses(clock):
    meter = Meter(tokens_per_step=100, devices=[device("NVIDIA H100 80GB")])
    clock.seconds += 30.0  # the first update compiles; the clock does not run
    meter.add(update(90.0, 30.0, 60), flops_per_token=1e9)
    meter.start_clock()
    clock.seconds += 0.5
    meter.add(update(10.0, 10.0, 20, grad_norm=3.0), flops_per_token=1e9)
    meter.stop_clock()
    clock.seconds += 100.0  # an evaluation
    values = meter.interval()

    assert values["loss"] == pytest.approx((90 + 10) / (30 + 10))
    assert values["perplexity"] == pytest.approx(math.exp(2.5))
    assert values["bits_per_byte"] == pytest.approx(100 / math.log(2) / 80)
    assert values["grad_norm"] == pytest.approx(2.0)
    assert values["tokens_per_second"] == pytest.approx(100 / 0.5)
    assert values["mfu"] == pytest.approx(200 * 1e9 / 989e12)
    assert not {"window", "block_size"} & values.keys()

    meter.start_clock()
    clock.seconds += 1.5
    meter.add(update(1.0, 1.0, 1), flops_per_token=1e9)
    meter.stop_clock()
    assert meter.interval()["tokens_per_second"] == pytest.approx(100 / 1.5)
    assert meter.tokens_per_second() == pytest.approx(200 / 2.0)


def test_utilisation_follows_the_drawn_windows(clock):
    meter = Meter(tokens_per_step=100, devices=[device("NVIDIA H100 80GB")] * 2)
    meter.add(update(1.0, 1.0, 1) | {"window": 100}, flops_per_token=7e9)  # compiles, not timed
    meter.start_clock()
    for window, flops in ((100, 1e9), (2000, 5e9), (100, 1e9)):
        clock.seconds += 0.5
        meter.add(update(1.0, 1.0, 1) | {"window": window}, flops_per_token=flops)
    meter.stop_clock()
    values = meter.interval()
    assert values["window"] == pytest.approx((100 + 100 + 2000 + 100) / 4)
    assert values["mfu"] == pytest.approx(100 * (1e9 + 5e9 + 1e9) / 1.5 / (2 * 989e12))
    assert "  window: 575  " in format_line(4, "train", values)


def test_nothing_timed_is_nothing_said():
    meter = Meter(tokens_per_step=100, devices=[device("cpu")])
    meter.add(update(1.0, 1.0, 1), flops_per_token=1e9)
    values = meter.interval()
    assert "tokens_per_second" not in values
    assert "mfu" not in values
    assert meter.tokens_per_second() is None


def test_peak_is_that_of_the_longest_matching_name():
    assert peak_flops(device("TPU v5 lite")) == 197e12
    assert peak_flops(device("TPU v5p")) == 459e12
    assert peak_flops(device("cpu")) is None


def test_line_has_a_key_before_every_value():
    line = format_line(7, "train", {"loss": 1.23456, "tokens_per_second": 12345.6, "mfu": 0.421})
    assert line == "step: 7  split: train  loss: 1.2346  tokens_per_second: 12,346  mfu: 42.1%"


def test_a_resumed_log_has_every_step_once(tmp_path):
    with Reporter(tmp_path, resume_step=0, enabled=True) as reporter:
        for step in (1, 2, 3):
            reporter.report(step, "train", {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "spl')  # killed while it wrote
    with Reporter(tmp_path, resume_step=2, enabled=True) as reporter:
        reporter.report(3, "train", {"loss": 30.0})
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]


def test_other_processes_report_nothing(tmp_path, capsys):
    with Reporter(tmp_path, resume_step=0, enabled=False) as reporter:
        reporter.report(1, "train", {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_plot_shows_both_splits_and_the_baseline(tmp_path, monkeypatch):
    lines = [
        {"step": step, "split": split, "bits_per_byte": 8.0 / step}
        for step in (1, 2, 3)
        for split in ("train", "validation")
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    import matplotlib.axes

    drawn = {}
    plot = matplotlib.axes.Axes.plot

    def spy(axes, x, y, **options):
        drawn[options["label"]] = (list(x), list(y))
        return plot(axes, x, y, **options)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", spy)
    plot_losses(tmp_path, unigram_bits_per_byte=4.5)
    curve = ([1, 2, 3], [8.0, 4.0, 8 / 3])
    assert drawn == {"train": curve, "validation": curve}
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_stopwatch_adds_up_what_belongs_together(monkeypatch):
    times = iter([0.0, 1.0, 5.0, 7.0, 10.0, 10.5])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(times))
    spent = Stopwatch()
    for part in ("reports", "evaluation"):
        with spent(part):
            pass
    with pytest.raises(KeyError), spent("reports"):
        raise KeyError
    assert spent.seconds == {"reports": 1.5, "evaluation": 2.0}
