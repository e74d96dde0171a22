"""The TPU kernels' calls: tiling, BlockSpecs, VMEM, cost estimates.

Here v, b, c, x are [B, T, D, H], heads minor, or all [B, T, H D] in lane order; a is [B, T, H],
states are [B, D, H]. T, H are any numbers (in lane order H is a multiple of 128), and D is what
`group_features` can divide without a rest.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.swr.lane_order import LANES
from pallas_kernels.swr.mosaic_tpu_kernels import (
    SUBLANES,
    TERM_STRIDE,
    Plan,
    backward_kernel,
    forward_kernel,
)
from pallas_kernels.swr.mosaic_tpu_tokens import turned_shape
from pallas_kernels.swr.tuning_tpu import VMEM_BUDGET, TuningConfig

Array = jax.Array
Gates = tuple[Array, Array] | None


@dataclasses.dataclass(frozen=True)
class Window:
    """Arguments of the recurrence that are no arrays; see `mosaic_tpu.block_two_pass`."""

    block_size: int
    lookback: int | None
    config: TuningConfig


def group_features(features: int, config: TuningConfig, multiple: int) -> tuple[int, int]:
    """Number of feature groups and features in each, a multiple of `multiple`."""
    groups = pl.cdiv(features, config.features)
    return groups, pl.cdiv(pl.cdiv(features, groups), multiple) * multiple


def _sizes(a: Array, v: Array) -> tuple[int, int, int, int]:
    """B, T, H, D of arrays in either layout."""
    return (*a.shape, v.size // a.size)


def _token_bytes(features: int, arrays) -> int:
    """Bytes of one token in VMEM, over 128 heads, of arrays like these."""
    return sum(features * LANES * x.dtype.itemsize for x in arrays)


def _fit(tile: int, rows: int, token_bytes: int, other_bytes: int) -> int:
    """The largest power of two up to `tile` whose tokens fit VMEM beside what else is there."""
    while tile > max(16, rows) and tile * token_bytes + other_bytes > VMEM_BUDGET:
        tile //= 2
    return tile


def plans(window: Window, a: Array, v: Array, gates: Gates) -> tuple[Plan, Plan]:
    """The forward and the backward plan; the forward pass saves what the backward one starts at."""
    config, lane_order = window.config, v.ndim == 3
    _, time, _, features = _sizes(a, v)
    _, features = group_features(features, config, SUBLANES)
    arrays = (v,) if gates is None else (v, *gates)
    rows, sixteens = config.rows, pl.cdiv(time, 16)
    if any(x.dtype.itemsize == 4 for x in arrays) or (lane_order and gates is not None):
        # Loads of 32 float32 rows at once would not all find registers.
        rows = min(rows, 16)
    rows = min(rows, 16 * sixteens)
    tile = min(config.tile, 16 * (1 << (sixteens - 1).bit_length()))
    states = 2 if window.lookback == 1 else 1
    decays = LANES * (4 + 4 * a.dtype.itemsize)
    # v, gates, their gradients and the cotangent, double buffered; then scratch.
    backward = 2 * _token_bytes(features, (*arrays, *arrays, v)) + decays
    backward += 4 * LANES * states * features
    forward = 2 * _token_bytes(features, (*arrays, v)) + decays
    # What turns a chunk's tokens: v, b, c and x, or c, dv and db; and v, b and dx of a whole tile.
    turned = 4 * math.prod(turned_shape(rows, features)) if lane_order else 0
    backward += 3 * turned // rows
    interval = _fit(tile, rows, backward, len(arrays) * turned)
    plan = Plan(
        time=time,
        features=features,
        block_size=window.block_size,
        lookback=window.lookback,
        tile=_fit(tile, rows, forward, (len(arrays) + 1) * turned),
        interval=interval,
        rows=rows,
        lane_order=lane_order,
    )
    return plan, dataclasses.replace(plan, tile=interval)


def _specs(
    plan: Plan, groups: int, at: Callable
) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
    """BlockSpecs of v, of [B, T, H] and of [B, D, H]; `at` orders the tiles of time.

    The features of a group of heads are divided among `groups` programs.
    """
    tokens = pl.BlockSpec((1, plan.tile, plan.features, LANES), lambda b, h, d, t: (b, at(t), d, h))
    if plan.lane_order:
        tokens = pl.BlockSpec(
            (1, plan.tile, plan.features * LANES), lambda b, h, d, t: (b, at(t), h * groups + d)
        )
    return (
        tokens,
        pl.BlockSpec((1, plan.tile, LANES), lambda b, h, _, t: (b, at(t), h)),
        pl.BlockSpec((1, plan.features, LANES), lambda b, h, d, _: (b, d, h)),
    )


def _call(
    name: str,
    kernel: Callable,
    plan: Plan,
    a: Array,
    v: Array,
    inputs: Sequence[tuple[Array | None, pl.BlockSpec]],
    outputs: Sequence[tuple[jax.ShapeDtypeStruct | None, pl.BlockSpec]],
    scratch: Sequence[tuple[int, ...] | None],
    operations: int,
) -> tuple[Array | None, ...]:
    """Run a kernel over (batch, heads, features, time), leaving out arguments that are None.

    `operations` is their number for each feature of each token; `scratch` are float32 shapes.
    """

    def spread(refs, slots):
        return tuple(None if slot is None else next(refs) for slot in slots)

    def present(slots):
        return zip(*(slot for slot in slots if slot[0] is not None), strict=True)

    arrays, in_specs = present(inputs)
    structs, out_specs = present(outputs)
    given, wanted = ([x for x, _ in slots] for slots in (inputs, outputs))

    def body(*refs):
        refs = iter(refs)
        kernel(plan, spread(refs, given), spread(refs, wanted), spread(refs, scratch))

    batch, _, heads, features = _sizes(a, v)
    call = pl.pallas_call(
        body,
        grid=(batch, pl.cdiv(heads, LANES), features // plan.features, plan.tiles),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=structs,
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch if shape is not None],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=operations * v.size,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *structs)),
            transcendentals=0,
        ),
        name=name,
    )
    # TPUs index with 32 bits, also where a program has 64 enabled.
    with jax.enable_x64(False):
        return spread(iter(call(*arrays)), wanted)


def _turned(plan: Plan, x: Any, *chunks: int) -> tuple[int, ...] | None:
    """Scratch to turn tokens of an array like x; None where they need not be."""
    if not plan.lane_order or x is None:
        return None
    return (*chunks, *turned_shape(plan.rows, plan.features))


def _struct(v: Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    """An output that varies over the same mesh axes as v."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(v).manual_axis_type)


