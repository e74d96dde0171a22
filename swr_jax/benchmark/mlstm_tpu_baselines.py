"""The mLSTM with exponential gates, normalised, in chunks of 128 tokens."""

import jax
import jax.numpy as jnp

from pallas_kernels.mlstm.gradient import Options
from pallas_kernels.mlstm.mosaic_tpu_plan import tilings
from pallas_kernels.mlstm.tuning_tpu import TuningConfig
from pallas_kernels.tpu.chunks import Tiling
from swr_jax.benchmark import chunkwise_tpu_baselines as chunkwise
from swr_jax.ops import mlstm_chunkwise, mlstm_evaluation

_CHUNK = 128


def _rule(implementation: str, *arrays):
    options = mlstm_chunkwise.Options(_CHUNK, True, True, jnp.dtype(jnp.float32))
    return mlstm_evaluation.evaluate(implementation, options, *arrays)


def _state(memory: jax.ShapeDtypeStruct) -> mlstm_chunkwise.State:
    shapes = (memory.shape[:3], memory.shape[:2])
    return mlstm_chunkwise.State(memory, *(memory.update(shape=shape) for shape in shapes))


def _tilings(vmem_bytes: int, *qkv: jax.ShapeDtypeStruct) -> dict[str, Tiling]:
    config = TuningConfig(vmem_bytes=vmem_bytes)
    return tilings(Options(_CHUNK, True, True, config), *qkv)


OPERATOR = chunkwise.Operator(
    rule=_rule,
    state=_state,
    tilings=_tilings,
)
