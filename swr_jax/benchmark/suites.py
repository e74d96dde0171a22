"""What `experiments/benchmark.py` can run: suites of sections."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from swr_jax.benchmark import layers, recurrence, timing

_PROTOCOL = " ".join(timing.__doc__.split())


@dataclasses.dataclass(frozen=True)
class Section:
    """One part of a suite: it measures, and knows what its measurements are compared with."""

    run: Callable[[Any], Iterator[dict]]
    full: Any  # the sizes that `run` takes
    tiny: Any
    references: tuple[str, ...]
    shapes: str
    description: str
    targets: Callable[[list[dict], Any], list[dict]] | None = None

    @property
    def protocol(self) -> dict:
        """What a reader of the figures must know."""
        return {
            "shapes": self.shapes,
            "timing": _PROTOCOL,
            "contestants": " ".join(self.description.split()),
        }


CPU = {
    "recurrence": Section(
        run=recurrence.run,
        full=recurrence.FULL,
        tiny=recurrence.TINY,
        references=recurrence.REFERENCES,
        shapes="B 1, H 64, D 16, block 16, lookback 1, float32",
        description=recurrence.__doc__,
        targets=recurrence.targets,
    ),
    "layers": Section(
        run=layers.run,
        full=layers.FULL,
        tiny=layers.TINY,
        references=layers.REFERENCES,
        shapes="B 1, attention window 512 and heads of 64, float32",
        description=layers.__doc__,
    ),
}

SUITES = {"cpu": CPU}
