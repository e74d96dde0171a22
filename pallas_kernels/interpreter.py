"""Which chip JAX's Pallas interpreters simulate at present.

`plgpu.force_gpu_interpret_mode()` and `pltpu.force_tpu_interpret_mode()` make every Pallas kernel
that is traced under them run on the CPU, memory spaces, barriers and asynchronous copies included.
"""

from jax._src import config  # JAX has no public way to ask.


def simulated_platform() -> str | None:
    """Return "gpu" or "tpu" where kernels that are traced now will be simulated, else None."""
    parameters = config.pallas_tpu_interpret_mode_context_manager.value
    if parameters is None:
        return None
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return "gpu" if isinstance(parameters, plgpu.InterpretGPUParams) else "tpu"
