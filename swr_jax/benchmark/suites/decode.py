"""One stream's next token, after long contexts."""

from swr_jax.benchmark import decoding
from swr_jax.benchmark.suites.section import Section

SECTIONS = {
    "context": Section(
        run=lambda sizes, _: decoding.run(sizes),
        full=decoding.FULL,
        tiny=decoding.TINY,
        references=decoding.REFERENCES,
        shapes="one stream, width 256, 4 mixers, attention heads of 64 and windows of 512, float32",
        description=decoding.__doc__,
    ),
}
