"""Compiled kernels are read with the schedules that their compiler writes while it works."""

import pytest


@pytest.fixture(autouse=True)
def schedules_are_written(request):
    """libtpu is told when it is loaded, once per process, so at the first test that needs it.

    It would write those of whole programs too, for minutes: they have a process of their own.
    """
    if request.node.get_closest_marker("targets") is not None:
        from pallas_kernels import targets

        targets.devices("v5e")
