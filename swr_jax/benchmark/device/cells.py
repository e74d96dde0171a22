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

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from swr_jax.benchmark import timing
from swr_jax.benchmark.device import contest
from swr_jax.benchmark.records import Session
from swr_jax.ops import mlstm, sliding_window_attention

Array = jax.Array

DTYPE = jnp.bfloat16
TOLERANCE = 2e-2  # bfloat16, through sums of many terms in the gradients of gates
MODES = ("forward", "forward+backward")
REFERENCES = ("mlstm by XLA", "full_attention")
ATTENTION = "full_attention"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Shapes that are timed; attention is as wide as the values of all heads together."""

    lengths: tuple[int, ...]
    tokens: int  # of all rows together, if there is more than one
    heads: int
    q_dim: int
    v_dim: int
    attention_dim: int
    chunk_size: int
    budget: timing.Budget


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


def contestants(sizes: Sizes) -> dict[str, tuple[Callable[..., Array], str | None]]:
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


def run(sizes: Sizes, session: Session) -> Iterator[dict]:
    """Time every contestant at every length, forward and forward+backward.

    Yields:
        "case", "group", "tokens" (T), "batch", "mode", and what `contest.hold` returns.
    """
    for length in sizes.lengths:
        found = {f"T {length}, {mode}": mode for mode in MODES}
        pending = {case: mode for case, mode in found.items() if not session.is_done(case)}
        if session.is_over():
            yield from map(session.left_out, pending)
            continue
        if not pending:
            continue
        shapes = jax.eval_shape(functools.partial(draw, length, sizes))
        programs = contest.compile_cases(
            {case: entrants(mode, *shapes, sizes, session) for case, mode in pending.items()}
        )
        drawn = draw(length, sizes)
        peers = {name: peer for name, (_, peer) in contestants(sizes).items() if peer}
        for case, mode in pending.items():
            shape = {"tokens": length, "batch": drawn[1].shape[0]}
            yield {"case": case, "group": "mlstm", **shape, "mode": mode} | contest.hold(
                entrants(mode, *drawn, sizes, session),
                sizes.budget,
                REFERENCES,
                peers=contest.Peers(peers, TOLERANCE),
                programs=programs.pop(case),
            )


def entrants(
    mode: str,
    sets: list[dict[str, tuple[Array, ...]]],
    cotangent: Array,
    sizes: Sizes,
    session: Session,
) -> dict[str, contest.Entrant]:
    """Return all contestants, for arguments or their shapes."""
    found = {}
    for name, (function, _) in contestants(sizes).items():
        arguments = [x["attention" if name == ATTENTION else "mlstm"] for x in sets]
        if mode == "forward+backward":
            function = timing.with_gradient(function)
            like = arguments[0][2].shape
            # Of the same width, by heads of another size.
            out = jax.eval_shape(lambda x, like=like: x.reshape(like), cotangent)
            own = out if isinstance(cotangent, jax.ShapeDtypeStruct) else cotangent.reshape(like)
            arguments = [(x, own) for x in arguments]
        expected = contest.expected_seconds(
            session.record["measurements"], name, *cotangent.shape[:2], mode=mode
        )
        found[name] = contest.Entrant(function, arguments, expected)
    return found


def draw(length: int, sizes: Sizes) -> tuple[list[dict[str, tuple[Array, ...]]], Array]:
    """Return sets of arguments, by operator, and a cotangent of the output [B, T, H, Dv]."""
    rows = (max(1, sizes.tokens // length), length)
    attention = (*rows, sizes.heads * sizes.v_dim // sizes.attention_dim, sizes.attention_dim)

    @jax.jit
    def draw_set(seed: int) -> dict[str, tuple[Array, ...]]:
        keys = iter(jax.random.split(jax.random.key(seed), 8))

        def normal(*shape: int, dtype: jnp.dtype = DTYPE) -> Array:
            return jax.random.normal(next(keys), shape, dtype)

        q, k = (normal(*rows, sizes.heads, sizes.q_dim) + 0.25 for _ in range(2))
        v = normal(*rows, sizes.heads, sizes.v_dim)
        i, f = (normal(*rows, sizes.heads, dtype=jnp.float32) for _ in range(2))
        wide = tuple(normal(*attention) for _ in range(3))
        return {"mlstm": (q.astype(DTYPE), k.astype(DTYPE), v, i, f + 3), "attention": wide}

    first = draw_set(0)
    count = timing.rotation(sum(x.nbytes for x in first["mlstm"]))
    return [first, *(draw_set(i) for i in range(2, count + 1))], draw_set(1)["mlstm"][2]
