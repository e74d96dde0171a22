"""The text study of windows: its models, what it measures, its table."""

import importlib
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch):
    """Gives a module of experiments/ by name."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module


def test_models_differ_in_mixers_and_windows_alone(module):
    compare, windows = module("compare"), module("comparison_windows")
    configs = {name: compare.train_config(o) for name, o in windows.MODELS.items()}
    schedules = {
        name: (config.model.pattern, config.model.window, config.window_schedule.sizes)
        for name, config in configs.items()
    }
    assert schedules == {
        "SWAX, window 16": (("swa", "mlstm"), 16, ()),
        "SWAX, window 256": (("swa", "mlstm"), 256, ()),
        "SWAX, stochastic 16 or 256": (("swa", "mlstm"), 256, (16, 256)),
        "SWA + Gated DeltaNet, stochastic 16 or 256": (("swa", "gated_delta"), 256, (16, 256)),
        "SWA alone, window 256": (("swa",), 256, ()),
        "mLSTM alone": (("mlstm",), 256, ()),
    }
    first, *rest = configs.values()
    for config in rest:
        assert config.data == first.data
        assert config.optimizer == first.optimizer
        assert config.model.features == first.model.features


def test_table_shows_each_window_and_length(module):
    windows = module("comparison_windows")
    hybrid = [
        {"16": {"512": 3.0 + d, "2048": 2.9}, "256": {"512": 2.8, "2048": 2.7 + d}}
        for d in (0.0, 0.2)
    ]
    recurrent = [{"256": {"512": 4.0, "2048": 3.9}}] * 2
    models = {
        name: {"parameters": 1234, "runs": [{"at_windows": run} for run in runs]}
        for name, runs in (("hybrid", hybrid), ("recurrent", recurrent))
    }
    lines = windows.table({"models": models}).splitlines()[2:]
    assert lines == [
        "| hybrid | 1,234 | 3.100 ± 0.141 | 2.900 ± 0.000 | 2.800 ± 0.000 | 2.800 ± 0.141 |",
        "| recurrent | 1,234 | 4.000 ± 0.000 | 3.900 ± 0.000 | 4.000 ± 0.000 | 3.900 ± 0.000 |",
    ]


@pytest.mark.slow
def test_measured_again_a_run_has_the_validation_loss_it_ended_with(module, tmp_path):
    compare, windows = module("compare"), module("comparison_windows")
    comparison, loop = module("comparison"), module("swr_jax.train.loop")
    overrides = windows.MODELS["SWAX, stochastic 16 or 256"] | {
        "steps": 3,
        "sample_tokens": 0,
        "eval_batches": 1,
        "data.sequence_length": 512,
        "data.batch_size": 32,  # a row for each device, also of the longer rows
    }
    loop.train(compare.train_config(overrides), tmp_path)
    run = comparison.read_run(0, tmp_path)
    (measured,) = windows.measure([tmp_path])
    assert set(measured) == {"16", "256"}
    assert measured["256"]["512"] == pytest.approx(run["bits_per_byte"][-1], abs=2e-5)
    assert measured["16"]["512"] != measured["256"]["512"]
