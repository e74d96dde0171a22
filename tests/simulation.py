"""Simulated accelerators for tests: unwritten memory holds NaN, and a data race is an error."""

import contextlib

from jax._src.pallas.mosaic.interpret import interpret_pallas_call as tpu_interpreter
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu


@contextlib.contextmanager
def simulated_gpu():
    """Run the Mosaic GPU kernels that are traced under it on the CPU."""
    parameters = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    try:
        with plgpu.force_gpu_interpret_mode(parameters):
            yield
        # Newer versions of JAX raise at once, older ones only remember.
        assert gpu_callbacks._races is None or not gpu_callbacks.get_races().races_found
    except BaseException:
        # What an interrupted kernel leaves behind would fail every later one.
        gpu_callbacks.reset_gpu_interpret_mode_state()
        raise


@contextlib.contextmanager
def simulated_tpu():
    """Run the Mosaic TPU kernels that are traced under it on the CPU."""
    parameters = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    try:
        with pltpu.force_tpu_interpret_mode(parameters):
            yield
        assert tpu_interpreter.races is None or not tpu_interpreter.races.races_found
    except BaseException:
        tpu_interpreter.reset_tpu_interpret_mode_state()
        raise


SIMULATED = {"mosaic_gpu": simulated_gpu, "mosaic_tpu": simulated_tpu}
