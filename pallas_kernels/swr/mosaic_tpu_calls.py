"""The TPU kernels' calls: tiling, BlockSpecs, VMEM, cost estimates.

Everything here has heads minor: v, b, c, x [B, T, D, H], a [B, T, H], states [B, D, H]; T, H are
any numbers, and D is what `group_features` can divide without a rest.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.swr.mosaic_tpu_kernels import (
    SUBLANES,
    TERM_STRIDE,
    Plan,
    backward_kernel,
    forward_kernel,
)
from pallas_kernels.swr.tuning_tpu import LANES, VMEM_BUDGET, TuningConfig

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


def _token_bytes(features: int, arrays) -> int:
    """Bytes of one token in VMEM, over 128 heads, of arrays like these."""
    return sum(features * LANES * x.dtype.itemsize for x in arrays)


def _fit(tile: int, rows: int, token_bytes: int) -> int:
    """The largest power of two up to `tile` whose tokens fit VMEM."""
    while tile > max(16, rows) and tile * token_bytes > VMEM_BUDGET:
        tile //= 2
    return tile


def plans(window: Window, a: Array, v: Array, gates: Gates) -> tuple[Plan, Plan]:
    """The forward and the backward plan; the forward pass saves what the backward one starts at."""
    config, time = window.config, v.shape[1]
    _, features = group_features(v.shape[2], config, SUBLANES)
    arrays = (v,) if gates is None else (v, *gates)
    rows, sixteens = config.rows, pl.cdiv(time, 16)
    if any(x.dtype.itemsize == 4 for x in arrays):
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
    interval = _fit(tile, rows, backward)
    plan = Plan(
        time=time,
        features=features,
        block_size=window.block_size,
        lookback=window.lookback,
        tile=_fit(tile, rows, forward),
        interval=interval,
        rows=rows,
    )
    return plan, dataclasses.replace(plan, tile=interval)


def _specs(plan: Plan, at: Callable) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
    """BlockSpecs of [B, T, D, H], of [B, T, H] and of [B, D, H]; `at` orders the tiles of time."""
    return (
        pl.BlockSpec((1, plan.tile, plan.features, LANES), lambda b, h, d, t: (b, at(t), d, h)),
        pl.BlockSpec((1, plan.tile, LANES), lambda b, h, _, t: (b, at(t), h)),
        pl.BlockSpec((1, plan.features, LANES), lambda b, h, d, _: (b, d, h)),
    )


def _call(
    name: str,
    kernel: Callable,
    plan: Plan,
    v: Array,
    inputs: Sequence[tuple[Array | None, pl.BlockSpec]],
    outputs: Sequence[tuple[jax.ShapeDtypeStruct | None, pl.BlockSpec]],
    scratch: Sequence[tuple[int, ...]],
    operations: int,
) -> tuple[Array | None, ...]:
    """Run a kernel over (batch, heads, features, time), leaving out arguments that are None.

    `operations` is their number for each feature of each token; `scratch` are float32 shapes.
    """

    def spread(refs, slots):
        refs = iter(refs)
        return tuple(None if slot is None else next(refs) for slot, _ in slots)

    def present(slots):
        return [slot for slot in slots if slot[0] is not None]

    arrays, in_specs = zip(*present(inputs), strict=True)
    structs, out_specs = zip(*present(outputs), strict=True)

    def body(*refs):
        split, end = len(arrays), len(arrays) + len(structs)
        kernel(plan, spread(refs[:split], inputs), spread(refs[split:end], outputs), refs[end:])

    batch, _, features, heads = v.shape
    call = pl.pallas_call(
        body,
        grid=(batch, pl.cdiv(heads, LANES), features // plan.features, plan.tiles),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=structs,
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
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
        return spread(call(*arrays), outputs)


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
        x [B, T, D, H]; if `save`, states [B, tiles, states, D, H] that the backward pass starts
        its tiles from, float32; with `lookback=None`, the final state [B, D, H], float32.
    """
    plan, _ = plans(window, a, v, gates)
    batch, _, features, heads = v.shape
    b, c = (None, None) if gates is None else gates
    tokens, decays, state = _specs(plan, lambda t: t)
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
        v,
        [(a, decays), (v, tokens), (b, tokens), (c, tokens), (local, state), (previous, state)],
        [
            (_struct(v, v.shape, v.dtype), tokens),
            (starts if save else None, starts_spec),
            (final if plan.lookback is None else None, state),
        ],
        [(plan.tile, LANES), (plan.states, plan.features, LANES)],
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
    batch, time, features, heads = v.shape
    b, c = (None, None) if gates is None else gates
    groups = features // plan.features

    def at(t):
        return plan.tiles - 1 - t

    tokens, decays, state = _specs(plan, at)
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
        ],
        operations=9 * plan.states - 2 + (0 if gates is None else 6),
    )
    return da[0] if groups == 1 else jnp.sum(da, axis=0).astype(a.dtype), *others
