"""Numbers of the chip that kernels are tiled by."""

from jax.experimental.pallas import tpu as pltpu

# Lanes of a register.
LANES = 128
_MIB = 1024 * 1024


def vmem_of(capacity: int) -> int:
    """Return what a kernel may take where there are `capacity` bytes of VMEM.

    Half of it, as XLA has use for the rest, and not more than 32 MiB, which v6e and tpu7x grant by
    default; but 16 MiB, which every TPU grants, v4 all that it has.
    """
    return max(16 * _MIB, min(32 * _MIB, capacity // 2))


def vmem_here() -> int:
    """Return the same for the chip that is traced for; where that is no TPU, as for the smallest.

    There a kernel can only be simulated.
    """
    try:
        chip = pltpu.get_tpu_info()
    except ValueError:
        return vmem_of(0)
    return vmem_of(chip.vmem_capacity_bytes)


def buffer_bytes(vmem_bytes: int) -> int:
    """Return what a kernel's buffers may take together; the rest is for what fits no register."""
    return vmem_bytes * 13 // 16
