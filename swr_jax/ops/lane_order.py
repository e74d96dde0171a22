"""The windowed recurrences on arrays in lane order: what a layer calls that can write that order.

Lane order is how the TPU kernels read and write [B, T, H D] without a transposition before or after
them; `pallas_kernels.swr.lane_order` defines it.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from pallas_kernels.interpreter import simulated_platform
from pallas_kernels.swr.lane_order import fits, from_lane_order, to_lane_order
from swr_jax.ops import validation
from swr_jax.ops.dispatch import target
from swr_jax.ops.recurrence import reset_decays
from swr_jax.ops.sharded import Split, over_mesh, reach_of, split_of

__all__ = ["is_read_here", "recurrence_in_lane_order", "to_lane_order"]

Array = jax.Array
Gates = tuple[Array, Array] | None


def is_read_here(
    shape: tuple[int, int, int, int], dtype: jnp.dtype, *, block_size: int, lookback: int | None
) -> bool:
    """Whether the device at hand has a kernel that reads a call's arrays in lane order.

    Args:
        shape: (B, T, H, D) of the whole call, before a mesh in context splits it.
        dtype: of v and the gates.
        block_size, lookback: the call's window.

    Raises:
        ValueError: a window out of range.
    """
    validation.check_window(block_size, lookback)
    if target().platform != "tpu" or dtype not in (jnp.float32, jnp.bfloat16):
        return False
    if lookback not in (0, 1, None) or shape[3] % 16:
        return False
    split = _split_of(shape, block_size, lookback)
    if split is None:
        mesh = jax.sharding.get_abstract_mesh()
        alone = all(kind == AxisType.Manual for kind in mesh.axis_types)
        return fits(shape[2]) and (alone or simulated_platform() is not None)
    if split.sequence > 1 and (lookback is None or shape[1] // split.sequence % block_size):
        return False  # What is handed on would have to be transposed, or a block be completed.
    return fits(shape[2] // math.prod(split.mesh.shape[name] for name in split.heads))


def _split_of(shape, block_size: int, lookback: int | None) -> Split | None:
    return split_of(*shape[:3], reach=reach_of(block_size, lookback))


def recurrence_in_lane_order(
    a: Array,
    v: Array,
    gates: Gates,
    *,
    block_size: int,
    lookback: int | None,
    segment_ids: Array | None = None,
) -> Array:
    """`sliding_window_recurrence` of v, or the gated one, with v, gates and result in lane order.

    Only where `is_read_here` says so.

    Args:
        a: decays [B, T, H].
        v: inputs [B, T, H D] in lane order.
        gates: None, or (b, c), each like v.
        block_size, lookback, segment_ids: as the operators take them.

    Returns:
        [B, T, H D] in lane order and v's dtype.
    """
    from pallas_kernels.swr.mosaic_tpu import block_two_pass_lane_order

    if segment_ids is not None:
        a = reset_decays(a, segment_ids)
    heads = a.shape[2]
    shape = (*a.shape, v.shape[2] // heads)

    def recurrence(a: Array, v: Array, gates: Gates, carrier: Array | None) -> Array:
        previous = None if carrier is None else jnp.swapaxes(carrier, 1, 2)
        window = {"block_size": block_size, "lookback": lookback}
        return block_two_pass_lane_order(a, v, gates, None, previous, **window)[0]

    split = _split_of(shape, block_size, lookback)
    if split is None:
        return recurrence(a, v, gates, None)
    return over_mesh(
        recurrence,
        split,
        a,
        v,
        gates,
        block_size=block_size,
        lookback=lookback,
        dtype=jnp.dtype(jnp.float32),
        by_heads=from_lane_order,
    )
