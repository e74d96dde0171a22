"""What a suite is made of."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from swr_jax.benchmark import timing
from swr_jax.benchmark.records import Session

_PROTOCOL = " ".join(timing.__doc__.split())


@dataclasses.dataclass(frozen=True)
class Section:
    """One part of a suite: it measures, and knows what its measurements are compared with.

    Attributes:
        run: takes the sizes and a `Session`, yields measurements, each with its "case"; or
            "left_out", the reason why a case was not measured.
        full, tiny: sizes that `run` takes.
        references: contestants that the others are compared with in tables.
        shapes: what is measured, in short.
        description: the same at length, for the record.
        targets: judges measurements, by the record and those of the sections before.
        seconds: how long it may take on a device.
        faults: what is wrong, by the record: nothing is timed while there is something.
        device_only: whether its full sizes are for GPUs and TPUs alone.
    """

    run: Callable[[Any, Session], Iterator[dict]]
    full: Any
    tiny: Any
    references: tuple[str, ...]
    shapes: str
    description: str
    targets: Callable[[Mapping, Any], list[dict]] | None = None
    seconds: float = float("inf")
    faults: Callable[[Mapping], list[str]] | None = None
    device_only: bool = False

    @property
    def protocol(self) -> dict:
        """What a reader of the figures must know."""
        return {
            "shapes": self.shapes,
            "timing": _PROTOCOL,
            "contestants": " ".join(self.description.split()),
        }
