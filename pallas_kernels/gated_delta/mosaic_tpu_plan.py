"""How the TPU kernels of the gated delta rule cut their work up: what fits VMEM."""

import dataclasses
import functools

import jax
from jax.experimental import pallas as pl

from pallas_kernels.gated_delta.mosaic_tpu_chunk import CHUNK
from pallas_kernels.tpu.calls import operand_dtype, padded
from pallas_kernels.tpu.chip import buffer_bytes, vmem_here
from pallas_kernels.tpu.chunks import Tiling, largest

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How the kernels are tiled; results do not depend on it.

    Attributes:
        heads: heads that one program has at a time, at most: its products fill the waiting time of
            one another. Fewer where they do not divide the heads or do not fit VMEM.
        together: chunks of one grid step, at most; fewer where they do not fit VMEM.
        vmem_bytes: of VMEM that a kernel may take. Default: by the chip that is traced for.
    """

    heads: int = 8
    together: int = 4
    vmem_bytes: int = dataclasses.field(default_factory=vmem_here)

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")


def forward_bytes(plan: Tiling, *, keep: bool) -> int:
    """VMEM of the kernel of outputs, which may keep the states before chunks."""
    q_dim, v_dim = plan.q_dim, plan.v_dim
    moved = CHUNK * 2 * (q_dim + v_dim) * plan.dtype.itemsize + 8 * CHUNK * 4
    if keep:
        moved += q_dim * v_dim * 4
    return _bytes(plan, moved, 2 * CHUNK * (2 * CHUNK + q_dim + v_dim))


def backward_bytes(plan: Tiling) -> int:
    """VMEM of the kernel of cotangents, which takes most."""
    q_dim, v_dim = plan.q_dim, plan.v_dim
    moved = CHUNK * (4 * q_dim + 3 * v_dim) * plan.dtype.itemsize + q_dim * v_dim * 4
    moved += 2 * 8 * CHUNK * 4
    return _bytes(plan, moved, CHUNK * (10 * CHUNK + 4 * q_dim + 6 * v_dim))


def _bytes(plan: Tiling, moved: int, values: int) -> int:
    """Of a chunk's blocks and of states, which are there twice, and of what fits no register.

    Of these there are twice as many where products of float32 are made in parts.
    """
    states = 4 * plan.q_dim * plan.v_dim * 4
    return plan.heads * (plan.together * 2 * moved + states + values * 2 * plan.dtype.itemsize)


# Kernels by name, no name part of another, and what they take of VMEM.
FORWARD, KEEPING = "gated_delta_forward", "gated_delta_keeping_forward"
BACKWARD = "gated_delta_backward"
_VMEM_BYTES = {
    FORWARD: functools.partial(forward_bytes, keep=False),
    KEEPING: functools.partial(forward_bytes, keep=True),
    BACKWARD: backward_bytes,
}


def tiling(name: str, config: TuningConfig, q: Array, k: Array, v: Array) -> Tiling:
    """How a kernel cuts its work up: as much in one grid step as fits."""
    return largest(
        Tiling(
            heads=1,
            chunks=pl.cdiv(q.shape[1], CHUNK),
            together=1,
            chunk=CHUNK,
            q_dim=padded(q.shape[-1]),
            v_dim=padded(v.shape[-1]),
            dtype=operand_dtype(q.dtype, k.dtype, v.dtype),
        ),
        heads=q.shape[2],
        at_a_time=config.heads,
        together=config.together,
        vmem_bytes=_VMEM_BYTES[name],
        budget=buffer_bytes(config.vmem_bytes),
    )


def tilings(config: TuningConfig, q: Array, k: Array, v: Array) -> dict[str, Tiling]:
    """How each kernel cuts its work up, by its name."""
    return {name: tiling(name, config, q, k, v) for name in _VMEM_BYTES}
