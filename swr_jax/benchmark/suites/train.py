"""The trainer: updates of models of equal size, and what it costs beside them."""

import dataclasses

from swr_jax.benchmark import trainer, updates
from swr_jax.benchmark.device import training
from swr_jax.benchmark.suites import device
from swr_jax.benchmark.suites.section import Section

SECTIONS = {
    "models": Section(
        run=updates.run,
        full=updates.FULL,
        tiny=updates.TINY,
        references=updates.REFERENCES,
        shapes="width 256, 4 blocks, 16384 tokens an update in rows of T, windows of 512, float32",
        description=updates.__doc__,
        targets=lambda record, _: updates.targets(record["measurements"]),
    ),
    "large": dataclasses.replace(
        device.SECTIONS["training"],
        full=training.EVERY,
        tiny=training.EVERY_TINY,
        seconds=float("inf"),
        device_only=True,
    ),
    "loop": Section(
        run=trainer.run,
        full=trainer.FULL,
        tiny=trainer.TINY,
        references=(),
        shapes="the small Phalanx hybrid of width 128, 16 rows of 256 tokens, float32",
        description=trainer.__doc__,
        targets=lambda record, _: trainer.targets(record["measurements"]),
    ),
}
