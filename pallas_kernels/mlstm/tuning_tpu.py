"""Tuning parameters of the TPU kernels: how work is cut up, never what is computed."""

import dataclasses

from pallas_kernels.tpu.chip import LANES, vmem_here


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
        vmem_bytes: of VMEM that a kernel may take. Default: by the chip that is traced for.
    """

    heads: int = 8
    tokens: int = 512
    longest_chunk: int = 128
    columns: int = 256
    vmem_bytes: int = dataclasses.field(default_factory=vmem_here)

    def __post_init__(self):
        for name in ("heads", "vmem_bytes"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if self.tokens < LANES:
            raise ValueError(f"tokens={self.tokens}: must be at least {LANES}")
        if self.longest_chunk not in (128, 256, 512):
            raise ValueError(f"longest_chunk={self.longest_chunk}: must be 128, 256 or 512")
        if self.columns < LANES or self.columns % LANES:
            raise ValueError(f"columns={self.columns}: must be a positive multiple of {LANES}")
