"""What the contestants are checked against before anything is timed, in NumPy and float64.

`swr_jax.ops.reference` has exact gradients by the dense T x T operator. Here are the same ones at
the lengths that are timed, in memory linear in T, from `reference.linear_recurrence` and two facts:
the gradient of a recurrence is a recurrence from right to left; and a window of one block back is
the exact recurrence over each block and the one before.
"""

import concurrent.futures
import os
from collections.abc import Callable, Mapping

import numpy as np

from swr_jax.ops import reference, reference_mlstm

Array = np.ndarray

_HEADS_AT_ONCE = 16  # bounds the float64 copies


class OracleError(Exception):
    """A contestant computes something else than it should; nothing may be timed."""


def check(name: str, actual: Mapping[str, Array], expected: Mapping[str, Array], tolerance: float):
    """Compare a contestant with the oracle.

    Args:
        name: of the contestant.
        actual, expected: results and gradients by name.
        tolerance: the largest relative root mean square error allowed.

    Returns:
        The relative RMS error of each.

    Raises:
        OracleError: an error is larger, or not a number.
    """
    errors = {key: reference.relative_rms(actual[key], expected[key]) for key in expected}
    red = {key: error for key, error in errors.items() if not error <= tolerance}
    if red:
        found = ", ".join(f"{key} {error:.1e}" for key, error in red.items())
        raise OracleError(
            f"{name} disagrees with the float64 oracle: relative RMS error of {found}; at most "
            f"{tolerance:.0e} is allowed. Nothing was timed: correct it first"
        )
    return errors


def recurrence(a: Array, u: Array, x_bar: Array, *, block_size: int, lookback: int | None) -> dict:
    """Output and gradients of the recurrence.

    Args:
        a: decays [B, T, H].
        u: inputs [B, T, H, D].
        x_bar: cotangent of the output [B, T, H, D].
        block_size: tokens in a block.
        lookback: 0 for a token's own block, 1 for the window of one block back, None for the exact
            recurrence.

    Returns:
        Under "x", "a", "u": the output and the gradients of sum(x * x_bar), float64.
    """
    if lookback not in (0, 1, None):
        raise ValueError(f"{lookback=}: must be 0, 1 or None")
    if lookback is None:
        return _by_heads(_exact, a, u, x_bar)
    solve = _windowed if lookback else _within_blocks
    return _by_heads(lambda *arrays: solve(*arrays, block_size=block_size), a, u, x_bar)


def gated_recurrence(
    a: Array, b: Array, c: Array, v: Array, y_bar: Array, *, block_size: int, lookback: int | None
) -> dict:
    """Output and gradients of y = SWR(a, b * v) * c + v, gates [B, T, H, D] of every head.

    Returns:
        Under "x" (the output y), "a", "b", "c", "v": as `recurrence` does.
    """
    a, b, c, v, y_bar = (np.asarray(array, np.float64) for array in (a, b, c, v, y_bar))
    inner = recurrence(a, b * v, y_bar * c, block_size=block_size, lookback=lookback)
    return {
        "x": inner["x"] * c + v,
        "a": inner["a"],
        "b": inner["u"] * v,
        "c": y_bar * inner["x"],
        "v": inner["u"] * b + y_bar,
    }


def phalanx(parameters: Mapping[str, Mapping[str, Array]], x: Array, *, block_size: int) -> Array:
    """Output [B, T, M] of `swr_jax.nn.Phalanx` with its default options."""
    maps = _linear_maps(parameters, x)
    heads = maps["decay"].shape[-1]

    def split(y: Array) -> Array:
        return y.reshape(*y.shape[:2], heads, -1)

    v = split(maps["value"])
    inner = reference.block_two_pass(
        _sigmoid(maps["decay"]), _sigmoid(split(maps["pre_gate"])) * v, block_size=block_size
    )
    out = inner * split(maps["post_gate"]) + v
    return out.reshape(x.shape) @ np.asarray(parameters["output"]["kernel"], np.float64)


def attention(
    parameters: Mapping[str, Mapping[str, Array]], x: Array, *, num_heads: int, window: int | None
) -> Array:
    """Output [B, T, M] of `swr_jax.nn.SlidingWindowAttention`, by the dense T x T weights."""
    maps = _linear_maps(parameters, x)
    q, k, v = (
        maps[name].reshape(*x.shape[:2], num_heads, -1) for name in ("query", "key", "value")
    )
    half = q.shape[-1] // 2
    angle = np.outer(np.arange(x.shape[1]), 10_000.0 ** (-np.arange(half) / half))
    turn = np.exp(1j * angle)[:, None, :]  # a pair of features is a complex number

    def rotate(y: Array) -> Array:
        turned = (y[..., :half] + 1j * y[..., half:]) * turn
        return np.concatenate([turned.real, turned.imag], axis=-1)

    logits = np.einsum("bqhd,bkhd->bhqk", rotate(q), rotate(k), optimize=True)
    logits /= np.sqrt(q.shape[-1])
    age = np.subtract.outer(np.arange(x.shape[1]), np.arange(x.shape[1]))
    seen = (age >= 0) & (age < (np.inf if window is None else window))
    weights = np.where(seen, np.exp(logits - logits.max(axis=-1, keepdims=True)), 0.0)
    weights /= weights.sum(axis=-1, keepdims=True)
    out = np.einsum("bhqk,bkhd->bqhd", weights, v, optimize=True)
    return out.reshape(x.shape) @ np.asarray(parameters["output"]["kernel"], np.float64)


