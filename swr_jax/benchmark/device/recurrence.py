"""Section `recurrence`: the operators on a device against what XLA makes of the same recurrence.

bfloat16 in and out, float32 inside, for all. The number of tokens is constant, as rows of T; a row
that is longer makes up for it. `associative_scan` and `sequential_scan` (`lax.scan`) compute the
exact recurrence, since they know no window; the former has two natural forms, with the decay spread
over features by its own arithmetic, or before; after the first length only the faster one is timed.
`... by XLA` is the library's own block two-pass form without a kernel. Names with "gated" have both
gates, those of the scans applied by XLA around them. `heads minor` (TPU) has arrays [B, T, D, H]
for all, the kernels' own layout there.

"copy_fraction" is the rate at which a contestant moves what it must, inputs read once and outputs
written once (forward and backward: what either pass must, the forward's inputs read again), over
that of a copy (u + 1) in the same rounds. Before it is timed, each contestant is compared with the
project's operator of the same window: relative root mean square difference in bfloat16.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax import lax

from swr_jax.benchmark import scans, timing, tpu_baselines
from swr_jax.benchmark.device import contest, platform, speed
from swr_jax.benchmark.records import Session
from swr_jax.ops import gated_sliding_window_recurrence, linear_recurrence
from swr_jax.ops import sliding_window_recurrence as swr

Array = jax.Array

BLOCK_SIZE = 16
DTYPE = jnp.bfloat16
TOLERANCE = 2e-2  # bfloat16, through sums of many terms in the gradients of decays
MODES = ("forward", "forward+backward")
SCANS = ("associative_scan", "associative_scan, broadcast")
REFERENCES = (*SCANS, "sequential_scan", "copy")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Shapes that are timed."""

    lengths: tuple[int, ...]
    tokens: int  # of all rows together, if there is more than one
    heads: int
    features: int
    budget: timing.Budget


