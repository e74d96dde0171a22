"""Block two-pass recurrence for TPUs (Mosaic TPU): one pass over memory each way.

Layout: heads minor. v, b, c and x are [B, T, D, H], so that a token of 128 heads fills vector
registers, heads in lanes and features in sublanes, and its decays [B, T, H] are one row that is
spread over sublanes. The grid is (batch, heads / 128, feature groups, time); time runs in order, its
carriers stay in VMEM, and the other axes are independent, so chips of two cores divide them.

The backward pass recomputes the states of a tile of tokens from the one that the forward pass saved
at the tile's beginning: one or two float32 states per tile, 1.6 % of what the pass moves at most.

What costs extra, all of it outside the kernels, in XLA:
    [B, T, H, D] in and out     a transposition each way, unless XLA moves it into a neighbour
    D not a multiple of 8 (float32) or 16 (bfloat16)    padding copies
    H not a multiple of 128     lanes of the last group idle; where it saves a quarter or more, the
                                batch is folded into lanes first, [T, D, B H], a transposition
    D over `TuningConfig.features`    partial sums of da, one per group of features
    gates shared by groups of heads   are repeated; their gradients are summed
    float16                     is converted to float32 and back
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.swr.mosaic_tpu_kernels import SUBLANES, Plan, backward_kernel, forward_kernel
from pallas_kernels.swr.tuning_tpu import LANES, VMEM_BUDGET, TuningConfig

Array = jax.Array
Gates = tuple[Array, Array] | None

_SUPPORTED = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class _Window:
    """Arguments of the recurrence that are no arrays."""

    block_size: int
    lookback: int | None
    config: TuningConfig


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
            size that is no power of two, no tokens.

    Source: arXiv 2512.13921, the block two-pass algorithm.
    """
    _check(a, v, gates, previous, block_size, lookback)
    batch, time, features, heads = v.shape
    config = TuningConfig() if config is None else config
    exact = lookback is None
    if not exact and block_size >= time:
        # One block: nothing is forgotten, and its two initial states can only add up.
        lookback = None
        local = local if previous is None else previous if local is None else local + previous
        previous = None
    window = _Window(block_size, lookback, config)

    dtype = v.dtype
    if gates is not None:
        gates = tuple(jnp.repeat(gate, heads // gate.shape[3], axis=3) for gate in gates)
    fold = _fold_batch(batch, heads)
    prepare = functools.partial(_prepare, fold=fold, features=_padded_features(v, gates, config))
    x, final = _recurrence(
        window,
        _wide_enough(a.transpose(1, 0, 2).reshape(1, time, -1) if fold else a),
        prepare(v),
        None if gates is None else tuple(prepare(gate) for gate in gates),
        None if local is None else prepare(local[:, None].astype(jnp.float32))[:, 0],
        None if previous is None else prepare(previous[:, None].astype(jnp.float32))[:, 0],
    )
    restore = functools.partial(_restore, batch=batch if fold else None, features=features)
    final = restore(final[:, None])[:, 0] if exact else None
    return restore(x).astype(dtype), final


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
        raise NotImplementedError(f"v has shape {v.shape}: the TPU kernels need a size of 1 or more")
    if previous is not None and lookback != 1:
        raise NotImplementedError(f"previous is given with lookback={lookback}: it needs lookback=1")


def _fold_batch(batch: int, heads: int) -> bool:
    """Whether folding the batch into the lanes saves a quarter of them or more."""
    return 4 * pl.cdiv(batch * heads, LANES) <= 3 * batch * pl.cdiv(heads, LANES)


def _group(features: int, config: TuningConfig, multiple: int) -> tuple[int, int]:
    """Number of feature groups and features in each, a multiple of `multiple`."""
    groups = pl.cdiv(features, config.features)
    return groups, pl.cdiv(pl.cdiv(features, groups), multiple) * multiple


def _padded_features(v: Array, gates: Gates, config: TuningConfig) -> int:
    arrays = (v,) if gates is None else (v, *gates)
    multiple = 2 * SUBLANES if any(x.dtype == jnp.bfloat16 for x in arrays) else SUBLANES
    return math.prod(_group(v.shape[2], config, multiple))


def _wide_enough(x: Array) -> Array:
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x


def _prepare(x: Array, *, fold: bool, features: int) -> Array:
    """[B, T, D, H] as the kernels take it: folded into [1, T, D, B H], features padded."""
    x = _wide_enough(x)
    if fold:
        x = x.transpose(1, 2, 0, 3).reshape(1, x.shape[1], x.shape[2], -1)
    if features != x.shape[2]:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, features - x.shape[2]), (0, 0)))
    return x


