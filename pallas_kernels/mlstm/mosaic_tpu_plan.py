"""How the TPU kernels of an mLSTM cut their work up: what fits VMEM."""

import dataclasses
import functools
from typing import Any

import jax

from pallas_kernels.tpu.calls import operand_dtype, padded
from pallas_kernels.tpu.chip import LANES, buffer_bytes
from pallas_kernels.tpu.chunks import Tiling, largest

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Plan(Tiling):
    """What the bodies of the mLSTM's kernels are specialised for.

    Attributes:
        normalized: whether h is divided by max(|d|, floor), or by the floor alone.
        columns: of a product's result that are held at a time.
    """

    normalized: bool
    columns: int


def forward_bytes(plan: Tiling, *, keep: bool) -> int:
    """VMEM of the kernel of outputs, which may keep the states before chunks."""
    moved = plan.chunk * 2 * (plan.q_dim + plan.v_dim) * plan.dtype.itemsize
    if keep:
        moved += plan.q_dim * plan.v_dim * plan.dtype.itemsize + 8 * plan.q_dim * 4
    scratch = (plan.chunk * 4 + (plan.chunk + plan.q_dim) * plan.dtype.itemsize) * LANES
    return _bytes(plan, moved, 4, scratch)


def backward_bytes(plan: Tiling) -> int:
    """VMEM of the kernel of cotangents, which takes most."""
    itemsize, state = plan.dtype.itemsize, plan.q_dim * plan.v_dim
    moved = (plan.chunk * (4 * plan.q_dim + 3 * plan.v_dim) + state) * itemsize
    moved += (4 * plan.chunk + 8 * (plan.q_dim + LANES)) * 4
    scratch = (2 * plan.chunk * plan.chunk + plan.chunk * plan.q_dim) * itemsize
    scratch += (4 * plan.chunk + 2 * plan.q_dim) * LANES * 4 + 8 * plan.chunk * 4
    return _bytes(plan, moved, 4, scratch)


def _bytes(plan: Tiling, moved: int, states: int, scratch: int) -> int:
    """Of a chunk's blocks, which are there twice, of C and n in float32 and C rounded, of others.

    Gates move in every kernel, and are not counted in `moved`.
    """
    memory, normalizer = plan.q_dim * plan.v_dim, 8 * plan.q_dim
    state = states * (memory + normalizer) * 4 + memory * plan.dtype.itemsize
    return plan.heads * (plan.together * 2 * (moved + 8 * plan.chunk * 4) + state + scratch)


# Kernels by name, no name part of another, and what they take of VMEM.
FORWARD, KEEPING, BACKWARD = "mlstm_forward", "mlstm_keeping_forward", "mlstm_backward"
_VMEM_BYTES = {
    FORWARD: functools.partial(forward_bytes, keep=False),
    KEEPING: functools.partial(forward_bytes, keep=True),
    BACKWARD: backward_bytes,
}


def tiling(name: str, options: Any, q: Array, k: Array, v: Array) -> Plan:
    """How a kernel cuts its work up: as much in one grid step as fits."""
    config = options.config
    smallest = Plan(
        heads=1,
        chunks=q.shape[1] // options.chunk,
        together=1,
        chunk=options.chunk,
        q_dim=padded(q.shape[-1]),
        v_dim=padded(v.shape[-1]),
        normalized=options.normalized,
        dtype=operand_dtype(q.dtype, k.dtype, v.dtype),
        columns=config.columns,
    )
    return largest(
        smallest,
        heads=q.shape[2],
        at_a_time=config.heads,
        together=config.tokens // options.chunk,
        vmem_bytes=_VMEM_BYTES[name],
        budget=buffer_bytes(config.vmem_bytes),
    )


def tilings(options: Any, q: Array, k: Array, v: Array) -> dict[str, Plan]:
    """How each kernel cuts its work up, by its name."""
    return {name: tiling(name, options, q, k, v) for name in _VMEM_BYTES}
