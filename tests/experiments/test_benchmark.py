"""experiments/benchmark.py: what it refuses to time, what it computes, what it writes."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from swr_jax.benchmark import layers, oracle, recurrence, report, timing
from swr_jax.ops import reference, sliding_window_recurrence

ROOT = Path(__file__).parents[2]


# Statistics, on known numbers


def test_spread_is_median_and_quartiles():
    assert timing.spread(np.array([5.0, 1.0, 2.0, 4.0, 3.0])) == timing.Spread(3.0, 2.0, 4.0)
    assert timing.spread(np.array([1.0, 2.0])) == timing.Spread(1.5, 1.25, 1.75)


def test_speedup_is_taken_within_rounds():
    # The machine gets slower from round to round; the ratio does not.
    ours = timing.Samples(seconds=np.array([1.0, 10.0, 100.0]), page_faults=np.zeros(3))
    theirs = timing.Samples(seconds=np.array([2.0, 30.0, 200.0]), page_faults=np.zeros(3))
    assert timing.speedup(theirs, ours) == timing.Spread(2.0, 2.0, 2.5)


def test_summary_compares_with_each_reference():
    samples = {
        "ours": timing.Samples(np.array([1e-3, 1e-3]), np.array([0.0, 2.0])),
        "theirs": timing.Samples(np.array([4e-3, 4e-3]), np.array([8.0, 8.0])),
        "copy": timing.Samples(np.array([5e-4, 5e-4]), np.zeros(2)),
    }
    temporaries = {"ours": 10, "theirs": 40, "copy": 0}
    summary = timing.summarise(samples, temporaries, {"scan": "theirs", "copy": "copy"})
    assert summary["rounds"] == 2
    assert summary["contestants"]["ours"] == {
        "milliseconds": {"median": 1.0, "lower": 1.0, "upper": 1.0},
        "page_faults": 1.0,
        "temporary_bytes": 10,
        "speedup": {
            "scan": {"median": 4.0, "lower": 4.0, "upper": 4.0},
            "copy": {"median": 0.5, "lower": 0.5, "upper": 0.5},
        },
        "temporary_ratio": {"scan": 0.25, "copy": None},
    }


def test_contestants_alternate_with_one_turn_a_round():
    calls = []

    def contestant(name):
        def call():
            calls.append(name)
            return np.sin(np.ones(1_000_000))  # longer than a turn: one call a turn

        return call

    budget = timing.Budget(seconds=0, min_rounds=4, max_rounds=9)
    samples = timing.measure({"one": contestant("one"), "two": contestant("two")}, budget)
    rounds = [calls[-8:][i : i + 2] for i in range(0, 8, 2)]
    assert all(sorted(turns) == ["one", "two"] for turns in rounds)
    assert {name: len(s.seconds) for name, s in samples.items()} == {"one": 4, "two": 4}
    assert all((s.seconds > 0).all() for s in samples.values())


def test_targets_are_judged_at_the_headline_length_with_memory_kept():
    def measurement(allocator, mode, speedups, temporary):
        def contestant(speedup, temporary):
            spread = {"median": speedup, "lower": speedup, "upper": speedup}
            speedup = {"associative_scan": spread, "sequential_scan": spread}
            return {"speedup": speedup, "temporary_bytes": temporary}

        names = ("sliding_window_recurrence", "linear_recurrence", *recurrence._SCANS)
        return {
            "group": "plain",
            "tokens": recurrence.FULL.headline_tokens,
            "mode": mode,
            "allocator": allocator,
            "contestants": {
                name: contestant(*values)
                for name, values in zip(names, zip(speedups, temporary, strict=True), strict=True)
            },
        }

    judged = recurrence.targets(
        [
            measurement("default", "forward", (9, 9, 1, 1), (9, 9, 30, 60)),
            measurement("kept", "forward", (4.9, 1, 1, 1), (10, 9, 30, 60)),
            measurement("kept", "forward+backward", (3.0, 0.9, 1, 1), (11, 30, 30, 60)),
        ],
        recurrence.FULL,
    )
    assert [
        (target["required"], round(target["measured"], 3), target["met"]) for target in judged
    ] == [
        (">= 5", 4.9, False),
        (">= 1", 4.9, True),
        ("<= 0.333", 0.333, True),
        (">= 3", 3.0, True),
        (">= 1", 3.0, True),
        ("<= 0.333", 0.367, False),
        (">= 1", 0.9, False),
        ("<= 1", 1.0, True),
    ]


# Oracles of the benchmark, against those of the library


@pytest.mark.parametrize("lookback", [0, 1, None])
@pytest.mark.parametrize("tokens", [3, 16, 41])
def test_linear_memory_gradients_equal_the_dense_ones(tokens, lookback):
    random = np.random.default_rng(tokens)
    a = random.random((2, tokens, 17))  # more heads than are taken at once
    b, c, v, x_bar = random.standard_normal((4, 2, tokens, 17, 3))
    window = {"block_size": 8, "lookback": lookback}
    found = oracle.recurrence(a, v, x_bar, **window)
    expected = reference.sliding_window_gradients(a, v, x_bar, **window)
    expected["x"] = reference.sliding_window_recurrence(a, v, **window)
    for key in ("x", "a", "u"):
        np.testing.assert_allclose(found[key], expected[key], atol=1e-12)
    found = oracle.gated_recurrence(a, b, c, v, x_bar, **window)
    expected = reference.gated_gradients(a, b, c, v, x_bar, **window)
    expected["x"] = reference.gated_sliding_window_recurrence(a, b, c, v, **window)
    for key in ("x", "a", "b", "c", "v"):
        np.testing.assert_allclose(found[key], expected[key], atol=1e-12)


def test_check_names_the_contestant_the_quantity_and_the_rule():
    good, bad = np.ones(4), np.array([1.0, 1.0, 1.0, np.nan])
    with pytest.raises(
        oracle.OracleError, match=r"scan disagrees .* error of a nan; at most 1e-06"
    ):
        oracle.check("scan", {"x": good, "a": bad}, {"x": good, "a": good}, 1e-6)


# Refusal to time


@pytest.fixture
def untimed(monkeypatch):
    """Fails the test as soon as something is timed, and leaves this process's allocator alone."""

    def refuse(*args, **kwargs):
        raise AssertionError("timed although a check is red")

    monkeypatch.setattr(timing, "measure", refuse)
    monkeypatch.setattr(timing, "keep_freed_memory", lambda: False)


