"""Simulated accelerators for tests: unwritten memory holds NaN, and a data race is an error."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as tpu_interpreter
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as gpu_interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

CHECKED = {"detect_races": True, "uninitialized_memory": "nan"}


@contextlib.contextmanager
def simulated_gpu():
    """Run the Mosaic GPU kernels that are traced under it on the CPU."""
    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(**CHECKED)):
            yield
        jax.effects_barrier()  # Kernels may still be running.
        assert_no_race(gpu_interpreter._races)
    finally:
        # What an interrupted kernel leaves behind would fail every later one.
        gpu_interpreter.reset_gpu_interpret_mode_state()


@contextlib.contextmanager
def simulated_tpu(cores=1):
    """Run the Mosaic TPU kernels that are traced under it on the CPU."""
    parameters = pltpu.InterpretParams(**CHECKED, num_cores_or_threads=cores)
    try:
        with pltpu.force_tpu_interpret_mode(parameters):
            yield
        jax.effects_barrier()
        assert_no_race(tpu_interpreter.races)
    finally:
        tpu_interpreter.reset_tpu_interpret_mode_state()


def assert_no_race(races):
    """Newer versions of JAX raise at once, older ones only remember."""
    assert races is None or not races.races_found


SIMULATED = {"mosaic_gpu": simulated_gpu, "mosaic_tpu": simulated_tpu}


def in_own_process(module, function, *arguments, **options):
    """Call a function of a test module in a process whose XLA has one thread for an operation.

    The interpreter's warpgroups wait for each other on XLA's threads, and operations that spread
    over several would leave too few.
    """
    tests = Path(__file__).parent
    flags = "--xla_force_host_platform_device_count=8 --xla_cpu_multi_thread_eigen=false "
    flags += "--xla_backend_optimization_level=0"
    environment = os.environ | {
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join((str(tests), str(tests / "pallas_kernels"))),
    }
    code = f"import {module} as t; t.{function}(*{arguments!r}, **{options!r})"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=tests.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
