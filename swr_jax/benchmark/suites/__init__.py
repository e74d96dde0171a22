"""What `experiments/benchmark.py` can run: suites of sections.

A suite is loaded when it is asked for, so that `device` needs only what it measures, wherever the
others' dependencies are missing.
"""

import importlib

from swr_jax.benchmark.suites.section import Section

__all__ = ["NAMES", "Section", "load"]

NAMES = ("cpu", "device", "decode", "train")


def load(name: str) -> dict[str, Section]:
    """The sections of one suite, by name, in the order in which they run."""
    return importlib.import_module(f"{__name__}.{name}").SECTIONS