def mlstm(parameters: Mapping[str, Mapping[str, Array]], x: Array, *, num_heads: int) -> Array:
    """Output [B, T, M] of `swr_jax.nn.MLSTM` with its default options."""
    maps = _linear_maps(parameters, x)
    q, k, v = (
        maps[name].reshape(*x.shape[:2], num_heads, -1) for name in ("query", "key", "value")
    )
    i, f = (15 * np.tanh(maps[name] / 15) for name in ("input_gate", "forget_gate"))
    h = reference_mlstm.parallel(q, k, v, i, f)
    h = h - h.mean(axis=-1, keepdims=True)
    h /= np.sqrt(np.mean(h**2, axis=-1, keepdims=True) + 1e-6)
    scale = np.asarray(parameters["head_norm"]["scale"], np.float64)
    out = _sigmoid(maps["output_gate"]) * (h.reshape(*x.shape[:2], -1) * scale)
    return out @ np.asarray(parameters["output"]["kernel"], np.float64)


def _linear_maps(parameters: Mapping[str, Mapping[str, Array]], x: Array) -> dict[str, Array]:
    x = np.asarray(x, np.float64)
    return {
        name: x @ np.asarray(values["kernel"], np.float64) + np.asarray(values.get("bias", 0.0))
        for name, values in parameters.items()
        if name != "output" and "kernel" in values
    }


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _by_heads(function: Callable[..., dict], *arrays: Array) -> dict:

    def of_heads(first: int) -> dict:
        heads = slice(first, first + _HEADS_AT_ONCE)
        return function(*(np.asarray(array[:, :, heads], np.float64) for array in arrays))

    # NumPy's larger operations let other threads work.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(of_heads, range(0, arrays[0].shape[2], _HEADS_AT_ONCE)))
    return {key: np.concatenate([part[key] for part in parts], axis=2) for key in parts[0]}


def _exact(a: Array, u: Array, x_bar: Array) -> dict:
    x = reference.linear_recurrence(a, u)
    # du_i = x_bar_i + a_{i+1} du_{i+1};  da_i = du_i . x_{i-1}
    next_a = np.concatenate([a[:, 1:], np.zeros_like(a[:, :1])], axis=1)
    du = reference.linear_recurrence(next_a[:, ::-1], x_bar[:, ::-1])[:, ::-1]
    previous_x = np.concatenate([np.zeros_like(x[:, :1]), x[:, :-1]], axis=1)
    return {"x": x, "a": np.sum(du * previous_x, axis=-1), "u": du}


def _blocks(array: Array, block_size: int) -> Array:
    """[B, T, ...] -> [B, blocks, block_size, ...], the last one padded with zeros."""
    padding = [(0, 0), (0, -array.shape[1] % block_size)] + [(0, 0)] * (array.ndim - 2)
    padded = np.pad(array, padding)
    return padded.reshape(array.shape[0], -1, block_size, *array.shape[2:])


def _within_blocks(a: Array, u: Array, x_bar: Array, *, block_size: int) -> dict:
    batch, time = a.shape[:2]
    blocks = (_blocks(array, block_size) for array in (a, u, x_bar))
    result = _exact(*(array.reshape(-1, *array.shape[2:]) for array in blocks))
    return {
        key: array.reshape(batch, -1, *array.shape[2:])[:, :time] for key, array in result.items()
    }


def _windowed(a: Array, u: Array, x_bar: Array, *, block_size: int) -> dict:
    batch, time = a.shape[:2]

    def shifted(array: Array, by: int) -> Array:
        out = np.zeros_like(array)
        if by > 0:
            out[:, by:] = array[:, :-by]
        else:
            out[:, :by] = array[:, -by:]
        return out

    def pairs(before: Array, own: Array) -> Array:
        joined = np.concatenate([before, own], axis=2)
        return joined.reshape(-1, *joined.shape[2:])

    def whole(array: Array) -> Array:
        return array.reshape(batch, -1, *array.shape[3:])[:, :time]

    a, u, x_bar = (_blocks(array, block_size) for array in (a, u, x_bar))
    result = _exact(
        pairs(shifted(a, 1), a), pairs(shifted(u, 1), u), pairs(np.zeros_like(x_bar), x_bar)
    )
    result = {key: array.reshape(batch, -1, *array.shape[1:]) for key, array in result.items()}
    gradients = {
        key: whole(result[key][:, :, block_size:] + shifted(result[key][:, :, :block_size], -1))
        for key in ("a", "u")
    }
    return {"x": whole(result["x"][:, :, block_size:]), **gradients}