FULL = Sizes(
    lengths=(8192, 131072, 2048, 32768),  # what targets are judged by comes first
    tokens=65536,
    heads=128,
    features=16,
    budget=timing.Budget(seconds=2, min_rounds=5, max_rounds=21),
)
TINY = Sizes(
    lengths=(32, 48),
    tokens=64,
    heads=2,
    features=8,
    budget=timing.Budget(seconds=0, min_rounds=2, max_rounds=2),
)


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A function of a group's arguments.

    Attributes:
        function: a, (b, c,) v -> x.
        lookback: its window.
    """

    function: Callable[..., Array]
    lookback: int | None


def _in_float32(scan: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    return lambda a, u: scan(a.astype(jnp.float32), u.astype(jnp.float32)).astype(u.dtype)


@_in_float32
def _associative(a: Array, u: Array) -> Array:
    return scans.associative_scan(a[..., None], u)


@_in_float32
def _associative_broadcast(a: Array, u: Array) -> Array:
    a = jnp.broadcast_to(a[..., None], u.shape)
    return scans.associative_scan(a, u)


@_in_float32
def _sequential(a: Array, u: Array) -> Array:
    def step(state: Array, token: tuple[Array, Array]) -> tuple[Array, Array]:
        state = token[0][..., None] * state + token[1]
        return state, state

    tokens = (jnp.moveaxis(a, 1, 0), jnp.moveaxis(u, 1, 0))
    return jnp.moveaxis(lax.scan(step, jnp.zeros_like(u[:, 0]), tokens)[1], 0, 1)


def _gated(scan: Callable[[Array, Array], Array]) -> Callable[..., Array]:
    return lambda a, b, c, v: scan(a, b * v) * c + v


def groups() -> dict[str, dict[str, Contestant]]:
    """Return who takes turns with whom on this device: those with the same arguments."""
    gated = functools.partial(gated_sliding_window_recurrence, block_size=BLOCK_SIZE)
    found = {
        "plain": {
            "sliding_window_recurrence": Contestant(swr, 1),
            "linear_recurrence": Contestant(linear_recurrence, None),
            "sliding_window_recurrence by XLA": Contestant(
                functools.partial(swr, implementation="xla"), 1
            ),
            "linear_recurrence by XLA": Contestant(
                functools.partial(linear_recurrence, implementation="xla"), None
            ),
            "associative_scan": Contestant(_associative, None),
            "associative_scan, broadcast": Contestant(_associative_broadcast, None),
            "sequential_scan": Contestant(_sequential, None),
        },
        "gated": {
            "gated_sliding_window_recurrence": Contestant(gated, 1),
            "gated linear_recurrence": Contestant(functools.partial(gated, lookback=None), None),
            "gated_sliding_window_recurrence by XLA": Contestant(
                functools.partial(gated, implementation="xla"), 1
            ),
            "associative_scan": Contestant(_gated(_associative), None),
        },
    }
    if platform.Backend("mosaic_tpu") in platform.backends():
        found["heads minor"] = {
            name: Contestant(tpu_baselines.CONTESTANTS[kind][name].run, lookback)
            for kind, name, lookback in (
                ("kernels", "window kernel", 1),
                ("kernels", "exact kernel", None),
                ("programs", "associative_scan", None),
            )
        }
    return found


def run(sizes: Sizes, session: Session) -> Iterator[dict]:
    """Time every contestant at every length, forward and forward+backward.

    Yields:
        "case", "group", "tokens" (T), "batch", "mode", and what `contest.hold` returns, with
        "bytes" and "copy_fraction" of each contestant.
    """
    for length in sizes.lengths:
        found = {
            f"{group}, T {length}, {mode}": (group, mode) for group in groups() for mode in MODES
        }
        pending = {case: key for case, key in found.items() if not session.is_done(case)}
        if session.is_over():
            yield from map(session.left_out, pending)
            continue
        shapes = {
            group: jax.eval_shape(functools.partial(draw, group, length, sizes))
            for group, _ in pending.values()
        }
        programs = contest.compile_cases(
            {
                case: entrants(group, mode, *shapes[group], session)
                for case, (group, mode) in pending.items()
            }
        )
        for group in shapes:
            sets, cotangent = draw(group, length, sizes)
            for case, (other, mode) in pending.items():
                if other != group:
                    continue
                shape = {"tokens": length, "batch": cotangent.shape[0]}
                yield {"case": case, "group": group, **shape, "mode": mode} | _time(
                    entrants(group, mode, sets, cotangent, session),
                    programs.pop(case),
                    groups()[group],
                    minimal_bytes(sets[0], mode),
                    sizes.budget,
                )


def entrants(
    group: str, mode: str, sets: list[tuple[Array, ...]], cotangent: Array, session: Session
) -> dict[str, contest.Entrant]:
    """Return all contestants of a group and the copy, for arguments or their shapes."""
    both = mode == "forward+backward"
    found = {}
    slower = _slower_form(group, mode, session)
    for name, contestant in groups()[group].items():
        if name == slower:
            continue
        found[name] = contest.Entrant(
            timing.with_gradient(contestant.function) if both else contestant.function,
            [(arguments, cotangent) for arguments in sets] if both else sets,
            contest.expected_seconds(
                session.record["measurements"], name, *cotangent.shape[:2], group=group, mode=mode
            ),
        )
    found["copy"] = contest.Entrant(speed.copy, [(arguments[-1],) for arguments in sets])
    return found


def _slower_form(group: str, mode: str, session: Session) -> str | None:
    """Return the form of associative_scan that was slower at the first length, if that is known."""
    for m in session.record["measurements"]:
        if (m["group"], m["mode"]) == (group, mode) and all(
            name in m["contestants"] for name in SCANS
        ):
            times = {n: m["contestants"][n]["milliseconds"]["median"] for n in SCANS}
            return max(times, key=times.get)
    return None


def _time(
    entrants: dict[str, contest.Entrant],
    programs: dict[str, contest.Program],
    contestants: dict[str, Contestant],
    least_bytes: int,
    budget: timing.Budget,
) -> dict:
    # The project's operators come first.
    peers = {
        name: next(n for n, c in contestants.items() if c.lookback == contestant.lookback)
        for name, contestant in contestants.items()
    }
    found = contest.hold(
        entrants, budget, REFERENCES, peers=contest.Peers(peers, TOLERANCE), programs=programs
    )
    copied = 2 * entrants["copy"].sets[0][0].nbytes
    for name, contestant in found["contestants"].items():
        contestant["bytes"] = copied if name == "copy" else least_bytes
        if "copy" in contestant["speedup"]:
            contestant["copy_fraction"] = {
                key: value * contestant["bytes"] / copied
                for key, value in contestant["speedup"]["copy"].items()
            }
    return found


def draw(group: str, length: int, sizes: Sizes) -> tuple[list[tuple[Array, ...]], Array]:
    """Return sets of arguments, and a cotangent of the output."""
    rows = (max(1, sizes.tokens // length), length)
    heads_and_features = (sizes.heads, sizes.features)
    if group == "heads minor":
        heads_and_features = heads_and_features[::-1]
    arrays = 3 if group == "gated" else 1

    @jax.jit
    def draw_set(key: Array) -> tuple[Array, ...]:
        key, *keys = jax.random.split(key, 1 + arrays)
        values = (jax.random.normal(k, (*rows, *heads_and_features), DTYPE) for k in keys)
        return jax.random.uniform(key, (*rows, sizes.heads), DTYPE), *values

    first, cotangent = draw_set(jax.random.key(0)), draw_set(jax.random.key(1))[-1]
    count = timing.rotation(sum(x.nbytes for x in first))
    return [first, *(draw_set(jax.random.key(i)) for i in range(2, count + 1))], cotangent


def minimal_bytes(arguments: tuple[Array, ...], mode: str) -> int:
    """Return what must be moved: inputs read once, outputs written once, in either pass."""
    read, x = sum(x.nbytes for x in arguments), arguments[-1].nbytes
    return read + x + (2 * read + x if mode == "forward+backward" else 0)
