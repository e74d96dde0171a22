"""A simulated GPU for tests: unwritten memory holds NaN, and a data race is an error."""

import contextlib

from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu


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
