"""Numbers of the chip that kernels with tensor cores are tiled by."""

import jax
import jax.numpy as jnp

# Tokens, and columns of v, that a tile has; rows of one tensor core instruction.
TILE = 64
# Shared memory of one thread block, less what barriers and alignment take, in bytes.
SHARED_MEMORY = 232448 - 1792
# Streaming multiprocessors of an H100 or H200 (SXM), where nothing says otherwise.
MULTIPROCESSORS = 132


def multiprocessors_here() -> int:
    """Return how many the chip has that is traced for: of the mesh in context, or by default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None and device.num_cores:
        return device.num_cores
    device = jax.config.jax_default_device or jax.devices()[0]
    return getattr(device, "core_count", None) or MULTIPROCESSORS


def fills(thread_blocks: int, multiprocessors: int) -> bool:
    """Return whether they leave no more than an eighth of the chip without a thread block."""
    return thread_blocks >= multiprocessors * 7 // 8


def check_dtype(name: str, x: jax.Array) -> None:
    """Raise NotImplementedError for an array in another dtype than the kernels multiply in."""
    if x.dtype != jnp.bfloat16:
        raise NotImplementedError(
            f"{name}.dtype={x.dtype}: the tensor cores would round it; the kernels take bfloat16"
        )
