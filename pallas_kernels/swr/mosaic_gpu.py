"""The block two-pass recurrence on Hopper GPUs: arrays in, arrays out, exact gradients.

`mosaic_gpu_kernels` has the kernels and their notation. Here are their one entry point, its
gradient, and the way from the shapes of the caller to those of the kernels: features are cut into
heads of 16 (or 8) that share a decay, and what TMA cannot address (decays whose row is no multiple
of 16 bytes, fewer than 16 tokens or 8 heads) is padded.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper.chip import multiprocessors_here
from pallas_kernels.interpreter import simulated_platform
from pallas_kernels.swr import mosaic_gpu_kernels as kernels
from pallas_kernels.swr.gradient import differentiable, repeat_heads
from pallas_kernels.swr.mosaic_gpu_pipeline import Problem
from pallas_kernels.swr.tuning import (
    LONGEST_BLOCK,
    SUBBLOCK,
    TuningConfig,
    default_config,
)

Array = jax.Array
Gates = tuple[Array, Array] | None

DTYPES = ("float32", "bfloat16", "float16")
THREADS = 128


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
    """Return the recurrence x = SWR(a, v), or the gated one x = SWR(a, b v) c + v.

    The maths is in float32, free of logarithms and divisions. Differentiable in reverse mode in
    every array argument. Gates that are shared by groups of heads are repeated in memory first.
    Source: arXiv 2512.13921.

    Args:
        a: decays [B, T, H]; float32, bfloat16 or float16, as every other array.
        v: inputs [B, T, H, D], D a multiple of 8.
        gates: None, or (b, c), each [B, T, K, D], K a divisor of H; head h uses h // (H / K).
        local: state [B, H, D], float32, that the first block has reached before the first token;
            None for zero.
        previous: carrier [B, H, D], float32, of the block before the first one, decayed up to the
            first token; None for zero. Only with lookback 1.
        block_size: tokens in a block: 16, 32, 64 or 128. With lookback None it means nothing.
        lookback: 0, 1, or None for the exact recurrence.
        config: how the work is tiled; None for the default.

    Returns:
        x [B, T, H, D] in v's dtype; and, for lookback None, the state after the last token,
        [B, H, D] float32, else None.

    Raises:
        NotImplementedError: a dtype, D, block_size or lookback that the kernels do not cover.
        ValueError: `previous` without lookback 1, or a config whose tiles do not fit the problem.
    """
    heads, features = v.shape[2:]
    arrays = {"a": a, "v": v}
    if gates is not None:
        arrays |= {"b": gates[0], "c": gates[1]}
    _check_support(arrays, features, block_size, lookback)
    if previous is not None and lookback != 1:
        raise ValueError(f"previous is given with {lookback=}: only lookback 1 has a carrier")

    if gates is not None:
        gates = tuple(repeat_heads(x, heads, axis=2) for x in gates)
    options = _Options(SUBBLOCK if lookback is None else block_size, lookback, config)
    return _solve(options, a, v, gates, local, previous)


def default_problem(
    a: Array, v: Array, gates: Gates, *, block_size: int, lookback: int | None
) -> Problem:
    """Return what the kernels would be asked to do, for arrays (or shapes) without a state."""
    return _Folding(_Options(block_size, lookback, None), a, v, gates, False).problem


def tuning_key(
    a: Array, v: Array, gates: Gates, *, block_size: int, lookback: int | None
) -> tuple[int, int, int]:
    """Return where `tuning.MEASURED` has the tiling for arrays (or shapes) without a state."""
    options = _Options(SUBBLOCK if lookback is None else block_size, lookback, None)
    stage = _Folding(options, a, v, gates, False).stage(a, v, gates)
    return stage["halo"], stage["forward_bytes"], stage["backward_bytes"]


def _check_support(
    arrays: dict[str, Array], features: int, block_size: int, lookback: int | None
) -> None:
    for name, x in arrays.items():
        if x.dtype.name not in DTYPES:
            raise NotImplementedError(f"{name}.dtype={x.dtype}: the kernels take {DTYPES}")
    if features % 8:
        raise NotImplementedError(
            f"D={features}: the kernels need a multiple of 8 features, 16 bytes of 16 bits each"
        )
    if lookback not in (0, 1, None):
        raise NotImplementedError(f"{lookback=}: the kernels have 0, 1 and None")
    if lookback is not None and not SUBBLOCK <= block_size <= LONGEST_BLOCK:
        raise NotImplementedError(
            f"{block_size=}: the kernels take {SUBBLOCK} to {LONGEST_BLOCK} tokens in a block"
        )


def _pad_end(x: Array, shape: tuple[int, ...], value: float) -> Array:
    if x.shape == shape:
        return x
    widths = [(0, new - old) for new, old in zip(shape, x.shape, strict=True)]
    return jnp.pad(x, widths, constant_values=value)


@dataclasses.dataclass(frozen=True)
class _Options:
    block_size: int
    lookback: int | None
    config: TuningConfig | None


class _Folding:
    """The way between the shapes of the caller, [B, T, H, D], and those of a `Problem`."""

    def __init__(self, options: _Options, a: Array, v: Array, gates: Gates, continued: bool):
        self.shape = batch, time, heads, features = v.shape
        self.width = 16 if features % 16 == 0 else 8
        self.parts = features // self.width
        self.rows = heads * self.parts
        narrowest = THREADS // self.width
        config = options.config or TuningConfig()
        if config.heads < narrowest:
            raise ValueError(f"{config}: at D={features} a tile needs at least {narrowest} heads")
        self.problem = Problem(
            batch=batch,
            time=max(time, SUBBLOCK),
            heads=max(self.rows, narrowest),
            features=self.width,
            block_size=options.block_size,
            lookback=options.lookback,
            continued=continued,
            config=config,
        )
        if options.config is None:
            config = self._default_config(narrowest, a, v, gates)
            if simulated_platform():
                config = dataclasses.replace(config, line=self.width)
            self.problem = dataclasses.replace(self.problem, config=config)

    def _default_config(self, narrowest: int, a: Array, v: Array, gates: Gates) -> TuningConfig:
        p = self.problem
        return default_config(
            batch=p.batch,
            time=p.time,
            heads=p.heads,
            multiprocessors=multiprocessors_here(),
            narrowest=narrowest,
            **self.stage(a, v, gates),
        )

    def stage(self, a: Array, v: Array, gates: Gates) -> dict[str, int]:
        """What `default_config` asks about a stage of the pipeline."""
        p = self.problem
        row = self.width * v.dtype.itemsize
        inputs = row + self.width * sum(x.dtype.itemsize for x in gates or ())
        states = 4 * self.width * p.saved_states
        return {
            "halo": p.halo * SUBBLOCK,
            "forward_bytes": SUBBLOCK * (inputs + a.dtype.itemsize),
            # The output's cotangent, the states, and two thirds of a stage for da.
            "backward_bytes": SUBBLOCK * (inputs + row + 2 * a.dtype.itemsize) + states,
        }

    def fold(self, x: Array) -> Array:
        """[B, T, H, D] -> [B, T or 16, rows or more, F]."""
        batch, time = self.shape[:2]
        p = self.problem
        x = x.reshape(batch, time, self.rows, self.width)
        return _pad_end(x, (batch, p.time, p.heads, self.width), 0)

    def unfold(self, x: Array) -> Array:
        return x[:, : self.shape[1], : self.rows].reshape(self.shape)

    def fold_decays(self, a: Array) -> Array:
        """[B, T, H] -> [B, T or 16, rows or more], rows of a multiple of 16 bytes, as TMA wants."""
        p = self.problem
        aligned = 16 // a.dtype.itemsize
        rows = -(-p.heads // aligned) * aligned
        if self.parts > 1:
            a = jnp.repeat(a, self.parts, axis=2)
        return _pad_end(a, (a.shape[0], p.time, rows), 1)

    def unfold_decays(self, da: Array, dtype: jnp.dtype) -> Array:
        """The transpose of `fold_decays`."""
        da = da[:, : self.shape[1], : self.rows]
        if self.parts == 1:
            return da
        return jnp.sum(da.reshape(*self.shape[:3], self.parts), axis=3).astype(dtype)

    def fold_states(self, x: Array | None) -> Array | None:
        """States [..., H, D] -> [..., rows of whole tiles, F]."""
        if x is None:
            return None
        before = x.shape[:-2]
        x = x.reshape(*before, self.rows, self.width)
        return _pad_end(x, (*before, self.problem.padded_heads, self.width), 0)

    def unfold_states(self, x: Array) -> Array:
        """States [..., rows of whole tiles, F] -> [..., H, D]."""
        return x[..., : self.rows, :].reshape(*x.shape[:-2], *self.shape[2:])


def _forward(options, a, v, gates, local, previous, *, save):
    """Return output, saved states [B, sub-blocks, 1 or 2, H, D] or None, and final state."""
    folding = _Folding(options, a, v, gates, local is not None)
    p = folding.problem
    a, v = folding.fold_decays(a), folding.fold(v)
    gates = None if gates is None else tuple(map(folding.fold, gates))
    local, previous = folding.fold_states(local), folding.fold_states(previous)
    entering = None
    if p.lookback is None:
        if p.chunks > 1:
            factors = (v,) if gates is None else (gates[0], v)
            entering = _chunk_states(*kernels.reduce(p, a, factors, reverse=False), local)
            entering = entering[:, :, None]
        elif local is not None:
            entering = local[:, None, None]
    elif local is not None or previous is not None:
        own = jnp.zeros_like(previous) if local is None else local
        window = own if previous is None else own + previous
        entering = jnp.stack([own, window], axis=1)[:, None]
    x, states, final = kernels.forward(p, a, v, gates, entering, save=save)
    return (
        folding.unfold(x),
        folding.unfold_states(states) if save else None,
        None if final is None else folding.unfold_states(final),
    )


def _backward(options, a, v, gates, local, previous, states, dx, dfinal):
    """Return the gradients of a, v, gates, local and previous."""
    folding = _Folding(options, a, v, gates, local is not None)
    p = folding.problem
    a_dtype = a.dtype
    a, v, dx = folding.fold_decays(a), folding.fold(v), folding.fold(dx)
    gates = None if gates is None else tuple(map(folding.fold, gates))
    states = folding.fold_states(states)
    entering = None
    if p.lookback is None:
        dfinal = folding.fold_states(dfinal)
        entering = dfinal[:, None, None]
        if p.chunks > 1:
            factors = (dx,) if gates is None else (dx, gates[1])
            products, ends = kernels.reduce(p, a, factors, reverse=True)
            # From right to left the chunks are those of a forward recurrence.
            entering = _chunk_states(products[:, ::-1], ends[:, ::-1], dfinal)[:, ::-1, None]
    initial = local is not None or previous is not None
    # Parts of a head each have their own da: these are rounded after they have been summed.
    da_dtype = a.dtype if folding.parts == 1 else jnp.dtype(jnp.float32)
    da, dv, dgates, dstates = kernels.backward(
        p, a, v, gates, states, dx, entering, da_dtype=da_dtype, initial=initial
    )
    return (
        folding.unfold_decays(da, a_dtype),
        folding.unfold(dv),
        None if gates is None else tuple(map(folding.unfold, dgates)),
        None if local is None else folding.unfold_states(dstates[:, 0]),
        None if previous is None else folding.unfold_states(dstates[:, 1]),
    )


_solve = differentiable(_forward, _backward, "bthd", "bhd", automatic=True)


def _chunk_states(products: Array, ends: Array, first: Array | None) -> Array:
    """Return the state that enters each chunk, [B, chunks, H, F].

    Args:
        products: product of each chunk's decays, [B, chunks, H].
        ends: state that each chunk ends with if it starts from zero, [B, chunks, H, F].
        first: state that enters the first one, [B, H, F], or None for zero.
    """
    products, ends = products[:, :-1, :, None], ends[:, :-1]
    first = jnp.zeros_like(ends[:, 0]) if first is None else first
    ends = jnp.concatenate([ends[:, :1] + products[:, :1] * first[:, None], ends[:, 1:]], axis=1)

    def combine(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    _, states = lax.associative_scan(combine, (products, ends), axis=1)
    return jnp.concatenate([first[:, None], states], axis=1)
