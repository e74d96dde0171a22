"""What the sections of operators with a matrix memory have in common: shapes, draws, timing.

Rows of T tokens, bfloat16 with float32 gates and maths; contestants that compute the same are
compared before they are timed: relative root mean square difference of the outputs and of all
gradients.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from swr_jax.benchmark import timing
from swr_jax.benchmark.device import contest
from swr_jax.benchmark.records import Session

Array = jax.Array

DTYPE = jnp.bfloat16
TOLERANCE = 2e-2  # bfloat16, through sums of many terms in the gradients of gates
MODES = ("forward", "forward+backward")
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


@dataclasses.dataclass(frozen=True)
class Contest:
    """Who is timed against whom.

    Attributes:
        group: what measurements call them.
        contestants: takes sizes to functions, and with whom each must agree.
        given: takes q, k [B, T, H, Dk], v [B, T, H, Dv] and two of standard normal numbers
            [B, T, H] in float32 to what the functions take.
        references: names that all are compared with.
    """

    group: str
    contestants: Callable[[Sizes], dict[str, tuple[Callable[..., Array], str | None]]]
    given: Callable[..., tuple[Array, ...]]
    references: tuple[str, ...]


def run(of: Contest, sizes: Sizes, session: Session) -> Iterator[dict]:
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
        shapes = jax.eval_shape(functools.partial(draw, of, length, sizes))
        programs = contest.compile_cases(
            {case: entrants(of, mode, *shapes, sizes, session) for case, mode in pending.items()}
        )
        drawn = draw(of, length, sizes)
        peers = {name: peer for name, (_, peer) in of.contestants(sizes).items() if peer}
        for case, mode in pending.items():
            shape = {"tokens": length, "batch": drawn[1].shape[0]}
            yield {"case": case, "group": of.group, **shape, "mode": mode} | contest.hold(
                entrants(of, mode, *drawn, sizes, session),
                sizes.budget,
                of.references,
                peers=contest.Peers(peers, TOLERANCE),
                programs=programs.pop(case),
            )


def entrants(
    of: Contest,
    mode: str,
    sets: list[dict[str, tuple[Array, ...]]],
    cotangent: Array,
    sizes: Sizes,
    session: Session,
) -> dict[str, contest.Entrant]:
    """Return all contestants, for arguments or their shapes."""
    found = {}
    for name, (function, _) in of.contestants(sizes).items():
        arguments = [x["attention" if name == ATTENTION else "memory"] for x in sets]
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


def draw(
    of: Contest, length: int, sizes: Sizes
) -> tuple[list[dict[str, tuple[Array, ...]]], Array]:
    """Return sets of arguments, by operator, and a cotangent of the output [B, T, H, Dv]."""
    rows = (max(1, sizes.tokens // length), length)
    attention = (*rows, sizes.heads * sizes.v_dim // sizes.attention_dim, sizes.attention_dim)

    @jax.jit
    def draw_set(seed: int) -> dict[str, tuple[Array, ...]]:
        keys = iter(jax.random.split(jax.random.key(seed), 8))

        def normal(*shape: int, dtype: jnp.dtype = DTYPE) -> Array:
            return jax.random.normal(next(keys), shape, dtype)

        q, k = (normal(*rows, sizes.heads, sizes.q_dim) for _ in range(2))
        v = normal(*rows, sizes.heads, sizes.v_dim)
        gates = (normal(*rows, sizes.heads, dtype=jnp.float32) for _ in range(2))
        wide = tuple(normal(*attention) for _ in range(3))
        return {"memory": of.given(q, k, v, *gates), "attention": wide}

    first = draw_set(0)
    count = timing.rotation(sum(x.nbytes for x in first["memory"]))
    return [first, *(draw_set(i) for i in range(2, count + 1))], draw_set(1)["memory"][2]
