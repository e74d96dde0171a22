"""Section `recurrence`: our operators against the flat and the sequential evaluation.

The baselines compute the exact recurrence: `jax.lax.associative_scan` knows no window. It has two
natural forms, with the decay broadcast over features by its own arithmetic, or before; both are
timed, and ratios are those to the faster one. `copy` (u + 1) is the least that anything of these
sizes can take.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from swr_jax.benchmark import oracle, scans, timing
from swr_jax.ops import (
    gated_sliding_window_recurrence,
    linear_recurrence,
    sliding_window_recurrence,
)

Array = jax.Array

BLOCK_SIZE = 16
TOLERANCE = 1e-6  # relative RMS, float32
REFERENCES = ("associative_scan", "sequential_scan", "copy")
_SCANS = ("associative_scan", "associative_scan_broadcast")
MODES = ("forward", "forward+backward")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Shapes that are timed: B = 1, H heads of D features, float32."""

    tokens: tuple[int, ...]
    headline_tokens: int  # where the default allocator is timed too, and targets are judged
    heads: int
    features: int
    budget: timing.Budget


FULL = Sizes(
    tokens=tuple(2**n for n in range(9, 17)),
    headline_tokens=8192,
    heads=64,
    features=16,
    budget=timing.Budget(seconds=6, min_rounds=7, max_rounds=101),
)
TINY = Sizes(
    tokens=(40,),
    headline_tokens=40,
    heads=2,
    features=4,
    budget=timing.Budget(seconds=0, min_rounds=2, max_rounds=2),
)


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A function of a group's arguments, and the window whose oracle it must agree with."""

    function: Callable[..., Array]
    lookback: int | None


def _associative_scan(a: Array, u: Array) -> Array:
    return scans.associative_scan(a[..., None], u)


def _associative_scan_broadcast(a: Array, u: Array) -> Array:
    a = jnp.broadcast_to(a[..., None], u.shape)
    return scans.associative_scan(a, u)


def _sequential_scan(a: Array, u: Array) -> Array:
    def step(state: Array, token: tuple[Array, Array]) -> tuple[Array, Array]:
        state = token[0][..., None] * state + token[1]
        return state, state

    tokens = (jnp.moveaxis(a, 1, 0), jnp.moveaxis(u, 1, 0))
    return jnp.moveaxis(lax.scan(step, jnp.zeros_like(u[:, 0]), tokens)[1], 0, 1)


def _gated(scan: Callable[[Array, Array], Array]) -> Callable[..., Array]:
    return lambda a, b, c, v: scan(a, b * v) * c + v


_BASELINES = {
    "associative_scan": _associative_scan,
    "associative_scan_broadcast": _associative_scan_broadcast,
    "sequential_scan": _sequential_scan,
}

# Contestants take turns within a group; those of a group have the same arguments.
GROUPS: dict[str, dict[str, Contestant]] = {
    "plain": {
        "sliding_window_recurrence": Contestant(
            functools.partial(sliding_window_recurrence, block_size=BLOCK_SIZE, lookback=1), 1
        ),
        "linear_recurrence": Contestant(linear_recurrence, None),
        **{name: Contestant(scan, None) for name, scan in _BASELINES.items()},
    },
    "gated": {
        "gated_sliding_window_recurrence": Contestant(
            functools.partial(gated_sliding_window_recurrence, block_size=BLOCK_SIZE, lookback=1), 1
        ),
        **{name: Contestant(_gated(scan), None) for name, scan in _BASELINES.items()},
    },
}
_ARGUMENTS = {"plain": "au", "gated": "abcv"}
_ORACLES = {"plain": oracle.recurrence, "gated": oracle.gated_recurrence}


def run(sizes: Sizes, *, groups: Mapping[str, Mapping[str, Contestant]] = GROUPS) -> Iterator[dict]:
    """Check and time every contestant at every length, forward and forward+backward.

    Yields:
        One measurement after the other: "group", "tokens", "mode", "allocator", "relative_rms", the
        "fastest_associative_scan", and what `timing.summarise` returns.

    Raises:
        OracleError: a contestant is wrong at some length; nothing has been timed then.
    """
    checked = {
        (tokens, group): _compile_and_check(group, tokens, sizes, contestants)
        for tokens in sorted({*sizes.tokens, sizes.headline_tokens})
        for group, contestants in groups.items()
    }

    def time(lengths: tuple[int, ...], allocator: str) -> Iterator[dict]:
        for tokens in lengths:
            for group in groups:
                compiled, errors = checked[tokens, group]
                for measurement in _time(group, tokens, sizes, compiled):
                    measurement["allocator"] = allocator
                    measurement["relative_rms"] = errors[measurement["mode"]]
                    yield measurement

    yield from time((sizes.headline_tokens,), "default")
    if timing.keep_freed_memory():
        yield from time(sizes.tokens, "kept")
    else:
        yield from time(tuple(t for t in sizes.tokens if t != sizes.headline_tokens), "default")


