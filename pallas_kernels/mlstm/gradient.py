"""What every backend's entry point is made of: its two passes as one differentiable function."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.distribution import distributed
from pallas_kernels.mlstm.gates import Gates, gradient, prepare
from pallas_kernels.mlstm.stabilized import inner
from pallas_kernels.padding import fill_up
from pallas_kernels.residuals import with_residuals

Array = jax.Array
# C [B, H, Dk, Dv], n [B, H, Dk], m [B, H]: what they stand for is e^m C and e^m n.
State = tuple[Array, Array, Array]

_STATE = ("bhkd", "bhk", "bh")
_ARGUMENTS = ("bthk", "bthk", "bthd", "bth", "bth", *_STATE)
_RESULTS = ("bthd", *_STATE)
# What a forward pass may keep: `Gates`, and C and n before every chunk as its backend has them.
_KEPT = ("bhnrl", "bhn", "bh", "bhnl", "bhnl", "bhnxy", "bhnzx")


class Options(NamedTuple):
    """What the kernels of a pass depend on.

    Attributes:
        chunk: tokens of a chunk, L.
        stabilized: whether stabilizers follow the gates, or stay 0, which needs log i <= 0.
        normalized: whether outputs are divided by max(|d|, exp(-m)).
        config: the backend's `TuningConfig`.
    """

    chunk: int
    stabilized: bool
    normalized: bool
    config: Any


class Passes(NamedTuple):
    """The options of both passes, which may differ in the chunk."""

    forward: Options
    backward: Options


def differentiable(
    forward: Callable,
    backward: Callable,
    *,
    automatic: bool,
    on_device: Callable = lambda passes, *_: passes,
    keeping: Callable | None = None,
) -> Callable:
    """Return solve(passes, q, k, v, log_i, log_f, state) -> (h, state), spread over devices.

    q, k [B, T, H, Dk] and v [B, T, H, Dv] are of any T, which is padded to whole chunks; log_i and
    log_f [B, T, H] and the state are float32. The gradient is exact for all of them. Without
    `keeping` it repeats the forward pass, so that nothing is saved but the arguments.

    Args:
        forward: takes (options, q, k, v, rows, carry, C, n), the third and second last as `Gates`
            has them, to h, C, n.
        backward: takes the same and the cotangents of h, C, n to those of q, k, v, of the rows
            (as `gates.gradient` takes them), of log carry, and of C, n.
        automatic: whether the compiler may split the call over batch and heads.
        on_device: takes `Passes`, and q and v as one device has them, to what they are there.
        keeping: like `forward`, where a gradient will be wanted; also returns C and n before every
            chunk, [B, H, N, ., .] each, which `backward` then takes for C and n. Both passes have
            the same chunk, and the gates are kept, too.
    """

    def run_forward(passes, *arguments, function=forward):
        q, k, v, log_i, log_f, memory, normalizer, stabilizer = arguments
        options = on_device(passes, q, v).forward
        gates = _prepare(options, q, log_i, log_f, stabilizer)
        time = q.shape[1]
        q, k, v = (fill_up(x, {1: options.chunk}) for x in (q, k, v))
        h, memory, normalizer, *states = function(
            options, q, k, v, gates.rows, gates.carry, memory, normalizer
        )
        results = h[:, :time], memory, normalizer, gates.stabilizer
        return (*results, *gates, *states) if states else results

    def run_backward(passes, *arguments):
        q, k, v, log_i, log_f, memory, normalizer, stabilizer = arguments[:8]
        dh, dmemory, dnormalizer, dstabilizer, *kept = arguments[8:]
        options = on_device(passes, q, v).backward
        if kept:
            *gates, memory, normalizer = kept
            gates = Gates(*gates)
        else:
            gates = _prepare(options, q, log_i, log_f, stabilizer)
        time = q.shape[1]
        q, k, v, dh = (fill_up(x, {1: options.chunk}) for x in (q, k, v, dh))
        dq, dk, dv, drows, dcarry, dmemory, dnormalizer = backward(
            options,
            *(q, k, v, gates.rows, gates.carry, memory, normalizer),
            *(dh, dmemory, dnormalizer),
        )
        dlog_i, dlog_f, dstabilizer = gradient(gates, drows, dcarry, dstabilizer, time)
        return (
            *(x[:, :time] for x in (dq, dk, dv)),
            dlog_i,
            dlog_f,
            dmemory,
            dnormalizer,
            dstabilizer,
        )

    def run(function, arguments, axes, results):
        return distributed(function, arguments, axes, results, automatic=automatic)

    def solve(passes: Passes, q, k, v, log_i, log_f, state: State) -> tuple[Array, State]:
        given = (q, k, v, log_i, log_f, *state)
        pass_ = functools.partial(run_forward, passes)
        h, *state = run(pass_, given, _ARGUMENTS, _RESULTS)
        return h, tuple(state)

    def solve_forward(passes, *arguments):
        if keeping is None:
            kept = ()
            h, state = solve(passes, *arguments)
        else:
            *arrays, state = arguments
            pass_ = functools.partial(run_forward, passes, function=keeping)
            found = run(pass_, (*arrays, *state), _ARGUMENTS, (*_RESULTS, *_KEPT))
            h, *state = found[: len(_RESULTS)]
            state, kept = tuple(state), found[len(_RESULTS) :]
        return (h, state), (arguments, kept, state if passes.forward.stabilized else None)

    def solve_backward(passes, residuals, cotangents):
        (*arrays, state), kept, final = residuals
        dh, dstate = cotangents
        # h does not depend on m, which is a constant wherever it only keeps numbers in range. As a
        # factor of the returned state, e^-m, it has a derivative, and as what is returned.
        dm = jnp.zeros_like(state[2])
        if final is not None:
            dm = dstate[2] - inner(dstate, final)
        pass_ = functools.partial(run_backward, passes)
        given = (*arrays, *state, dh, *dstate[:2], dm, *kept)
        axes = (*_ARGUMENTS, *_RESULTS, *_KEPT[: len(kept)])
        *gradients, dmemory, dnormalizer, dm = run(pass_, given, axes, _ARGUMENTS)
        dstate = (dmemory, dnormalizer, dm)
        return *gradients, (dmemory, dnormalizer, dm + inner(dstate, state))

    if keeping is not None:
        return with_residuals(solve, solve_forward, solve_backward)
    function = jax.custom_vjp(solve, nondiff_argnums=(0,))
    function.defvjp(solve_forward, solve_backward)
    return function


def entry_point(
    forward: Callable,
    backward: Callable,
    chunk_lengths: Callable[..., tuple[int, int]],
    check: Callable[..., None],
    default: Callable[[], Any],
    *,
    automatic: bool,
    **more: Callable,
) -> Callable:
    """Return chunkwise(q, k, v, log_i, log_f, state, *, ...) -> (h, state) of a backend.

    Args:
        forward, backward, automatic, more: as `differentiable` takes them.
        chunk_lengths: takes (chunk_size, time, q_dim, v_dim, dtype, config) to the lengths of a
            chunk, in the forward and in the backward pass, that are nearest to what is wished for.
        check: takes (passes, q, k, v); raises NotImplementedError for what the kernels cannot do.
        default: makes the `TuningConfig` where a call names none.
    """
    solve = differentiable(forward, backward, automatic=automatic, **more)

    def chunkwise(
        q: Array,
        k: Array,
        v: Array,
        log_i: Array,
        log_f: Array,
        state: State,
        *,
        chunk_size: int,
        stabilized: bool,
        normalized: bool,
        config: Any = None,
    ) -> tuple[Array, State]:
        """Return the outputs of an mLSTM and its state after the last token.

        Args:
            q, k: [B, T, H, Dk], not scaled; v: [B, T, H, Dv]; all of one dtype.
            log_i, log_f: logarithms of the gates [B, T, H], float32; log f at most 0, and -inf at
                a reset.
            state: C [B, H, Dk, Dv], n [B, H, Dk], m [B, H] before the first token, float32.
            chunk_size: tokens of a chunk, where the kernel has such chunks; changes no result.
            stabilized, normalized: see `Options`.
            config: the backend's `TuningConfig`; None: the default.

        Raises:
            NotImplementedError: a dtype or size that the kernel does not have.
        """
        config = default() if config is None else config
        sizes = q.shape[1], q.shape[-1], v.shape[-1], q.dtype
        chunks = chunk_lengths(chunk_size, *sizes, config)
        passes = Passes(*(Options(chunk, stabilized, normalized, config) for chunk in chunks))
        check(passes, q, k, v)
        return solve(passes, q, k, v, log_i, log_f, state)

    return chunkwise


def _prepare(options, q, log_i, log_f, stabilizer):
    return prepare(
        log_i,
        log_f,
        stabilizer,
        chunk=options.chunk,
        stabilized=options.stabilized,
        normalized=options.normalized,
        q_dim=q.shape[-1],
    )
