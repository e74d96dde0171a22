"""What `experiments/benchmark.py` can run: suites of sections."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from swr_jax.benchmark import decoding, layers, recurrence, timing, trainer, updates
from swr_jax.benchmark.device import cells, check, decode, speed, training, tuning
from swr_jax.benchmark.device import layers as device_layers
from swr_jax.benchmark.device import recurrence as device_recurrence
from swr_jax.benchmark.device import report as device_report
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
        run=lambda sizes, _: recurrence.run(sizes),
        full=recurrence.FULL,
        tiny=recurrence.TINY,
        references=recurrence.REFERENCES,
        shapes="B 1, H 64, D 16, block 16, lookback 1, float32",
        description=recurrence.__doc__,
        targets=lambda record, sizes: recurrence.targets(record["measurements"], sizes),
    ),
    "layers": Section(
        run=lambda sizes, _: layers.run(sizes),
        full=layers.FULL,
        tiny=layers.TINY,
        references=layers.REFERENCES,
        shapes="B 1, attention window 512 and heads of 64, float32",
        description=layers.__doc__,
    ),
}

# Seconds add up to less than eight minutes, with some to spare for sections' first steps.
DEVICE = {
    "check": Section(
        run=check.run,
        full=check.FULL,
        tiny=check.TINY,
        references=(),
        shapes="recurrences of up to 8197 tokens of 128 heads of 16 features, mLSTMs of up to 2053",
        description=check.__doc__,
        seconds=90,
        faults=check.faults,
    ),
    "speed": Section(
        run=speed.run,
        full=speed.FULL,
        tiny=speed.TINY,
        references=(),
        shapes="copies of up to 1 GiB, products of up to 8192 x 8192",
        description=speed.__doc__,
        seconds=10,
    ),
    "recurrence": Section(
        run=device_recurrence.run,
        full=device_recurrence.FULL,
        tiny=device_recurrence.TINY,
        references=("associative_scan", "sequential_scan"),
        shapes="65536 tokens in rows of T, H 128, D 16, block 16, bfloat16",
        description=device_recurrence.__doc__,
        targets=device_report.recurrence_targets,
        seconds=85,
    ),
    "mlstm": Section(
        run=cells.run,
        full=cells.FULL,
        tiny=cells.TINY,
        references=cells.REFERENCES,
        shapes="65536 tokens in rows of T, H 16, Dk 128, Dv 256, bfloat16",
        description=cells.__doc__,
        targets=device_report.mlstm_targets,
        seconds=45,
    ),
    "layers": Section(
        run=device_layers.run,
        full=device_layers.FULL,
        tiny=device_layers.TINY,
        references=device_layers.REFERENCES,
        shapes="32768 tokens in rows of T, attention window 512 and heads of 128, bfloat16",
        description=device_layers.__doc__,
        targets=device_report.layer_targets,
        seconds=75,
    ),
    "training": Section(
        run=training.run,
        full=training.FULL,
        tiny=training.TINY,
        references=training.REFERENCES,
        shapes="32768 tokens an update in rows of T, bfloat16 activations, float32 parameters",
        description=training.__doc__,
        targets=device_report.training_targets,
        seconds=80,
    ),
    "decode": Section(
        run=decode.run,
        full=decode.FULL,
        tiny=decode.TINY,
        references=decode.REFERENCES,
        shapes="one token for each of B streams, bfloat16",
        description=decode.__doc__,
        seconds=35,
    ),
    "tuning": Section(
        run=tuning.run,
        full=tuning.FULL,
        tiny=tuning.TINY,
        references=(),
        shapes="B 8, T 8192, H 128, D 16, bfloat16",
        description=tuning.__doc__,
        seconds=45,
    ),
}

DECODE = {
    "context": Section(
        run=lambda sizes, _: decoding.run(sizes),
        full=decoding.FULL,
        tiny=decoding.TINY,
        references=decoding.REFERENCES,
        shapes="one stream, width 256, 4 mixers, attention heads of 64 and windows of 512, float32",
        description=decoding.__doc__,
    ),
}

TRAIN = {
    "models": Section(
        run=lambda sizes, _: updates.run(sizes),
        full=updates.FULL,
        tiny=updates.TINY,
        references=updates.REFERENCES,
        shapes="width 256, 4 blocks, 16384 tokens an update in rows of T, windows of 512, float32",
        description=updates.__doc__,
        targets=lambda record, _: updates.targets(record["measurements"]),
    ),
    "loop": Section(
        run=lambda sizes, _: trainer.run(sizes),
        full=trainer.FULL,
        tiny=trainer.TINY,
        references=(),
        shapes="the small Phalanx hybrid of width 128, 16 rows of 256 tokens, float32",
        description=trainer.__doc__,
        targets=lambda record, _: trainer.targets(record["measurements"]),
    ),
}

SUITES = {"cpu": CPU, "device": DEVICE, "decode": DECODE, "train": TRAIN}
