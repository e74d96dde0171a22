"""Section `mlstm`: the operator at its published shapes, against XLA's form and full attention.

65,536 tokens in rows of T, bfloat16 with float32 gates and maths. The mLSTM has 16 heads with
queries and keys of 128 features and values of 256, as wide as attention's 32 heads of 128, which
runs through what the project's operator picks on this device (its queries turned by no rotary
positions). `mlstm` has the exponential input gate and chunks of 128 tokens; `by XLA` is the
library's own chunkwise form without a kernel. Before they are timed, those that compute the same
are compared: relative root mean square difference of the outputs and of all gradients.

Published for an H100 at the same sizes, forward+backward (arXiv 2503.14376): 15.2 ms at T 8192 with
the exponential gate, 12.8 ms with the sigmoid gate, in kernels that leave out the gradient through
the normalizer, which these have.
"""

import functools
from collections.abc import Callable, Iterator

import jax

from swr_jax.benchmark import timing
from swr_jax.benchmark.device import memories
from swr_jax.benchmark.device.memories import ATTENTION, DTYPE, Sizes
from swr_jax.benchmark.records import Session
from swr_jax.ops import mlstm, sliding_window_attention

Array = jax.Array

REFERENCES = ("mlstm by XLA", ATTENTION)

FULL = Sizes(
    lengths=(8192, 4096, 65536, 2048, 16384, 32768),  # what targets are judged by comes first
    tokens=65536,
    heads=16,
    q_dim=128,
    v_dim=256,
    attention_dim=128,
    chunk_size=128,
    budget=timing.Budget(seconds=1.5, min_rounds=5, max_rounds=21),
)
TINY = Sizes(
    lengths=(48,),
    tokens=48,
    heads=1,
    q_dim=16,
    v_dim=32,
    attention_dim=16,
    chunk_size=16,
    budget=timing.Budget(seconds=0, min_rounds=2, max_rounds=2),
)


def _contestants(sizes: Sizes) -> dict[str, tuple[Callable[..., Array], str | None]]:
    """Return functions, and with whom each must agree."""
    cell = functools.partial(mlstm, chunk_size=sizes.chunk_size)
    return {
        "mlstm": (cell, None),
        "mlstm, twice the chunk": (
            functools.partial(mlstm, chunk_size=2 * sizes.chunk_size),
            "mlstm",
        ),
        "mlstm by XLA": (functools.partial(cell, implementation="xla"), "mlstm"),
        "mlstm, sigmoid": (functools.partial(cell, input_gate="sigmoid"), None),
        ATTENTION: (functools.partial(sliding_window_attention, window=None), None),
    }


def _given(q: Array, k: Array, v: Array, i: Array, f: Array) -> tuple[Array, ...]:
    q, k = ((x + 0.25).astype(DTYPE) for x in (q, k))
    return q, k, v, i, f + 3


_CONTEST = memories.Contest("mlstm", _contestants, _given, REFERENCES)


def run(sizes: Sizes, session: Session) -> Iterator[dict]:
    """Time every contestant at every length, as `memories.run` does."""
    yield from memories.run(_CONTEST, sizes, session)