def _restore(x: Array, *, batch: int | None, features: int) -> Array:
    """Undo `_prepare`; `batch` is None where nothing was folded."""
    x = x[:, :, :features]
    if batch is not None:
        x = x.reshape(x.shape[1], features, batch, -1).transpose(2, 0, 1, 3)
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(window: _Window, a, v, gates, local, previous):
    x, _, final = _forward_call(window, a, v, gates, local, previous, save=False)
    return x, final


def _recurrence_forward(window, a, v, gates, local, previous):
    x, starts, final = _forward_call(window, a, v, gates, local, previous, save=True)
    return (x, final), (a, v, gates, local is None, previous is None, starts)


def _recurrence_backward(window, residuals, cotangents):
    a, v, gates, no_local, no_previous, starts = residuals
    da, dv, db, dc, dlocal, dprevious = _backward_call(
        window, a, v, gates, starts, *cotangents, states=(not no_local, not no_previous)
    )
    return da, dv, None if gates is None else (db, dc), dlocal, dprevious


_recurrence.defvjp(_recurrence_forward, _recurrence_backward)


def _token_bytes(features: int, arrays) -> int:
    """Bytes of one token in VMEM, over 128 heads, of arrays like these."""
    return sum(features * LANES * x.dtype.itemsize for x in arrays)


def _fit(tile: int, rows: int, token_bytes: int) -> int:
    """The largest power of two up to `tile` whose tokens fit VMEM."""
    while tile > max(16, rows) and tile * token_bytes > VMEM_BUDGET:
        tile //= 2
    return tile


def _plans(window: _Window, a: Array, v: Array, gates: Gates) -> tuple[Plan, Plan]:
    """The forward and the backward plan; the forward pass saves what the backward one starts at."""
    config = window.config
    groups, features = _group(v.shape[2], config, SUBLANES)
    if groups * features != v.shape[2]:
        raise AssertionError(f"{v.shape[2]} features do not divide into {groups} groups")
    time = v.shape[1]
    rows = min(config.rows, 16 * pl.cdiv(time, 16))
    tile = min(config.tile, 16 * (1 << (pl.cdiv(time, 16) - 1).bit_length()))
    states = 2 if window.lookback == 1 else 1
    arrays = (v,) if gates is None else (v, *gates)
    decays = LANES * (4 + 4 * a.dtype.itemsize)
    # v, gates, their gradients and the cotangent, double buffered; then scratch.
    backward = 2 * _token_bytes(features, (*arrays, *arrays, v)) + decays
    backward += 4 * LANES * (states * features + SUBLANES)
    forward = 2 * _token_bytes(features, (*arrays, v)) + decays
    interval = _fit(tile, rows, backward)
    plan = Plan(
        time=time,
        features=features,
        block_size=window.block_size,
        lookback=window.lookback,
        gated=gates is not None,
        tile=_fit(tile, rows, forward),
        interval=interval,
        rows=rows,
    )
    return plan, dataclasses.replace(plan, tile=interval)


def _blocks(plan: Plan, reverse: bool):
    """BlockSpecs: of [B, T, D, H], of decays [B, T, H], of states [B, D, H]."""

    def at(t):
        return plan.tiles - 1 - t if reverse else t

    tokens = pl.BlockSpec(
        (1, plan.tile, plan.features, LANES), lambda b, h, d, t: (b, at(t), d, h)
    )
    decays = pl.BlockSpec((1, plan.tile, LANES), lambda b, h, d, t: (b, at(t), h))
    state = pl.BlockSpec((1, plan.features, LANES), lambda b, h, d, t: (b, d, h))
    return tokens, decays, state


