"""Fair timing: compiled contestants take turns in one process, and every figure has its spread.

Protocol
    A contestant is compiled ahead of time and warmed up. In each round every contestant has one
    turn, in an order drawn anew; a turn repeats the call for `_TURN_SECONDS` and counts the mean.
    Ratios are taken within a round, so that what slows the machine for a while slows both sides of
    a ratio. Reported are medians and quartiles over rounds.

Accelerators
    Calls are asynchronous there. A turn dispatches them back to back, `_PIPELINED_TURN_SECONDS` of
    them, and waits at its end, and before that only for calls far back, so that what is in flight
    stays within `_IN_FLIGHT_BYTES`: the device, which works through them in order, does not wait
    for the host as long as a call takes longer than its dispatch. That dispatch is measured too,
    and figures close to it are marked. Successive calls take successive sets of inputs,
    `ROTATION_BYTES` of them together and at least two, so that no call finds its inputs in a cache.

Memory on a CPU
    A call allocates its results and temporaries. Left to itself, glibc takes large blocks from the
    kernel and returns them at once, so that every call pays a page fault per 4 KiB: for a plain
    copy that is most of its time. A training step does not: XLA reuses memory within a step. Hence
    two settings, each for all contestants alike: "default", and "kept", where the allocator has
    enough from the beginning and never returns it. Page faults per call are measured and reported,
    so that the setting is seen to work.
"""

import collections
import concurrent.futures
import ctypes
import dataclasses
import itertools
import math
import os
import platform
import resource
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

ROTATION_BYTES = 2**28  # beyond the caches of all chips: the largest, a B200's, has 126 MiB
_MAX_SETS = 16  # of inputs so small that more of them are not worth their memory
_TURN_SECONDS = 2e-3
_PIPELINED_TURN_SECONDS = 2e-2
_IN_FLIGHT_BYTES = 2**32
_MAX_CALLS = 256

_HEAP_BYTES = 2**32  # that "kept" begins with, at most

# mallopt's parameters, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


