"""Contestants compiled together, and timed by turns; who cannot take part is left out by reason."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from swr_jax.benchmark import timing
from swr_jax.benchmark.device import platform
from swr_jax.benchmark.records import first_line

Program = jax.stages.Compiled | Exception

# A call that is expected to take longer is not timed.
SLOWEST_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class Entrant:
    """A contestant.

    Attributes:
        function: what is timed.
        sets: argument tuples that successive calls take in turn; of equal shapes.
        expected: seconds that a call should take at most, by what is known; None: unknown.
    """

    function: Callable
    sets: Sequence[tuple]
    expected: float | None = None


@dataclasses.dataclass(frozen=True)
class Peers:
    """Who computes the same.

    Attributes:
        of: by name, the contestant that it must agree with.
        tolerance: largest relative root mean square difference of any array.
    """

    of: Mapping[str, str]
    tolerance: float


def hold(
    entrants: Mapping[str, Entrant],
    budget: timing.Budget,
    references: Sequence[str],
    peers: Peers | None = None,
    programs: Mapping[str, Program] | None = None,
) -> dict:
    """Time contestants side by side.

    Args:
        entrants: by name.
        budget: of the rounds.
        references: names that all are compared with.
        peers: what is compared before it is timed; who disagrees is left out.
        programs: what `compile_cases` made of the entrants; None: they are compiled now.

    Returns:
        What `timing.summarise` returns (with no contestants, if all are left out); "left_out": the
        reason by name; and "differences" from the peers by name.
    """
    if programs is None:
        programs = compile_cases({"": entrants})[""]
    programs, left_out = choose(entrants, programs)
    calls, differences = {}, {}
    for name, program in programs.items():
        calls[name] = timing.Rotation(program, entrants[name].sets)
        try:
            out = jax.block_until_ready(calls[name]())
            peer = None if peers is None else peers.of.get(name)
            if peer in programs and peer != name:
                differences[name] = difference(out, programs[peer](*entrants[peer].sets[0]))
        except jax.errors.JaxRuntimeError as error:
            left_out[name] = f"does not run: {first_line(error)}"
            del calls[name]
            continue
        if name in differences and not differences[name] <= peers.tolerance:
            left_out[name] = f"differs from {peer} by {differences[name]:.1e}"
            del calls[name]
    summary = {"rounds": 0, "contestants": {}}
    if calls:
        samples = timing.measure(calls, budget, in_flight=depths(programs, calls))
        temporaries = {name: timing.temporary_bytes(programs[name]) for name in calls}
        summary = timing.summarise(samples, temporaries, {name: name for name in references})
    return {**summary, "left_out": left_out, "differences": differences}


def compile_cases(cases: Mapping[str, Mapping[str, Entrant]]) -> dict[str, dict[str, Program]]:
    """Compile the entrants of several cases at once; arguments may be shapes.

    Who is expected to be too slow is not compiled.
    """
    lower = {
        (case, name): functools.partial(jax.jit(entrant.function).lower, *entrant.sets[0])
        for case, entrants in cases.items()
        for name, entrant in entrants.items()
        if not _is_too_slow(entrant)
    }
    compiled = timing.compile_all(lower)
    return {
        case: {name: compiled[case, name] for name in entrants if (case, name) in compiled}
        for case, entrants in cases.items()
    }


def choose(
    entrants: Mapping[str, Entrant], programs: Mapping[str, Program]
) -> tuple[dict[str, jax.stages.Compiled], dict[str, str]]:
    """Return the executables that can be run, and reasons for the others."""
    chosen, left_out = {}, {}
    for name, entrant in entrants.items():
        program = programs.get(name)
        if _is_too_slow(entrant):
            known = math.isfinite(entrant.expected)
            left_out[name] = "a call might take " + (
                f"{entrant.expected:.1f} s" if known else "longer still than at a shorter length"
            )
        elif isinstance(program, Exception):
            left_out[name] = f"does not compile: {first_line(program)}"
        elif shortage := lacking_bytes(program):
            left_out[name] = f"needs {shortage / 2**30:.1f} GiB more memory than is free"
        else:
            chosen[name] = program
    return chosen, left_out


def _is_too_slow(entrant: Entrant) -> bool:
    return entrant.expected is not None and entrant.expected > SLOWEST_SECONDS


def lacking_bytes(program: jax.stages.Compiled) -> int:
    """Return how much more memory a call needs, besides its arguments, than is free; 0 if none."""
    free = platform.free_bytes()
    if free is None:
        return 0
    memory = program.memory_analysis()
    held = memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    return max(0, held - free)


def depths(programs: Mapping[str, jax.stages.Compiled], names) -> dict[str, int] | None:
    """Return how many calls of each may be in flight; None where each should be waited for."""
    if not platform.is_pipelined():
        return None
    free = platform.free_bytes() or 0
    return {name: timing.calls_in_flight(programs[name], free) for name in names}


def difference(actual, expected) -> float:
    """Return the largest relative root mean square difference of two pytrees' arrays."""

    @jax.jit
    def largest(actual, expected):
        def relative(x, y):
            x, y = x.astype(jnp.float32), y.astype(jnp.float32)
            return jnp.sqrt(jnp.sum((x - y) ** 2) / jnp.sum(y**2))

        return jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(relative, actual, expected))))

    return float(largest(actual, expected))


def expected_seconds(
    measurements: Sequence[dict], name: str, batch: int, tokens: int, **same: object
) -> float | None:
    """Return the longest that a call of a contestant can take, by how long another one took.

    Args:
        measurements: earlier ones.
        name: of the contestant. If it was too slow at shorter rows, it is expected never to end.
        batch, tokens: rows, and tokens in a row. Work grows at most with the square of the latter.
        **same: what a measurement must have in common with this one.
    """
    like = [m for m in measurements if all(m.get(key) == value for key, value in same.items())]
    if any("might take" in m["left_out"].get(name, "") for m in like if m["tokens"] <= tokens):
        return math.inf
    like = [m for m in like if name in m["contestants"]]
    if not like:
        return None
    last = max(like, key=lambda m: m["tokens"])
    growth = batch * tokens**2 / (last["batch"] * last["tokens"] ** 2)
    return growth * last["contestants"][name]["milliseconds"]["median"] / 1e3
