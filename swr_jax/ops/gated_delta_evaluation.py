"""A validated gated delta rule by each of the implementations: XLA's chunks, or a kernel."""

import jax

from swr_jax.ops import gated_delta_chunk as xla
from swr_jax.ops.dispatch import matrix_memory_kernel, target

Array = jax.Array

# Chunks prepared together on accelerators; a CPU is fastest, and leanest, with one at a time. For
# TPUs the compiler estimates half the cycles of one at a time.
GROUP = 8

# Modules with a kernel `gated_delta_rule`, imported when first used: Pallas takes long to import.
KERNELS = {
    "mosaic_gpu": "pallas_kernels.gated_delta.mosaic_gpu",
    "mosaic_tpu": "pallas_kernels.gated_delta.mosaic_tpu",
}


def evaluate(
    implementation: str,
    q: Array | None,
    k: Array,
    v: Array,
    alpha: Array,
    beta: Array,
    memory: Array,
    *,
    chunk_size: int,
) -> tuple[Array | None, Array]:
    """Return o [B, T, H, Dv], None without q, and the memory after the last token.

    Args:
        implementation: "xla" or a key of `KERNELS`.
        q, k, v, alpha, beta: as `gated_delta_rule` takes them, resets in alpha; or no q.
        memory: [B, H, Dk, Dv] before the first token, in the dtype of the maths.
        chunk_size: of XLA's form; kernels have chunks of their own.

    Raises:
        NotImplementedError: this implementation does not cover the case.
    """
    if implementation == "xla":
        chunk = min(chunk_size, 1 << (k.shape[1] - 1).bit_length())
        group = 1 if target().platform == "cpu" else GROUP
        return xla.gated_delta_rule(q, k, v, alpha, beta, memory, chunk=chunk, group=group)
    kernel = matrix_memory_kernel(implementation, KERNELS, memory.dtype)
    read = k if q is None else q
    o, memory = kernel.gated_delta_rule(read, k, v, alpha, beta, memory)
    return None if q is None else o, memory
