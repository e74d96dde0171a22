"""Section `check`: it passes what is right, in every backend, and finds what is wrong."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swr_jax.benchmark.device import check, check_recurrence, platform
from swr_jax.benchmark.device.check_mlstm import Cell
from swr_jax.benchmark.device.check_recurrence import Recurrence
from swr_jax.benchmark.records import Session
from swr_jax.ops import reference as ref
from swr_jax.ops import sliding_window_recurrence

SMALL = Recurrence((1, 18, 2, 8), gated=False, lookback=1, dtypes=("float32",))
XLA = (platform.Backend("xla"),)


def run(monkeypatch, *cases, backends=XLA):
    monkeypatch.setattr(platform, "backends", lambda: backends)
    return list(check.run(check.Sizes(cases), Session({"measurements": []})))


@pytest.mark.parametrize("name", ["mosaic_gpu", "mosaic_tpu"])
def test_simulated_kernels_pass(monkeypatch, name):
    backend = platform.Backend(name, simulated=True)
    (found,) = run(monkeypatch, SMALL, backends=(backend,))
    assert found["fault"] is None
    assert set(found["errors"]) == {"forward", "forward+backward"}
    assert set(found["errors"]["forward+backward"]) == {"x", "a", "v"}
    worst = max(max(errors.values()) for errors in found["errors"].values())
    assert 0 < worst < 1e-6


@pytest.mark.parametrize("name", ["mosaic_tpu", "xla"])
def test_a_cell_passes(monkeypatch, name):
    backend = platform.Backend(name, simulated=name != "xla")
    case = Cell((1, 130, 2, 8, 16), packed=True, dtypes=("float32",))
    (found,) = run(monkeypatch, case, backends=(backend,))
    assert found["fault"] is None
    assert set(found["errors"]["forward+backward"]) == {"x", "q", "k", "v", "i", "f"}
    worst = max(max(errors.values()) for errors in found["errors"].values())
    assert 0 < worst < 1e-5


@pytest.mark.parametrize(("gated", "lookback"), [(True, 1), (False, None)])
def test_states_and_documents_pass(monkeypatch, gated, lookback):
    case = Recurrence((2, 37, 3, 8), gated, lookback, dtypes=("float32",), packed=True)
    (found,) = run(monkeypatch, case)
    assert found["fault"] is None
    gradients = {"a", "v", "local"} | ({"b", "c"} if gated else set())
    gradients |= {"carriers"} if lookback else set()
    assert set(found["errors"]["forward+backward"]) == {"x"} | gradients


def test_every_case_of_a_device_has_an_oracle():
    """Those of the full sizes, cut down: nothing of them is left to be found out there."""
    sizes = {}
    for case in check_recurrence.FULL:
        batch, tokens, heads, features = case.shape
        shape = (batch, tokens % 97 + 20, min(heads, 3), min(features, 8))
        small = dataclasses.replace(case, shape=shape, dtypes=("float32",), lane_order=False)
        sizes[small] = small.draw()
    for case, arrays in sizes.items():
        expected = case.expect(arrays)
        assert set(expected) >= {"x", *case.arguments}
        for name in case.arguments:
            assert expected[name].shape == arrays[name].shape
        window = {"block_size": case.block_size, "lookback": case.lookback}
        if case.packed:
            continue  # Its oracle is the dense operator itself.
        given = [arrays[name] for name in case.arguments]
        dense = ref.gated_sliding_window_recurrence if case.gated else ref.sliding_window_recurrence
        np.testing.assert_allclose(expected["x"], dense(*given, **window), atol=1e-12)


def test_inputs_are_exact_in_both_low_precisions():
    arrays = Recurrence((2, 40, 3, 8), gated=True, lookback=1).draw()
    for name in ("a", "b", "c", "v", "x_bar"):
        for dtype in ("bfloat16", "float16"):
            lowered = np.asarray(jnp.asarray(arrays[name], dtype), np.float32)
            np.testing.assert_array_equal(lowered, arrays[name])
        assert len(np.unique(arrays[name])) > 50


@jax.custom_vjp
def _wrong_gradient(a, u):
    return sliding_window_recurrence(a, u)


_wrong_gradient.defvjp(
    lambda a, u: (_wrong_gradient(a, u), (a, u)), lambda arrays, x_bar: (arrays[0], x_bar)
)


def raising(*arrays, **options):
    raise NotImplementedError("no such kernel")


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        (functools.partial(sliding_window_recurrence, lookback=0), "error of a forward"),
        (lambda a, u: _wrong_gradient(a, u), r"error of (a|v) forward\+backward"),
        (lambda a, u: sliding_window_recurrence(a, u).at[0, 3, 0, 0].set(jnp.nan), ": inf"),
        (raising, "NotImplementedError: no such kernel"),
    ],
    ids=["window", "gradient", "NaN", "error"],
)
def test_a_wrong_kernel_is_red(monkeypatch, wrong, fault):
    monkeypatch.setattr(
        check_recurrence, "sliding_window_recurrence", lambda *arrays, **_: wrong(*arrays)
    )
    (found,) = run(monkeypatch, SMALL)
    assert re.search(fault, found["fault"])
    assert check.faults({"measurements": [found]}) == [f"{found['case']}: {found['fault']}"]


def test_what_was_checked_is_not_checked_again(monkeypatch):
    (found,) = run(monkeypatch, SMALL)
    session = Session({"measurements": [found]})
    monkeypatch.setattr(check, "judge", None)
    assert list(check.run(check.Sizes((SMALL,)), session)) == []
