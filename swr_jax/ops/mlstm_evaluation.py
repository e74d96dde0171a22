"""A validated mLSTM by each of the implementations: XLA's chunkwise form, or a kernel."""

import jax
import jax.numpy as jnp

from swr_jax.ops import mlstm_chunkwise as xla
from swr_jax.ops.dispatch import matrix_memory_kernel
from swr_jax.ops.mlstm_chunkwise import Options, State

Array = jax.Array

# Modules with a kernel `chunkwise`, imported when first used.
KERNELS = {
    "mosaic_gpu": "pallas_kernels.mlstm.mosaic_gpu",
    "mosaic_tpu": "pallas_kernels.mlstm.mosaic_tpu",
}


def evaluate(
    implementation: str,
    options: Options,
    q: Array,
    k: Array,
    v: Array,
    log_i: Array,
    log_f: Array,
    state: State,
) -> tuple[Array, State]:
    """Return what `mlstm_chunkwise.chunkwise` does, by "xla" or a key of `KERNELS`.

    Raises:
        NotImplementedError: this implementation does not cover the case.
    """
    if implementation == "xla":
        return xla.chunkwise(options, q, k, v, log_i, log_f, state)
    kernel = matrix_memory_kernel(implementation, KERNELS, options.dtype)
    dtype = jnp.result_type(q, k, v)
    h, state = kernel.chunkwise(
        *(x.astype(dtype) for x in (q, k, v)),
        log_i,
        log_f,
        tuple(state),
        chunk_size=options.chunk_size,
        stabilized=options.stabilized,
        normalized=options.normalized,
    )
    return h.astype(v.dtype), State(*state)
