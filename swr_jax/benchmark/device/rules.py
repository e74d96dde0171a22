"""Section `gated_delta`: the rule at the shapes of the mLSTM, against XLA's form.

65,536 tokens in rows of T, 16 heads with unit keys and queries of 128 features and values of 256,
bfloat16 with float32 gates and maths. `by XLA` is the library's own chunkwise form without a
kernel. Before they are timed they are compared: relative root mean square difference of the outputs
and of all gradients.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from swr_jax.benchmark import timing
from swr_jax.benchmark.device import cells, memories
from swr_jax.benchmark.device.memories import DTYPE, Sizes
from swr_jax.benchmark.records import Session
from swr_jax.ops import gated_delta_rule

Array = jax.Array

REFERENCES = ("gated_delta_rule by XLA",)

FULL = dataclasses.replace(
    cells.FULL,
    lengths=(8192, 65536),
    chunk_size=64,
    budget=timing.Budget(seconds=1, min_rounds=5, max_rounds=21),
)
TINY = cells.TINY


def _contestants(sizes: Sizes) -> dict[str, tuple[Callable[..., Array], str | None]]:
    by_xla = functools.partial(gated_delta_rule, chunk_size=sizes.chunk_size, implementation="xla")
    return {
        "gated_delta_rule": (gated_delta_rule, None),
        REFERENCES[0]: (by_xla, "gated_delta_rule"),
    }


def _given(q: Array, k: Array, v: Array, alpha: Array, beta: Array) -> tuple[Array, ...]:
    def unit(x: Array) -> Array:
        x = x.astype(jnp.float32)
        return (x / jnp.linalg.norm(x, axis=-1, keepdims=True)).astype(DTYPE)

    # Half of what is there is forgotten in some ten tokens.
    return unit(q), unit(k), v, jax.nn.sigmoid(alpha + 3), jax.nn.sigmoid(beta)


_CONTEST = memories.Contest("gated_delta", _contestants, _given, REFERENCES)


def run(sizes: Sizes, session: Session) -> Iterator[dict]:
    """Time the rule and XLA's form at every length, as `memories.run` does."""
    yield from memories.run(_CONTEST, sizes, session)