@dataclasses.dataclass(frozen=True)
class Budget:
    """How long one comparison may take: rounds until `seconds` are over, within two bounds."""

    seconds: float
    min_rounds: int
    max_rounds: int


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample."""

    median: float
    lower: float
    upper: float


@dataclasses.dataclass(frozen=True)
class Samples:
    """What was measured of one contestant, one entry per round."""

    seconds: np.ndarray  # per call
    page_faults: np.ndarray  # per call


def spread(sample: np.ndarray) -> Spread:
    """Return median and quartiles (linear interpolation) of a sample."""
    lower, median, upper = np.quantile(np.asarray(sample, np.float64), [0.25, 0.5, 0.75])
    return Spread(median=float(median), lower=float(lower), upper=float(upper))


def speedup(baseline: Samples, subject: Samples) -> Spread:
    """Return how many times faster than `baseline` the subject is, from ratios within rounds."""
    return spread(baseline.seconds / subject.seconds)


def compile_ahead(function: Callable, *args) -> jax.stages.Compiled:
    """Compile `function` for these arguments."""
    return jax.jit(function).lower(*args).compile()


def with_gradient(function: Callable) -> Callable:
    """Return (args, cotangent) -> (function(*args), gradients of every argument)."""

    def call(args: tuple, cotangent: jax.Array) -> tuple[jax.Array, tuple]:
        out, pull = jax.vjp(function, *args)
        return out, pull(cotangent)

    return call


def compile_all[Key](
    lower: Mapping[Key, Callable[[], jax.stages.Lowered]],
) -> dict[Key, jax.stages.Compiled | Exception]:
    """Lower one program after the other, compiling in other threads meanwhile.

    Args:
        lower: what returns each lowered program.

    Returns:
        Executables; instead of one that cannot be lowered or compiled, the error.
    """

    def compile_one(program: jax.stages.Lowered) -> jax.stages.Compiled | Exception:
        try:
            return program.compile()
        except (RuntimeError, ValueError) as error:
            return error

    done = {}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for key, lower_one in lower.items():
            try:
                done[key] = pool.submit(compile_one, lower_one())
            except (RuntimeError, ValueError) as error:
                done[key] = error
    return {k: x if isinstance(x, Exception) else x.result() for k, x in done.items()}


def rotation(set_bytes: int) -> int:
    """Return how many sets of inputs of so many bytes successive calls should take in turn."""
    return min(_MAX_SETS, max(2, math.ceil(ROTATION_BYTES / set_bytes)))


class Rotation:
    """A call of a compiled function with one set of inputs after the other.

    Args:
        compiled: the function.
        sets: tuples of its arguments.
    """

    def __init__(self, compiled: Callable, sets: Sequence[tuple]) -> None:
        self._compiled, self._sets = compiled, itertools.cycle(sets)

    def __call__(self) -> object:
        """Start the work on the next set."""
        return self._compiled(*next(self._sets))


def calls_in_flight(compiled: jax.stages.Compiled, free: int) -> int:
    """Return how many calls may be on their way to a device at once, by the memory they take.

    Args:
        compiled: what is called.
        free: bytes of the device that are free.
    """
    memory = compiled.memory_analysis()
    held = memory.output_size_in_bytes + memory.temp_size_in_bytes
    return max(1, min(_MAX_CALLS, min(_IN_FLIGHT_BYTES, free // 2) // max(1, held)))


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """Return the most memory that a compiled call holds besides its arguments and results."""
    return int(compiled.memory_analysis().temp_size_in_bytes)


def prepare_allocator() -> None:
    """Make all threads share one heap, without which "kept" has no effect on XLA's threads.

    Call it before JAX has a device: its threads keep the heaps that they have, and one that is a
    thread's own takes blocks of 64 MiB and more from the kernel at every call. Where the C library
    is not glibc it does nothing, and `keep_freed_memory` is not possible.
    """
    _mallopt({_M_ARENA_MAX: 1})


def keep_freed_memory() -> bool:
    """Switch this process to the allocator setting "kept"; False where that is not possible.

    The heap is made as large as the contestants need, so that none has to grow it where what was
    freed lies in pieces.
    """
    if not _mallopt({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1}):
        return False
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    size = min(_HEAP_BYTES, free // 4)
    block = libc.malloc(ctypes.c_size_t(size))
    if block is None:
        raise MemoryError(f"no heap of {size} bytes, a quarter of what the system says is free")
    ctypes.memset(block, 0xFF, size)
    libc.free(block)
    return True


def _mallopt(settings: dict[int, int]) -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all([libc.mallopt(parameter, value) == 1 for parameter, value in settings.items()])


def measure(
    calls: Mapping[str, Callable[[], object]],
    budget: Budget,
    *,
    seed: int = 0,
    in_flight: Mapping[str, int] | None = None,
) -> dict[str, Samples]:
    """Time contestants in alternation.

    Args:
        calls: contestant by name; calling it starts the work and returns arrays, which are waited
            for and dropped.
        budget: number of rounds.
        seed: of the order within rounds.
        in_flight: for devices that work through calls in order: how many calls of a contestant may
            be dispatched before the first of them is waited for. None: each is waited for.

    Returns:
        Samples by name; round i of one belongs with round i of the others.
    """
    depth = in_flight or dict.fromkeys(calls, 1)
    least = _TURN_SECONDS if in_flight is None else _PIPELINED_TURN_SECONDS
    repeats = {name: _repeats(call, depth[name], least) for name, call in calls.items()}
    seconds, faults = ({name: [] for name in calls} for _ in range(2))
    names, order = list(calls), np.random.default_rng(seed)
    start = time.perf_counter()
    for done in range(budget.max_rounds):
        if done >= budget.min_rounds and time.perf_counter() - start > budget.seconds:
            break
        for name in order.permutation(names):
            elapsed, faulted = _turn(calls[name], repeats[name], depth[name])
            seconds[name].append(elapsed)
            faults[name].append(faulted)
    return {name: Samples(np.array(seconds[name]), np.array(faults[name])) for name in names}


def _repeats(call: Callable[[], object], depth: int, least: float) -> int:
    _turn(call, 2, depth)  # warm-up
    seconds, _ = _turn(call, 1, depth)
    if depth > 1 and seconds < least / 4:
        # One call that is waited for takes longer than one of many.
        seconds, _ = _turn(call, 8, depth)
    return min(_MAX_CALLS, math.ceil(least / seconds))


def _turn(call: Callable[[], object], repeats: int, depth: int) -> tuple[float, float]:
    flying = collections.deque()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start = time.perf_counter()
    for _ in range(repeats):
        flying.append(call())
        if len(flying) == depth:
            jax.block_until_ready(flying.popleft())
    jax.block_until_ready(list(flying))
    seconds = time.perf_counter() - start
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    return seconds / repeats, faults / repeats


def summarise(
    samples: Mapping[str, Samples], temporaries: Mapping[str, int], references: Mapping[str, str]
) -> dict:
    """Turn samples into the JSON form that tables and plots are made from.

    Args:
        samples: as `measure` returns them.
        temporaries: temporary bytes by contestant.
        references: what to compare with: label -> contestant. Those that were not timed are left
            out.

    Returns:
        "rounds"; "contestants": per name the time in ms, temporary bytes, page faults per call, and
        under "speedup" and "temporary_ratio" the comparison with each reference label: how many
        times faster, and how many times the temporary memory (None where the reference has none).
    """
    references = {label: name for label, name in references.items() if name in samples}
    contestants = {}
    for name, sample in samples.items():
        contestants[name] = {
            "milliseconds": dataclasses.asdict(spread(sample.seconds * 1e3)),
            "page_faults": float(np.median(sample.page_faults)),
            "temporary_bytes": temporaries[name],
            "speedup": {
                label: dataclasses.asdict(speedup(samples[reference], sample))
                for label, reference in references.items()
            },
            "temporary_ratio": {
                label: temporaries[name] / temporaries[reference]
                if temporaries[reference]
                else None
                for label, reference in references.items()
            },
        }
    rounds = len(next(iter(samples.values())).seconds)
    return {"rounds": rounds, "contestants": contestants}