def forward_pass(
    window: Window,
    a: Array,
    v: Array,
    gates: Gates,
    local: Array | None,
    previous: Array | None,
    *,
    save: bool,
) -> tuple[Array, Array | None, Array | None]:
    """The forward kernel.

    Args:
        window: arguments that are no arrays.
        a, v, gates, local, previous: as `mosaic_tpu.block_two_pass_heads_minor` takes them, with
            as many gates as heads.
        save: whether a backward pass will follow.

    Returns:
        x like v; if `save`, states [B, tiles, states, D, H] that the backward pass starts
        its tiles from, float32; with `lookback=None`, the final state [B, D, H], float32.
    """
    plan, _ = plans(window, a, v, gates)
    batch, _, heads, features = _sizes(a, v)
    b, c = (None, None) if gates is None else gates
    tokens, decays, state = _specs(plan, features // plan.features, lambda t: t)
    intervals = plan.tile // plan.interval
    starts = _struct(v, (batch, plan.tiles * intervals, plan.states, features, heads))
    starts_spec = pl.BlockSpec(
        (1, intervals, plan.states, plan.features, LANES), lambda b, h, d, t: (b, t, 0, d, h)
    )
    final = _struct(v, (batch, features, heads))
    return _call(
        "swr_forward" if gates is None else "swr_gated_forward",
        forward_kernel,
        plan,
        a,
        v,
        [(a, decays), (v, tokens), (b, tokens), (c, tokens), (local, state), (previous, state)],
        [
            (_struct(v, v.shape, v.dtype), tokens),
            (starts if save else None, starts_spec),
            (final if plan.lookback is None else None, state),
        ],
        [
            (plan.tile, LANES),
            (plan.states, plan.features, LANES),
            *(_turned(plan, x) for x in (v, b, c, v)),
        ],
        operations=3 * plan.states - 1 + (0 if gates is None else 3),
    )


def backward_pass(
    window: Window,
    a: Array,
    v: Array,
    gates: Gates,
    starts: Array,
    dx: Array,
    dfinal: Array | None,
    *,
    states: tuple[bool, bool],
) -> tuple[Array | None, ...]:
    """The backward kernel.

    Args:
        window, a, v, gates: as given to `forward_pass`.
        starts: what it saved.
        dx: cotangent of x.
        dfinal: cotangent of the final state; None unless `lookback=None`.
        states: whether gradients of `local` and of `previous` are wanted.

    Returns:
        Gradients of a, v, b, c, local, previous; None for what was not there or is not wanted.
    """
    _, plan = plans(window, a, v, gates)
    batch, time, heads, features = _sizes(a, v)
    b, c = (None, None) if gates is None else gates
    groups = features // plan.features

    def at(t):
        return plan.tiles - 1 - t

    tokens, decays, state = _specs(plan, groups, at)
    starts_spec = pl.BlockSpec(
        (1, 1, plan.states, plan.features, LANES), lambda b, h, d, t: (b, at(t), 0, d, h)
    )
    da_spec = pl.BlockSpec((1, 1, plan.tile, LANES), lambda b, h, d, t: (d, b, at(t), h))
    da = _struct(v, (groups, batch, time, heads), a.dtype if groups == 1 else jnp.float32)
    dv, db, dc = (None if x is None else _struct(v, x.shape, x.dtype) for x in (v, b, c))
    dstate = _struct(v, (batch, features, heads))
    dlocal, dprevious = (dstate if wanted else None for wanted in states)
    da, *others = _call(
        "swr_backward" if gates is None else "swr_gated_backward",
        backward_kernel,
        plan,
        a,
        v,
        [
            *((a, decays), (v, tokens), (b, tokens), (c, tokens), (dx, tokens)),
            *((starts, starts_spec), (dfinal, state)),
        ],
        [
            *((da, da_spec), (dv, tokens), (db, tokens), (dc, tokens)),
            *((dlocal, state), (dprevious, state)),
        ],
        [
            (plan.tile, LANES),
            (plan.states, plan.features, LANES),
            (plan.states, plan.tile, plan.features, LANES),
            (plan.rows * TERM_STRIDE, LANES),
            *(_turned(plan, x, plan.tile // plan.rows) for x in (v, b, dx)),
            *(_turned(plan, x) for x in (c, dv, db)),
        ],
        operations=9 * plan.states - 2 + (0 if gates is None else 6),
    )
    return da[0] if groups == 1 else jnp.sum(da, axis=0).astype(a.dtype), *others
