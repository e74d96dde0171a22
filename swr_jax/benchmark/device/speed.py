"""Section `speed`: what this very device can do, to hold everything else against.

Copy bandwidth is that of x + 1, bytes read and written, bfloat16; matrix throughput that of a
square product in bfloat16, and in float32 as JAX does it by default. The dispatch is what a call
of a tiny program takes when many are dispatched back to back: what takes not much longer than that
is bound by the host, not by the device.
"""

import dataclasses
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp

from swr_jax.benchmark import timing
from swr_jax.benchmark.device import contest
from swr_jax.benchmark.records import Session


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is timed."""

    copy_bytes: tuple[int, ...]
    widths: tuple[int, ...]  # of square matrices
    budget: timing.Budget


FULL = Sizes(
    copy_bytes=(2**28, 2**30),
    widths=(4096, 8192),
    budget=timing.Budget(seconds=0.5, min_rounds=7, max_rounds=31),
)
TINY = Sizes(
    copy_bytes=(2**16,),
    widths=(64,),
    budget=timing.Budget(seconds=0, min_rounds=2, max_rounds=2),
)


def run(sizes: Sizes, session: Session) -> Iterator[dict]:
    """Time copies, products and the dispatch.

    Yields:
        "case", "quantity" ("copy", "product" or "dispatch"), "dtype", "work" (bytes, floating-point
        operations, or one call), and what `contest.hold` returns, with a "rate" of work a second.
    """
    for size in sizes.copy_bytes:
        yield from _time(sizes, session, "copy", copy, ((size // 2,),), "bfloat16", 2 * size)
    for width in sizes.widths:
        for dtype in ("bfloat16", "float32"):
            shapes = ((width, width),) * 2
            yield from _time(sizes, session, "product", jnp.matmul, shapes, dtype, 2 * width**3)
    yield from _time(sizes, session, "dispatch", copy, ((8,),), "float32", 1)


def copy(x: jax.Array) -> jax.Array:
    """Read and write an array, with no arithmetic to speak of."""
    return x + 1


def _time(
    sizes: Sizes, session: Session, quantity: str, function, shapes, dtype: str, work: int
) -> Iterator[dict]:
    case = f"{quantity}, {' and '.join(str(list(shape)) for shape in shapes)} {dtype}"
    if session.is_done(case):
        return
    sets = [
        tuple(jax.random.normal(jax.random.key(i), shape, dtype) for shape in shapes)
        for i in range(2)
    ]
    found = contest.hold({quantity: contest.Entrant(function, sets)}, sizes.budget, ())
    if found["left_out"]:
        yield session.left_out(case, found["left_out"][quantity])
        return
    contestant = found["contestants"][quantity]
    ms = contestant["milliseconds"]
    slow_to_fast = {"median": ms["median"], "lower": ms["upper"], "upper": ms["lower"]}
    contestant["rate"] = {key: work / (value / 1e3) for key, value in slow_to_fast.items()}
    yield {"case": case, "quantity": quantity, "dtype": dtype, "work": work, **found}


def best(record: Mapping | None, quantity: str, dtype: str) -> float | None:
    """Return the highest median rate of a quantity; None where it was not measured."""
    rates = [
        contestant["rate"]["median"]
        for m in (record["measurements"] if record else ())
        if (m["quantity"], m["dtype"]) == (quantity, dtype)
        for contestant in m["contestants"].values()
    ]
    return max(rates, default=None)