def _call(name, kernel, plan, reverse, v, inputs, in_specs, outputs, out_specs, scratch, flops):
    """Run a kernel over (batch, heads, features, time), leaving out arguments that are None."""
    present_in = [x is not None for x in inputs]
    present_out = [x is not None for x in outputs]

    def keep(items, present):
        return [item for item, here in zip(items, present, strict=True) if here]

    def spread(refs, present):
        refs = iter(refs)
        return tuple(next(refs) if here else None for here in present)

    def body(*refs):
        split = sum(present_in)
        end = split + sum(present_out)
        kernel(
            plan, spread(refs[:split], present_in), spread(refs[split:end], present_out), refs[end:]
        )

    batch, _, features, heads = v.shape
    manual = jax.typeof(v).manual_axis_type
    outputs_present = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=manual)
        for x in keep(outputs, present_out)
    ]
    arrays = (*keep(inputs, present_in), *outputs_present)
    results = pl.pallas_call(
        body,
        grid=(batch, pl.cdiv(heads, LANES), features // plan.features, plan.tiles),
        in_specs=keep(in_specs, present_in),
        out_specs=keep(out_specs, present_out),
        out_shape=outputs_present,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops * v.size,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
            transcendentals=0,
        ),
        name=name,
    )(*keep(inputs, present_in))
    return spread(results, present_out)


def _forward_call(window, a, v, gates, local, previous, *, save: bool):
    plan, backward_plan = _plans(window, a, v, gates)
    batch, _, features, heads = v.shape
    b, c = (None, None) if gates is None else gates
    tokens, decays, state = _blocks(plan, reverse=False)
    per_tile = plan.tile // plan.interval
    starts = final = None
    if save:
        count = plan.tiles * per_tile
        starts = jax.ShapeDtypeStruct((batch, count, plan.states, features, heads), jnp.float32)
    if plan.lookback is None:
        final = jax.ShapeDtypeStruct((batch, features, heads), jnp.float32)
    starts_spec = pl.BlockSpec(
        (1, per_tile, plan.states, plan.features, LANES), lambda b, h, d, t: (b, t, 0, d, h)
    )
    return _call(
        "swr_forward" if gates is None else "swr_gated_forward",
        forward_kernel,
        plan,
        False,
        v,
        (a, v, b, c, local, previous),
        (decays, tokens, tokens, tokens, state, state),
        (jax.ShapeDtypeStruct(v.shape, v.dtype), starts, final),
        (tokens, starts_spec, state),
        [
            pltpu.VMEM((plan.tile, LANES), jnp.float32),
            pltpu.VMEM((plan.states, plan.features, LANES), jnp.float32),
        ],
        flops=2 * plan.states + (0 if gates is None else 3),
    )


def _backward_call(window, a, v, gates, starts, dx, dfinal, *, states: tuple[bool, bool]):
    _, plan = _plans(window, a, v, gates)
    batch, time, features, heads = v.shape
    b, c = (None, None) if gates is None else gates
    tokens, decays, state = _blocks(plan, reverse=True)
    groups = features // plan.features

    def like(x):
        return None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype)

    starts_spec = pl.BlockSpec(
        (1, 1, plan.states, plan.features, LANES),
        lambda b, h, d, t: (b, plan.tiles - 1 - t, 0, d, h),
    )
    da_spec = pl.BlockSpec(
        (1, 1, plan.tile, LANES), lambda b, h, d, t: (d, b, plan.tiles - 1 - t, h)
    )
    da = jax.ShapeDtypeStruct(
        (groups, batch, time, heads), a.dtype if groups == 1 else jnp.float32
    )
    initial = jax.ShapeDtypeStruct((batch, features, heads), jnp.float32)
    dlocal, dprevious = (initial if there else None for there in states)
    da, *others = _call(
        "swr_backward" if gates is None else "swr_gated_backward",
        backward_kernel,
        plan,
        True,
        v,
        (a, v, b, c, dx, starts, dfinal),
        (decays, tokens, tokens, tokens, tokens, starts_spec, state),
        (da, like(v), like(b), like(c), dlocal, dprevious),
        (da_spec, tokens, tokens, tokens, state, state),
        [
            pltpu.VMEM((plan.tile, LANES), jnp.float32),
            pltpu.VMEM((plan.states, plan.features, LANES), jnp.float32),
            pltpu.VMEM((plan.states, plan.tile, plan.features, LANES), jnp.float32),
            pltpu.VMEM((plan.tile * SUBLANES, LANES), jnp.float32),
        ],
        flops=6 * plan.states + (0 if gates is None else 6),
    )
    da = da[0] if groups == 1 else jnp.sum(da, axis=0).astype(a.dtype)
    return da, *others
