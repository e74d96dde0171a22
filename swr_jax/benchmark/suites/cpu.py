"""The operators and the layers, on the CPU."""

from swr_jax.benchmark import layers, recurrence
from swr_jax.benchmark.suites.section import Section

SECTIONS = {
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
