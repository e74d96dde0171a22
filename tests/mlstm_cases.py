"""Random problems for tests of the mLSTM, and their comparison with the float64 oracles."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from swr_jax import MLSTMState, mlstm
from swr_jax.ops import reference_mlstm as ref
from swr_jax.ops.reference import relative_rms

NAMES = ("q", "k", "v", "i", "f", "memory", "normalizer", "stabilizer")
FIELDS = NAMES[5:]


class Problem(NamedTuple):
    """Arguments of `mlstm`, oracle's types, and cotangents of its results."""

    inputs: tuple[np.ndarray, ...]  # q, k, v, i, f
    state: ref.MLSTMState
    segment_ids: np.ndarray
    h_bar: np.ndarray
    state_bar: ref.MLSTMState


def draw(
    length: int,
    *,
    batch: int = 2,
    heads: int = 3,
    qk_dim: int = 5,
    v_dim: int = 7,
    gates: tuple[float, float] = (0.0, 0.0),
    spread: float = 1.0,
    overlap: float = 0.0,
    packed: float = 0.1,
    seed: int = 0,
    dtype: np.dtype = np.float32,
) -> Problem:
    """Numbers that `dtype` holds exactly.

    Args:
        length, batch, heads, qk_dim, v_dim: sizes.
        gates: means of the pre-activations i and f.
        spread: their standard deviation.
        overlap: added to every query and key. Without it q k^T has any sign, and a denominator may
            come close to 0, where even exact arithmetic would lose the digits of its inputs.
        packed: share of tokens that begin a document; row 0 is always one document.
        seed: of the generator.
        dtype: of the inputs.
    """
    rng = np.random.default_rng([seed, length, batch, heads, qk_dim, v_dim])
    tokens = (batch, length, heads)
    q, k = rng.standard_normal((2, *tokens, qk_dim)) + overlap
    v, h_bar = rng.standard_normal((2, *tokens, v_dim))
    i, f = (mean + spread * rng.standard_normal(tokens) for mean in gates)
    documents = np.cumsum(rng.uniform(size=(batch, length)) < packed, axis=1).astype(np.int32)
    documents[0] = 0

    def state():
        return ref.MLSTMState(
            rng.standard_normal((batch, heads, qk_dim, v_dim)).astype(dtype),
            (rng.standard_normal((batch, heads, qk_dim)) + overlap).astype(dtype),
            rng.standard_normal((batch, heads)).astype(dtype),
        )

    inputs = tuple(x.astype(dtype) for x in (q, k, v, i, f))
    return Problem(inputs, state(), documents, h_bar.astype(dtype), state())


def evaluate(problem: Problem, *, dtype=None, from_empty: bool = False, **options):
    """h, the last state, and all gradients, by the operator: dict of name to array."""
    cast = (lambda x: x) if dtype is None else lambda x: jnp.asarray(x, dtype)
    inputs = tuple(jnp.asarray(cast(x)) for x in problem.inputs)
    fields = tuple(jnp.asarray(x) for x in problem.state)

    @jax.jit
    def run(inputs, fields, h_bar, state_bar):
        def forward(*arguments):
            state = None if from_empty else MLSTMState(*arguments[5:])
            return mlstm(
                *arguments[:5],
                initial_state=state,
                segment_ids=problem.segment_ids,
                return_state=True,
                **options,
            )

        (h, state), pull = jax.vjp(forward, *inputs, *fields)
        h_bar = h_bar.astype(h.dtype)
        state_bar = jax.tree.map(lambda x, y: x.astype(y.dtype), state_bar, state)
        return h, state, pull((h_bar, state_bar))

    h, state, gradients = run(inputs, fields, problem.h_bar, MLSTMState(*problem.state_bar))
    results = {"h": h} | {f"last {name}": getattr(state, name) for name in FIELDS}
    gradients = {f"d{name}": x for name, x in zip(NAMES, gradients, strict=True)}
    if from_empty:
        gradients = {name: x for name, x in gradients.items() if name[1:] not in FIELDS}
    return results | gradients


def expect(problem: Problem, *, from_empty: bool = False, **options) -> dict[str, np.ndarray]:
    """The same by the oracle."""
    options |= {
        "initial_state": None if from_empty else problem.state,
        "segment_ids": problem.segment_ids,
    }
    h, state = ref.recurrence(*problem.inputs, **options)
    results = {"h": h} | {f"last {name}": getattr(state, name) for name in FIELDS}
    gradients = ref.gradients(*problem.inputs, problem.h_bar, problem.state_bar, **options)
    skipped = FIELDS if from_empty else ()
    return results | {f"d{name}": x for name, x in gradients.items() if name not in skipped}


def assert_close(actual, expected, tolerance, name=""):
    """Every number is finite, and the relative root mean square error at most `tolerance`."""
    actual = np.asarray(actual, np.float64)
    assert np.isfinite(actual).all(), name
    error = relative_rms(actual, expected)
    assert error <= tolerance, f"{name}: {error:.2e}"


def assert_all_close(actual, expected, tolerance):
    """`assert_close` of every entry of two dicts."""
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        assert_close(actual[name], wanted, tolerance, name)