@jax.custom_vjp
def _wrong_gradient(a, u):
    return sliding_window_recurrence(a, u)


_wrong_gradient.defvjp(
    lambda a, u: (_wrong_gradient(a, u), (a, u)),
    lambda arrays, x_bar: (arrays[0], x_bar),
)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (functools.partial(sliding_window_recurrence, lookback=0), "40 tokens, forward disagrees"),
        (_wrong_gradient, r"40 tokens, forward\+backward disagrees .* error of a .*, u "),
    ],
    ids=["output", "gradient"],
)
def test_a_wrong_operator_is_not_timed(untimed, wrong, message):
    groups = {
        "plain": {
            "sliding_window_recurrence": recurrence.GROUPS["plain"]["sliding_window_recurrence"],
            "wrong": recurrence.Contestant(wrong, 1),
        }
    }
    with pytest.raises(oracle.OracleError, match=f"wrong, {message}"):
        list(recurrence.run(recurrence.TINY, groups=groups))


@pytest.mark.parametrize("fault", ["window", "gradient"])
def test_a_wrong_layer_is_not_timed(untimed, fault):
    def make(features, sizes):
        good = layers.make_layers(features, sizes)["sliding_window_attention"]
        apply = layers.make_layers(features, sizes)["full_attention"].apply
        if fault == "gradient":

            def apply(parameters, x):
                parameters["key"]["kernel"] = jax.lax.stop_gradient(parameters["key"]["kernel"])
                return good.apply(parameters, x)

        return {"good": good, "wrong": layers.Layer(good.parameters, apply, good.oracle)}

    quantity = "x" if fault == "window" else "gradient"
    with pytest.raises(oracle.OracleError, match=rf"wrong, 32 tokens disagrees .* {quantity}"):
        list(layers.run(layers.TINY, make=make))


