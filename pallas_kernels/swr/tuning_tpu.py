"""Tuning parameters of the TPU kernels: how work is cut up, never what is computed."""

import dataclasses

# What a kernel's buffers may take together, in bytes: below the 16 MiB that the compiler grants a
# kernel by default, with room for its own scratch.
VMEM_BUDGET = 13 * 1024 * 1024


def _is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How the kernels are tiled; results do not depend on it.

    Attributes:
        tile: tokens of one grid step, a power of two of at least 16. It is halved until the
            kernel's buffers fit VMEM. The forward pass saves one state per tile for the backward.
        rows: tokens that are unrolled in the body of a loop: 16 or 32; at most 16 are where an
            array is float32.
        features: features (sublanes) that one program carries in registers, a multiple of 16; more
            of them are divided among programs, as evenly as whole registers allow.
    """

    tile: int = 256
    rows: int = 32
    features: int = 32

    def __post_init__(self):
        if not _is_power_of_two(self.tile) or self.tile < 16:
            raise ValueError(f"tile={self.tile}: must be a power of two of at least 16")
        if self.rows not in (16, 32):
            raise ValueError(f"rows={self.rows}: must be 16 or 32")
        if self.rows > self.tile:
            raise ValueError(f"rows={self.rows}: must be at most tile={self.tile}")
        if self.features < 16 or self.features % 16:
            raise ValueError(f"features={self.features}: must be a positive multiple of 16")
