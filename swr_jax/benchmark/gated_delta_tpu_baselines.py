"""The gated delta rule: XLA's chunks have 64 tokens, eight of them prepared together."""

import jax

from pallas_kernels.gated_delta.mosaic_tpu_plan import TuningConfig, tilings
from pallas_kernels.tpu.chunks import Tiling
from swr_jax.benchmark import chunkwise_tpu_baselines as chunkwise
from swr_jax.ops import gated_delta_chunk, gated_delta_evaluation

_CHUNK = 64


def _rule(implementation: str, *arrays):
    if implementation == "xla":  # As it chooses for itself on a TPU; here it is traced on a CPU.
        group = gated_delta_evaluation.GROUP
        return gated_delta_chunk.gated_delta_rule(*arrays, chunk=_CHUNK, group=group)
    return gated_delta_evaluation.evaluate(implementation, *arrays, chunk_size=_CHUNK)


def _tilings(vmem_bytes: int, *qkv: jax.ShapeDtypeStruct) -> dict[str, Tiling]:
    return tilings(TuningConfig(vmem_bytes=vmem_bytes), *qkv)


OPERATOR = chunkwise.Operator(
    rule=_rule,
    state=lambda memory: memory,
    tilings=_tilings,
)