# The command


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Output folder and text of one tiny run."""
    folder = tmp_path_factory.mktemp("results")
    call = _benchmark("--suite=cpu", "--tiny", f"--out={folder}")
    assert call.returncode == 0, call.stderr
    return folder, call.stdout


def _benchmark(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return subprocess.run(
        [sys.executable, str(ROOT / "experiments" / "benchmark.py"), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        check=False,
    )


@pytest.mark.parametrize(
    ("section", "groups"),
    [
        (
            "recurrence",
            [
                {"sliding_window_recurrence", "linear_recurrence"},
                {"gated_sliding_window_recurrence"},
            ],
        ),
        ("layers", [{"phalanx"}]),
    ],
)
def test_tiny_run_writes_complete_records(results, section, groups):
    folder, _ = results
    record = json.loads((folder / f"cpu_{section}.json").read_text())
    assert record["tiny"] is True
    assert set(record["environment"]) == {
        *("platform", "device", "cores", "load_average", "python", "jax", "libc", "commit"),
        *("source", "date", "command"),
    }
    assert record["environment"]["jax"] == jax.__version__
    assert "page fault" in record["protocol"]["timing"]
    sizes = {"recurrence": recurrence.TINY, "layers": layers.TINY}[section]
    measured = record["measurements"]
    for mode in ("forward", "forward+backward"):
        for tokens in sizes.tokens:
            rows = [m for m in measured if (m["mode"], m["tokens"]) == (mode, tokens)]
            names = [set(m["contestants"]) for m in rows]
            assert all(any(group <= found for found in names) for group in groups)
    references = {"recurrence": recurrence.REFERENCES, "layers": layers.REFERENCES}[section]
    for measurement in measured:
        assert measurement["relative_rms"]
        assert (
            measurement["cores_used_by_others"] is None or measurement["cores_used_by_others"] >= 0
        )
        for contestant in measurement["contestants"].values():
            time = contestant["milliseconds"]
            assert 0 < time["lower"] <= time["median"] <= time["upper"]
            assert set(contestant["speedup"]) == set(references)
            assert contestant["temporary_bytes"] >= 0
    assert bool(record["targets"]) == (section == "recurrence")


def test_records_name_no_path_of_the_machine(results):
    folder, _ = results
    for path in folder.glob("*.json"):
        text = path.read_text()
        assert str(folder.parent) not in text
        assert str(ROOT) not in text
        assert f"--out={folder.name}" in json.loads(text)["environment"]["command"]


def test_tiny_run_prints_tables_and_draws(results):
    folder, printed = results
    for name in ("sliding_window_recurrence", "linear_recurrence", "phalanx", "required"):
        assert name in printed
    for section in ("recurrence", "layers"):
        picture = (folder / f"cpu_{section}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 10_000


def test_unknown_section_is_refused():
    call = _benchmark("--suite=cpu", "--sections=speed")
    assert call.returncode == 1
    assert "--sections=speed: must be of recurrence, layers" in call.stderr


def test_models_of_a_billion_parameters_are_left_to_devices(tmp_path):
    call = _benchmark("--suite=train", "--sections=large", f"--out={tmp_path}")
    assert call.returncode == 0, call.stderr
    assert "large: left out, it needs a GPU or TPU" in call.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_they_are_compared_where_there_is_a_device(tmp_path):
    call = _benchmark("--suite=train", "--sections=large", f"--out={tmp_path}", "--tiny")
    assert call.returncode == 0, call.stderr
    measured = json.loads((tmp_path / "train_large.json").read_text())["measurements"]
    assert [set(m["contestants"]) - {"transformer++"} for m in measured] == [
        {"phalanx_hybrid"},
        {"swax"},
    ]
    for m in measured:
        numbers = list(m["parameters"].values())
        assert max(numbers) < 1.02 * min(numbers)
        assert min(m["flops"].values()) > 6 * 16 * min(numbers)
    assert (tmp_path / "train_large.png").stat().st_size > 10_000


def test_table_is_aligned():
    contestant = {
        "milliseconds": {"median": 1.0, "lower": 0.5, "upper": 12.25},
        "temporary_bytes": 2**20,
        "speedup": {"copy": {"median": 0.25, "lower": 0.2, "upper": 0.3}},
        "temporary_ratio": {"copy": None},
    }
    measurement = {"tokens": 512, "mode": "forward", "allocator": "kept"}
    rows = {**measurement, "contestants": {"a_long_name": contestant, "short": contestant}}
    header, first, second = report.table([rows], ["copy"]).splitlines()
    assert first.split() == [
        *("a_long_name", "512", "forward", "kept", "1.000", "[0.500,", "12.250]"),
        *("0.25", "[0.20,", "0.30]", "1.00", "-"),
    ]
    assert first.replace("a_long_name", "short      ") == second
    assert header.index("tokens") == first.index("512") - 3
