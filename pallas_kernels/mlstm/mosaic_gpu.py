"""The chunkwise mLSTM on Hopper GPUs: the two passes that `gradient.differentiable` wants.

The kernels are in modules of their own. Where sequences are enough to fill the chip, or `pieces` of
them, `fused` is the whole forward pass and `fused_backward` the other one. Elsewhere `states` walks
over the chunks and `outputs` has h, which needs no more than a tile of scores at a time, so that
the forward pass has longer chunks, and fewer states to write and to read, than the backward pass:
there `rows` has dq, `columns` dk and dv. Here is what calls them, and the way between the shapes of
the caller and theirs: Dk and Dv are padded with zeros to multiples of 64.

Products are of bfloat16 numbers, with sums in float32; gates, weights, scores and n are float32.
The states between the chunks go through memory in bfloat16.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.hopper.chip import TILE, check_dtype, multiprocessors_here
from pallas_kernels.mlstm import gates as rows_of
from pallas_kernels.mlstm import mosaic_gpu_columns as columns
from pallas_kernels.mlstm import mosaic_gpu_fused as fused
from pallas_kernels.mlstm import mosaic_gpu_fused_backward as fused_backward
from pallas_kernels.mlstm import mosaic_gpu_outputs as outputs
from pallas_kernels.mlstm import mosaic_gpu_pieces as pieces
from pallas_kernels.mlstm import mosaic_gpu_rows as rows
from pallas_kernels.mlstm.gradient import Passes, entry_point
from pallas_kernels.mlstm.mosaic_gpu_problem import Problem
from pallas_kernels.mlstm.mosaic_gpu_states import walk
from pallas_kernels.mlstm.tuning import LONGEST_CHUNK, TuningConfig, suited_span
from pallas_kernels.padding import fill_up

Array = jax.Array

WIDEST_Q, WIDEST_V = 512, 1024
# Chunks longer than this are for sequences of this many of them: the last one is filled up.
_LONG, _MANY = 128, 8


class _Pass(NamedTuple):
    """What the kernels of a pass can do: chunks, longest first, and slots that have room."""

    chunks: tuple[int, ...]
    slots: Callable[[Problem], int]

    def holds(self, p: Problem) -> bool:
        """Whether shared memory has room for a stage of every kernel."""
        return self.slots(p) > 0


_FORWARD = _Pass((LONGEST_CHUNK, 128, 64), lambda p: outputs.tiling(p)[1])
_BACKWARD = _Pass((128, 64), lambda p: min(rows.gradient_slots(p), columns.gradient_slots(p)))


def chunk_lengths(
    chunk_size: int, time: int, q_dim: int, v_dim: int, dtype: jnp.dtype, config: TuningConfig
) -> tuple[int, int]:
    """Return the tokens of a chunk in both passes: the most that kernels hold, or 64 if enough.

    Args:
        chunk_size: what the caller wishes; it changes no result.
        time: T.
        q_dim, v_dim: Dk, Dv.
        dtype: of q, k, v.
        config: may name chunks.
    """

    def longest(kernels: _Pass) -> int:
        if chunk_size <= TILE or time <= TILE:
            return TILE
        for chunk in kernels.chunks:
            useful = chunk <= _LONG or time >= _MANY * chunk
            if useful and kernels.holds(
                _sized(1, chunk, 1, q_dim, v_dim, chunk, True, dtype, config)
            ):
                return chunk
        return TILE

    return config.forward_chunk or longest(_FORWARD), config.chunk or longest(_BACKWARD)


def on_device(passes: Passes, q: Array, v: Array) -> Passes:
    """Return the options of the passes for what one device has of the arrays.

    Args:
        passes: as they were chosen by the size of a head.
        q, v: as in `forward`, of any T.
    """
    forward, backward = passes
    config, multiprocessors = forward.config, multiprocessors_here()
    in_tiles = _problem(forward._replace(chunk=TILE), q, v)
    if config.forward_chunk in (None, TILE) and fused.tiling(in_tiles, multiprocessors):
        forward = forward._replace(chunk=TILE)
    if config.chunk in (None, TILE) and fused_backward.suited(in_tiles, multiprocessors):
        backward = backward._replace(chunk=TILE)
    return Passes(forward, backward)


def check(passes, q: Array, k: Array, v: Array) -> None:
    """Say what the kernels cannot do.

    Args:
        passes: `gradient.Passes`.
        q, k, v: as in `forward`.

    Raises:
        NotImplementedError: a dtype or a size.
    """
    _check(_FORWARD, passes.forward, q, k, v)
    _check(_BACKWARD, passes.backward, q, k, v)


def _check(kernels: _Pass, options, q: Array, k: Array, v: Array) -> None:
    for name, x in {"q": q, "k": k, "v": v}.items():
        if x.dtype == jnp.float16:
            raise NotImplementedError(
                f"{name}.dtype={x.dtype}: the weights 1 / divisor leave its range; use bfloat16"
            )
        check_dtype(name, x)
    q_dim, v_dim = q.shape[-1], v.shape[-1]
    if q_dim > WIDEST_Q or v_dim > WIDEST_V:
        raise NotImplementedError(
            f"Dk={q_dim}, Dv={v_dim}: the kernels take up to {WIDEST_Q} and {WIDEST_V}"
        )
    if options.chunk not in kernels.chunks:
        raise NotImplementedError(f"chunk={options.chunk}: the kernels take {kernels.chunks}")
    if not kernels.holds(_problem(options, q, v)):
        raise NotImplementedError(
            f"Dk={q_dim}, chunk={options.chunk}: more than shared memory holds"
        )


def forward(
    options,
    q: Array,
    k: Array,
    v: Array,
    gates: Array,
    carry: Array,
    memory: Array,
    normalizer: Array,
) -> tuple[Array, Array, Array]:
    """Return h, and C and n after the last chunk.

    Args:
        options: `gradient.Options`.
        q, k: [B, T, H, Dk], T a multiple of the chunk; bfloat16.
        v: [B, T, H, Dv].
        gates: rows of `gates`, [B, H, N, 8, L], float32.
        carry: [B, H, N].
        memory, normalizer: C [B, H, Dk, Dv] and n [B, H, Dk] before the first chunk, float32.
    """
    _check(_FORWARD, options, q, k, v)
    p, multiprocessors = _problem(options, q, v), multiprocessors_here()
    tiling = fused.tiling(p, multiprocessors) if options.chunk == TILE else None
    if tiling:
        p = dataclasses.replace(p, pieces=tiling.pieces)
    call = _Call(p, q, v)
    given = call.arguments(q, k, v, gates, carry, memory, normalizer)
    if tiling:
        state = pieces.starts(
            p, *given[1:], name="mlstm_pieces_forward", multiprocessors=multiprocessors
        )
        h, *last = fused.forward(p, tiling, *given[:5], *state)
    else:
        memories, normalizers, *last = _states(p, "mlstm_states_forward", *given[1:])
        h = outputs.outputs(p, *given[:4], memories, normalizers)
    return call.by_token(h, like=v), *call.last_state(*last)


def backward(
    options,
    q: Array,
    k: Array,
    v: Array,
    gates: Array,
    carry: Array,
    memory: Array,
    normalizer: Array,
    dh: Array,
    dmemory: Array,
    dnormalizer: Array,
) -> tuple[Array, ...]:
    """Return the cotangents of q, k, v, of the rows of gates, of log carry, of memory, normalizer.

    Args:
        options, q, k, v, gates, carry, memory, normalizer: as in `forward`.
        dh, dmemory, dnormalizer: cotangents of what `forward` returns.

    Returns:
        As `gradient.differentiable` wants them.
    """
    _check(_BACKWARD, options, q, k, v)
    p, multiprocessors = _problem(options, q, v), multiprocessors_here()
    gradient = functools.partial(_gradient, p)
    if options.chunk == TILE and (suited := fused_backward.suited(p, multiprocessors)):
        p = suited
        gradient = functools.partial(fused_backward.gradient, p, multiprocessors)
    call = _Call(p, q, v)
    dq, dk, dv, dgates, dcarry, *last = gradient(
        *call.arguments(q, k, v, gates, carry, memory, normalizer),
        call.pad_v(dh.astype(v.dtype)),
        *call.pad_state(dmemory, dnormalizer),
    )
    return (
        *(call.by_token(x, like=y) for x, y in ((dq, q), (dk, k), (dv, v))),
        dgates.reshape(*gates.shape[:3], *dgates.shape[1:]),
        dcarry.reshape(carry.shape),
        *call.last_state(*last),
    )


chunkwise = entry_point(
    forward,
    backward,
    chunk_lengths,
    check,
    TuningConfig,
    automatic=True,
    on_device=on_device,
)


class _Call:
    """The way between the shapes of the caller and those of the kernels."""

    def __init__(self, p: Problem, q: Array, v: Array):
        self.problem, self.sizes = p, (q.shape[-1], v.shape[-1])

    def pad_q(self, x: Array) -> Array:
        """[B, T, H, Dk] -> [B P, T / P, H, multiple of 64]."""
        return self._in_pieces(fill_up(x, {3: TILE}))

    def pad_v(self, x: Array) -> Array:
        """[B, T, H, Dv] -> [B P, T / P, H, multiple of 64]."""
        return self._in_pieces(fill_up(x, {3: TILE}))

    def _in_pieces(self, x: Array) -> Array:
        p = self.problem
        return x.reshape(p.batch * p.pieces, p.time // p.pieces, *x.shape[2:])

    def by_token(self, x: Array, like: Array) -> Array:
        """Undo `pad_q` or `pad_v`."""
        return x[..., : like.shape[-1]].reshape(like.shape)

    def pad_state(self, memory: Array, normalizer: Array) -> tuple[Array, Array]:
        """C [B, H, Dk, Dv] and n [B, H, Dk] -> [B H, ...], padded."""
        p = self.problem
        memory = fill_up(memory, {2: TILE, 3: TILE}).reshape(-1, p.q_dim, p.v_dim)
        return memory, fill_up(normalizer, {2: TILE}).reshape(-1, p.q_dim)

    def last_state(self, memory: Array, normalizer: Array) -> tuple[Array, Array]:
        """Undo `pad_state`."""
        p, (q_dim, v_dim) = self.problem, self.sizes
        memory = memory.reshape(p.batch, p.heads, p.q_dim, p.v_dim)
        normalizer = normalizer.reshape(p.batch, p.heads, p.q_dim)
        return memory[:, :, :q_dim, :v_dim], normalizer[:, :, :q_dim]

    def arguments(self, q, k, v, gates, carry, memory, normalizer) -> tuple[Array, ...]:
        """What `forward` takes, as its kernels do."""
        return (
            *(self.pad_q(q), self.pad_q(k), self.pad_v(v)),
            *(gates.reshape(-1, *gates.shape[3:]), carry.reshape(-1)),
            *self.pad_state(memory, normalizer),
        )


def _states(p: Problem, name: str, k, v, gates, carry, memory, normalizer) -> tuple[Array, ...]:
    """C and n of every chunk, and those after the last."""
    return walk(
        p,
        k,
        v,
        (gates, rows_of.KEPT),
        None,
        carry,
        memory,
        normalizer,
        None,
        name=name,
        multiprocessors=multiprocessors_here(),
    )


def _gradient(
    p: Problem, q, k, v, gates, carry, memory, normalizer, dh, dmemory, dnormalizer
) -> tuple[Array, ...]:
    """The same as `fused_backward.gradient`, with the states of all chunks in memory."""
    given = k, v, gates, carry, memory, normalizer
    memories, normalizers, *_ = _states(p, "mlstm_states_again", *given)
    dq, told, d_row = rows.gradient(p, q, k, v, gates, memories, normalizers, dh)
    dmemories, dnormalizers, *last, inner = walk(
        p,
        q,
        dh,
        (told, rows.READ),
        (told, rows.RATIO),
        carry,
        dmemory,
        dnormalizer,
        memories,
        name="mlstm_states_backward",
        multiprocessors=multiprocessors_here(),
    )
    dk, dv, d_columns = columns.gradient(p, q, k, v, gates, told, dh, dmemories, dnormalizers)
    inner = jnp.sum(inner, axis=(1, 2)) + jnp.sum(dnormalizers * normalizers, axis=1)
    dgates = jnp.concatenate([d_row[:, None], d_columns], axis=1)
    return dq, dk, dv, dgates, carry * inner, *last


def _problem(options, q: Array, v: Array) -> Problem:
    batch, time, heads, q_dim = q.shape
    config = options.config or TuningConfig()
    normalized = options.normalized
    return _sized(
        batch, time, heads, q_dim, v.shape[-1], options.chunk, normalized, q.dtype, config
    )


def _sized(batch, time, heads, q_dim, v_dim, chunk, normalized, dtype, config) -> Problem:
    q_dim, v_dim = (-(-x // TILE) * TILE for x in (q_dim, v_dim))
    time = -(-time // chunk) * chunk
    dtype = jnp.dtype(dtype)
    if config.span is None:
        span = suited_span(batch * heads, time // chunk, multiprocessors_here())
        config = dataclasses.replace(config, span=span)
    return Problem(batch, time, heads, q_dim, v_dim, chunk, normalized, dtype, config)
