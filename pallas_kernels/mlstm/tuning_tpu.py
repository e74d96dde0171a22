"""Tuning parameters of the TPU kernels: how work is cut up, never what is computed."""

import dataclasses

# What a kernel's buffers may take together, in bytes: below the 16 MiB that the compiler grants a
# kernel by default, with room for what does not fit registers.
VMEM_BUDGET = 13 * 1024 * 1024

LANES = 128


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How the kernels are tiled; results do not depend on it but for rounding.

    Attributes:
        heads: heads that one program has at a time, at most: its products fill the waiting time of
            one another. Fewer where they do not divide the heads or do not fit VMEM.
        tokens: of one grid step, in whole chunks; fewer where they do not fit VMEM.
        longest_chunk: tokens of a chunk at most: 128, 256 or 512. Longer ones write fewer states,
            and are predicted to take longer on every chip.
        columns: columns of a product's result that are held at a time, a multiple of 128.
    """

    heads: int = 8
    tokens: int = 512
    longest_chunk: int = 128
    columns: int = 256

    def __post_init__(self):
        if self.heads < 1:
            raise ValueError(f"heads={self.heads}: must be at least 1")
        if self.tokens < LANES:
            raise ValueError(f"tokens={self.tokens}: must be at least {LANES}")
        if self.longest_chunk not in (128, 256, 512):
            raise ValueError(f"longest_chunk={self.longest_chunk}: must be 128, 256 or 512")
        if self.columns < LANES or self.columns % LANES:
            raise ValueError(f"columns={self.columns}: must be a positive multiple of {LANES}")