def _inputs(group: str, tokens: int, sizes: Sizes) -> tuple[tuple[Array, ...], Array]:
    """Random decays in [0, 1), gates and inputs, and a random cotangent of the output."""
    random = np.random.default_rng(tokens)
    shape = (1, tokens, sizes.heads, sizes.features)
    args = [random.random(shape[:3], np.float32)]
    args += [random.standard_normal(shape, np.float32) for _ in _ARGUMENTS[group][1:]]
    cotangent = random.standard_normal(shape, np.float32)
    return tuple(jnp.asarray(x) for x in args), jnp.asarray(cotangent)


def _compile_and_check(
    group: str, tokens: int, sizes: Sizes, contestants: Mapping[str, Contestant]
) -> tuple[dict[str, dict[str, jax.stages.Compiled]], dict[str, dict[str, dict]]]:
    """Compile, and compare the very executables that are to be timed with the oracle.

    Returns:
        Executables by contestant and mode, and relative RMS errors by mode, contestant, quantity.
    """
    args, cotangent = _inputs(group, tokens, sizes)
    arrays = [np.asarray(x) for x in (*args, cotangent)]
    compiled, errors = {}, {mode: {} for mode in MODES}
    for lookback in (1, None):
        peers = {name: c for name, c in contestants.items() if c.lookback == lookback}
        if not peers:
            continue
        expected = _ORACLES[group](*arrays, block_size=BLOCK_SIZE, lookback=lookback)
        for name, contestant in peers.items():
            compiled[name] = {
                "forward": timing.compile_ahead(contestant.function, *args),
                "forward+backward": timing.compile_ahead(
                    timing.with_gradient(contestant.function), args, cotangent
                ),
            }
            out = compiled[name]["forward"](*args)
            errors["forward"][name] = oracle.check(
                f"{name}, {tokens} tokens, forward", {"x": out}, {"x": expected["x"]}, TOLERANCE
            )
            out, gradients = compiled[name]["forward+backward"](args, cotangent)
            errors["forward+backward"][name] = oracle.check(
                f"{name}, {tokens} tokens, forward+backward",
                {"x": out, **dict(zip(_ARGUMENTS[group], gradients, strict=True))},
                expected,
                TOLERANCE,
            )
    return compiled, errors


def _time(group: str, tokens: int, sizes: Sizes, compiled) -> Iterator[dict]:
    args, cotangent = _inputs(group, tokens, sizes)
    copy = timing.compile_ahead(lambda x: x + 1, args[-1])
    for mode in MODES:
        inputs = args if mode == "forward" else (args, cotangent)
        entrants = {name: (modes[mode], inputs) for name, modes in compiled.items()}
        entrants["copy"] = (copy, args[-1:])
        samples = timing.measure(
            {name: functools.partial(call, *inputs) for name, (call, inputs) in entrants.items()},
            sizes.budget,
        )
        fastest = min(_SCANS, key=lambda name: np.median(samples[name].seconds))
        references = {label: label for label in REFERENCES} | {"associative_scan": fastest}
        temporaries = {name: timing.temporary_bytes(call) for name, (call, _) in entrants.items()}
        yield {
            "group": group,
            "tokens": tokens,
            "mode": mode,
            "fastest_associative_scan": fastest,
            **timing.summarise(samples, temporaries, references),
        }


def targets(measurements: list[dict], sizes: Sizes) -> list[dict]:
    """Judge the project's targets for a CPU at the headline length.

    Returns:
        Per target: "what", "required", "measured" (with the quartiles of speed-ups) and "met".
    """
    found = {
        (m["mode"], name): (m, contestant)
        for m in measurements
        if m["tokens"] == sizes.headline_tokens and m["group"] == "plain"
        for name, contestant in m["contestants"].items()
    }  # the allocator "kept" comes after "default", and so replaces it
    judged = []

    def speed(subject: str, mode: str, reference: str, least: float) -> None:
        value = found[mode, subject][1]["speedup"][reference]
        judged.append(
            {
                "what": f"{subject} {mode}: times faster than {reference}",
                "required": f">= {least:g}",
                "measured": value["median"],
                "quartiles": [value["lower"], value["upper"]],
                "met": value["median"] >= least,
            }
        )

    def memory(subject: str, mode: str, most: float) -> None:
        measurement, contestant = found[mode, subject]
        least = min(measurement["contestants"][scan]["temporary_bytes"] for scan in _SCANS)
        value = contestant["temporary_bytes"] / least
        judged.append(
            {
                "what": f"{subject} {mode}: temporary memory / associative_scan's smallest",
                "required": f"<= {most:.3g}",
                "measured": value,
                "met": value <= most,
            }
        )

    for mode, least in zip(MODES, (5.0, 3.0), strict=True):
        speed("sliding_window_recurrence", mode, "associative_scan", least)
        speed("sliding_window_recurrence", mode, "sequential_scan", 1.0)
        memory("sliding_window_recurrence", mode, 1 / 3)
    speed("linear_recurrence", "forward+backward", "associative_scan", 1.0)
    memory("linear_recurrence", "forward+backward", 1.0)
    return judged
