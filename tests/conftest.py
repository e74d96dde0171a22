"""Shared test set-up: eight fake CPU devices, so that meshes and sharding are testable anywhere.

Tests that compile for chips that are not there run where the compilers are installed.
"""

import importlib.util
import os

# Tests compile much and compute little: it would not pay to optimize code for the CPU.
_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)
# JAX reads XLA_FLAGS once, when its first backend starts, so this precedes every import of jax.
os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *_FLAGS)).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

_COMPILERS = ("libtpu", "jax_cuda13_plugin", "nvidia")


def pytest_collection_modifyitems(config, items):
    if all(importlib.util.find_spec(module) is not None for module in _COMPILERS):
        return
    without = [item for item in items if item.get_closest_marker("targets") is not None]
    if without:
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if item not in without]
