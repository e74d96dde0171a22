"""Block two-pass recurrence for TPUs (Mosaic TPU): one pass over memory each way.

Layout: heads minor. v, b, c and x are [B, T, D, H], so that a token of 128 heads fills vector
registers, heads in lanes and features in sublanes, and its decays [B, T, H] are one row that is
spread over sublanes. The grid is (batch, heads / 128, feature groups, time); time runs in order,
its carriers stay in VMEM, and the other axes are independent, so chips of two cores divide them.

The backward pass recomputes the states of a tile of tokens from the one that the forward pass saved
at the tile's beginning: one or two float32 states per tile, 1.6 % of what the pass moves at most.

Lane order is a second layout, [B, T, H D] as a projection writes it (`lane_order`): the kernels
turn it in VMEM, and nothing is left to do around them. `Phalanx` uses it.

What costs extra otherwise, all of it outside the kernels, in XLA:
    [B, T, H, D] in and out     a transposition each way, unless XLA moves it into a neighbour
    D not a multiple of 8 (float32) or 16 (bfloat16)    padding copies
    H not a multiple of 128     lanes of the last group idle; where it saves a quarter or more, the
                                batch is folded into lanes first, [T, D, B H], a transposition
    D over `TuningConfig.features`    partial sums of da, one per group of features
    gates shared by groups of heads   are repeated; their gradients are summed
    float16                     is converted to float32 and back

Over several devices: inside `jax.shard_map`, or under a mesh with explicit axes, each device does
its own rows of the batch and heads. The TPU's compiler itself cannot split a kernel.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.distribution import refuse_automatic_axes
from pallas_kernels.swr.gradient import differentiable, repeat_heads
from pallas_kernels.swr.lane_order import LANES, fits
from pallas_kernels.swr.mosaic_tpu_calls import (
    Window,
    backward_pass,
    forward_pass,
    group_features,
)
from pallas_kernels.swr.mosaic_tpu_kernels import SUBLANES
from pallas_kernels.swr.tuning_tpu import TuningConfig

Array = jax.Array
Gates = tuple[Array, Array] | None

_SUPPORTED = ("float32", "bfloat16", "float16")


def block_two_pass(
    a: Array,
    v: Array,
    gates: Gates,
    local: Array | None,
    previous: Array | None,
    *,
    block_size: int,
    lookback: int | None,
    config: TuningConfig | None = None,
) -> tuple[Array, Array | None]:
    """`block_two_pass_heads_minor` for arrays with features minor.

    Args:
        a: decays [B, T, H].
        v: inputs [B, T, H, D].
        gates: None, or (b, c), each [B, T, K, D] with K a divisor of H.
        local, previous: None or [B, H, D].
        block_size, lookback, config: as there.

    Returns:
        x [B, T, H, D] in v's dtype, and the final state [B, H, D] or None.

    Raises:
        NotImplementedError: as there.
    """
    swap = functools.partial(jnp.swapaxes, axis1=-1, axis2=-2)
    x, final = block_two_pass_heads_minor(
        a,
        swap(v),
        None if gates is None else (swap(gates[0]), swap(gates[1])),
        None if local is None else swap(local),
        None if previous is None else swap(previous),
        block_size=block_size,
        lookback=lookback,
        config=config,
    )
    return swap(x), None if final is None else swap(final)


def block_two_pass_heads_minor(
    a: Array,
    v: Array,
    gates: Gates,
    local: Array | None,
    previous: Array | None,
    *,
    block_size: int,
    lookback: int | None,
    config: TuningConfig | None = None,
) -> tuple[Array, Array | None]:
    """Windowed linear recurrence, plain or gated, with heads in the minor axis.

    The maths is in float32, with no logarithm and no division; the gradient is exact for every
    array (reverse mode only). Results do not depend on `config`.

    Args:
        a: decays [B, T, H]; like all arrays here in float32, bfloat16 or float16.
        v: inputs [B, T, D, H].
        gates: None for x = SWR(a, v); or (b, c), each [B, T, D, K] with K a divisor of H, for
            x = SWR(a, b v) c + v, where head h uses gate h // (H / K).
        local: None or [B, D, H]: state that the first block has reached before the first token.
        previous: None or [B, D, H]: carrier of the block before the first one, decayed to the
            first token; only with `lookback=1`.
        block_size: tokens per block, a power of two; blocks start at the first token.
        lookback: previous blocks that a token sees: 0, 1, or None for all (the exact recurrence).
        config: tiling, None for the default.

    Returns:
        x [B, T, D, H] in v's dtype; with `lookback=None` the state [B, D, H] after the last token,
        float32, else None.

    Raises:
        NotImplementedError: a dtype other than the above, more previous blocks than one, a block
            size that is no power of two, no tokens, a mesh in context (`jax.set_mesh`) whose axes
            are left to the compiler.

    Source: arXiv 2512.13921, the block two-pass algorithm.
    """
    _check(a, v, gates, previous, block_size, lookback)
    if gates is not None:
        gates = tuple(repeat_heads(gate, v.shape[3], axis=3) for gate in gates)
    return _windowed(_solve, a, v, gates, local, previous, block_size, lookback, config)


def block_two_pass_lane_order(
    a: Array,
    v: Array,
    gates: Gates,
    local: Array | None,
    previous: Array | None,
    *,
    block_size: int,
    lookback: int | None,
    config: TuningConfig | None = None,
) -> tuple[Array, Array | None]:
    """`block_two_pass_heads_minor` for arrays in lane order, read and written as they lie.

    Args:
        a: decays [B, T, H], H a multiple of 128.
        v: inputs [B, T, H D] in lane order, float32 or bfloat16; D a multiple of 16 that one
            program holds, or several share evenly.
        gates: None, or (b, c), each like v.
        local, previous: None or [B, D, H].
        block_size, lookback, config: as there.

    Returns:
        x [B, T, H D] in lane order and v's dtype; the final state [B, D, H] or None.

    Raises:
        NotImplementedError: as there, or other sizes and dtypes than the above.
    """
    _check(a, v, gates, previous, block_size, lookback)
    return _windowed(_solve_lane_order, a, v, gates, local, previous, block_size, lookback, config)


def _windowed(solve, a, v, gates, local, previous, block_size, lookback, config):
    exact = lookback is None
    if not exact and block_size >= v.shape[1]:
        # One block: nothing is forgotten, and its two initial states can only add up.
        lookback = None
        local = local if previous is None else previous if local is None else local + previous
        previous = None
    window = Window(block_size, lookback, TuningConfig() if config is None else config)
    x, final = solve(window, a, v, gates, _float32(local), _float32(previous))
    return x, final if exact else None


def _float32(x: Array | None) -> Array | None:
    return None if x is None else x.astype(jnp.float32)


def _check(a, v, gates, previous, block_size, lookback) -> None:
    arrays = {"a": a, "v": v}
    if gates is not None:
        arrays |= {"b": gates[0], "c": gates[1]}
    for name, array in arrays.items():
        if array.dtype.name not in _SUPPORTED:
            raise NotImplementedError(
                f"{name} has dtype {array.dtype.name}: the TPU kernels take {', '.join(_SUPPORTED)}"
            )
    if lookback not in (0, 1, None):
        raise NotImplementedError(f"lookback={lookback}: the TPU kernels have 0, 1 and None")
    if block_size < 1 or block_size & (block_size - 1):
        raise NotImplementedError(f"block_size={block_size}: must be a power of two")
    if 0 in v.shape:
        raise NotImplementedError(
            f"v has shape {v.shape}: the TPU kernels need a size of 1 or more"
        )
    refuse_automatic_axes()
    if previous is not None and lookback != 1:
        raise NotImplementedError(
            f"previous is given with lookback={lookback}: it needs lookback=1"
        )


def _forward(window, a, v, gates, local, previous, *, save):
    """What `forward_pass` returns, for arrays of any shape."""
    folding = _Folding.of(window, v, gates)
    x, starts, final = forward_pass(
        window,
        folding.fold_decays(a),
        folding.fold(v),
        None if gates is None else tuple(map(folding.fold, gates)),
        folding.fold(local),
        folding.fold(previous),
        save=save,
    )
    return folding.unfold(x).astype(v.dtype), folding.unfold(starts), folding.unfold(final)


def _backward(window, a, v, gates, local, previous, starts, dx, dfinal):
    """The gradients of a, v, gates, local, previous, for arrays of any shape."""
    folding = _Folding.of(window, v, gates)
    da, *others = backward_pass(
        window,
        folding.fold_decays(a),
        folding.fold(v),
        None if gates is None else tuple(map(folding.fold, gates)),
        folding.fold(starts),
        folding.fold(dx),
        folding.fold(dfinal),
        states=(local is not None, previous is not None),
    )
    dv, db, dc, dlocal, dprevious = map(folding.unfold, others)
    dgates = None
    if gates is not None:
        dgates = tuple(x.astype(gate.dtype) for x, gate in zip((db, dc), gates, strict=True))
    da = folding.unfold_decays(da).astype(a.dtype)
    return da, dv.astype(v.dtype), dgates, dlocal, dprevious


def _forward_lane_order(window, a, v, gates, local, previous, *, save):
    """What `forward_pass` returns, for arrays in lane order."""
    _check_lane_order(window, a, v, gates)
    return forward_pass(window, a, v, gates, local, previous, save=save)


def _backward_lane_order(window, a, v, gates, local, previous, starts, dx, dfinal):
    """The gradients of a, v, gates, local, previous, for arrays in lane order."""
    wanted = (local is not None, previous is not None)
    da, dv, db, dc, *dstates = backward_pass(window, a, v, gates, starts, dx, dfinal, states=wanted)
    return da, dv, None if gates is None else (db, dc), *dstates


def _check_lane_order(window, a, v, gates) -> None:
    """Raise NotImplementedError unless one device's arrays can be read as they lie."""
    heads = a.shape[2]
    if not fits(heads):
        raise NotImplementedError(f"{heads} heads on a device: lane order needs a multiple of 128")
    features = v.shape[2] // heads
    if math.prod(group_features(features, window.config, 2 * SUBLANES)) != features:
        raise NotImplementedError(f"{features} features: lane order needs a multiple of 16")
    for x in (a, v, *(gates or ())):
        if x.dtype == jnp.float16:
            raise NotImplementedError("float16: lane order takes float32 and bfloat16")
    for gate in gates or ():
        if gate.shape != v.shape:
            raise NotImplementedError(
                f"gates of shape {gate.shape} for v of shape {v.shape}: they must be equal"
            )


