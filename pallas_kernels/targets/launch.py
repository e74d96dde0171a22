"""What a caller knows of a kernel and the compiled text does not say."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

TripCounts = Sequence[int] | Callable[[Sequence[Any]], Sequence[int]] | None


@dataclasses.dataclass(frozen=True)
class Launch:
    """What the compiled text does not say about one of a function's kernels.

    Attributes:
        kernel: a part of the kernel's name (the `name` given to `pallas_call`, `kernel_name` or the
            body's name with `plgpu.kernel`) that no other kernel of the function has; "" where
            the function has only one.
        trip_counts: how often each loop of the machine code runs, per entry into it (an inner
            loop's count is per turn of the loop around it): a sequence in order of the addresses
            of the loops' heads, a callable that gets the kernel's loops in that order, or None:
            on a TPU, counts that the compiler knows, the grid's among them, are found; on a GPU,
            the kernel has no loops. Loops that only wait for a barrier are left out of the order.
        grid: GPU: CTAs of the launch, None: read from the compiled kernel.
        bytes_in_flight: GPU: bytes of loads that one CTA keeps under way.
        warpgroups: GPU, for kernels whose warp groups run different code: for each loop, in the
            order of `trip_counts`, the warp groups that run it. None: all of them run all loops.
        bytes_moved: TPU: bytes that the kernel moves to and from HBM in one call, where its
            BlockSpecs do not say (copies written by hand). None: from the BlockSpecs.
    """

    kernel: str = ""
    trip_counts: TripCounts = None
    grid: tuple[int, ...] | None = None
    bytes_in_flight: int | None = None
    warpgroups: Sequence[Sequence[int]] | None = None
    bytes_moved: int | None = None


def launch_for(name: str, launches: Sequence[Launch]) -> Launch:
    """The launch that describes the kernel of that name, or one that says nothing.

    Raises:
        ValueError: several describe it.
    """
    matching = [launch for launch in launches if launch.kernel in name]
    if len(matching) > 1:
        raise ValueError(
            f"launches: {[launch.kernel for launch in matching]} all match the kernel {name!r}; "
            "each kernel must match at most one"
        )
    return matching[0] if matching else Launch()


def resolve_trip_counts(
    name: str, launch: Launch, loops: Sequence[Any], known: Sequence[int | None]
) -> tuple[int, ...] | None:
    """Trip counts of the loops: the caller's, else those known; None where some are unknown.

    Raises:
        ValueError: the number of counts is not the number of loops.
    """
    if launch.trip_counts is None:
        found = tuple(count for count in known if count is not None)
        return found if len(found) == len(loops) else None
    given = launch.trip_counts
    counts = tuple(given(loops) if callable(given) else given)
    if len(counts) != len(loops):
        places = ", ".join(f"{loop.address:#x} (depth {loop.depth})" for loop in loops)
        raise ValueError(
            f"trip_counts={counts} of the kernel {name!r}: it has {len(loops)} loops, "
            f"at {places or 'no address'}; give one count for each, in this order"
        )
    return counts


def turns(loops: Sequence[Any], trip_counts: Sequence[int]) -> tuple[int, ...]:
    """How often each loop's body runs in all, the loops around it included."""
    totals: list[int] = []
    for index, trips in enumerate(trip_counts):
        total, parent = trips, loops[index].parent
        while parent is not None:
            total, parent = total * trip_counts[parent], loops[parent].parent
        totals.append(total)
    return tuple(totals)
