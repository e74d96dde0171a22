"""Tests that compile for chips that are not there run where the compilers are installed."""

import importlib.util

import pytest

_COMPILERS = ("libtpu", "jax_cuda13_plugin", "nvidia")


def pytest_collection_modifyitems(config, items):
    if all(importlib.util.find_spec(module) is not None for module in _COMPILERS):
        return
    without = [item for item in items if item.get_closest_marker("targets") is not None]
    if without:
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if item not in without]


@pytest.fixture(autouse=True)
def schedules_are_written(request):
    """libtpu is loaded once per process, so it must be told at the first test that needs it."""
    if request.node.get_closest_marker("targets") is not None:
        from pallas_kernels import targets

        targets.devices("v5e")