# The TPU's compiler cannot split a kernel.
_solve = differentiable(_forward, _backward, "btdh", "bdh", automatic=False)
_solve_lane_order = differentiable(
    _forward_lane_order, _backward_lane_order, "bth", "bdh", automatic=False
)


class _Folding(NamedTuple):
    """The way between arrays of any shape and those that the kernels take, None being left alone.

    Attributes:
        batch: rows that are folded into the lanes; 0 for none.
        features: features of the caller.
        padded: features of the kernels.
    """

    batch: int
    features: int
    padded: int

    @classmethod
    def of(cls, window: Window, v: Array, gates: Gates) -> "_Folding":
        batch, _, features, heads = v.shape
        lanes, folded = batch * pl.cdiv(heads, LANES), pl.cdiv(batch * heads, LANES)
        arrays = (v,) if gates is None else (v, *gates)
        multiple = 2 * SUBLANES if any(x.dtype == jnp.bfloat16 for x in arrays) else SUBLANES
        padded = math.prod(group_features(features, window.config, multiple))
        return cls(batch if 4 * folded <= 3 * lanes else 0, features, padded)

    def fold_decays(self, x: Array) -> Array:
        """[B, T, H] -> [1, T, B H], where the batch is folded."""
        if x.dtype == jnp.float16:
            x = x.astype(jnp.float32)
        if self.batch:
            x = jnp.moveaxis(x, 0, -2)
            x = x.reshape(1, *x.shape[:-2], -1)
        return x

    def fold(self, x: Array | None) -> Array | None:
        """[B, ..., D, H] -> [1, ..., padded features, B H]."""
        if x is None:
            return None
        if self.padded != self.features:
            sizes = [(0, 0)] * (x.ndim - 2) + [(0, self.padded - self.features), (0, 0)]
            x = jnp.pad(x, sizes)
        return self.fold_decays(x)

    def unfold_decays(self, x: Array) -> Array:
        """Undo `fold_decays`, but for the dtype."""
        if self.batch:
            x = jnp.moveaxis(x[0].reshape(*x.shape[1:-1], self.batch, -1), -2, 0)
        return x

    def unfold(self, x: Array | None) -> Array | None:
        """Undo `fold`, but for the dtype."""
        return None if x is None else self.unfold_decays(x)[..., : self.features, :]
