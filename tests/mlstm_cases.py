"""Random problems for tests of the mLSTM, and their comparison with the float64 oracles."""

import functools
from typing import NamedTuple

import jax
import numpy as np

from swr_jax import MLSTMState, mlstm
from swr_jax.ops import reference_mlstm as ref

NAMES = ("q", "k", "v", "i", "f", "memory", "normalizer", "stabilizer")
FIELDS = NAMES[5:]


class Kind(NamedTuple):
    """What one row of a batch is like.

    Attributes:
        i, f: means of the pre-activations.
        spread: their standard deviation.
        overlap: added to every query and key. Without it q k^T has any sign; a denominator of few
            tokens may then come close to 0, where it loses the digits of its inputs.
        packed: share of tokens that begin a document.
    """

    i: float = 0.0
    f: float = 0.0
    spread: float = 1.0
    overlap: float = 0.0
    packed: float = 0.0


KINDS = {
    "plain": Kind(),
    "packed": Kind(f=2.0, packed=0.15),
    "as initialised": Kind(i=-10.0, f=4.5, spread=0.5),
    "forgetful": Kind(f=-30.0),
    "loud": Kind(i=30.0, spread=5.0, overlap=2.0),
    "silent": Kind(i=-30.0, f=3.0, spread=3.0),
    "never forgetting, all equal": Kind(f=200.0, spread=0.0, overlap=2.0),
    "wild": Kind(spread=10.0, overlap=2.0, packed=0.05),
}


class Problem(NamedTuple):
    """Arguments of `mlstm`, a batch of one row per kind, and cotangents of its results."""

    inputs: tuple[np.ndarray, ...]  # q, k, v, i, f
    state: ref.MLSTMState
    segment_ids: np.ndarray
    h_bar: np.ndarray
    state_bar: ref.MLSTMState


def draw(
    length: int,
    kinds: tuple[str | Kind, ...] = tuple(KINDS),
    *,
    heads: int = 3,
    qk_dim: int = 5,
    v_dim: int = 7,
    seed: int = 0,
    dtype: np.dtype = np.float32,
) -> Problem:
    """Draw numbers that `dtype` holds exactly."""
    rng = np.random.default_rng([seed, length, heads, qk_dim, v_dim])

    def row(kind: Kind):
        q, k = rng.standard_normal((2, length, heads, qk_dim)) + kind.overlap
        v, h_bar = rng.standard_normal((2, length, heads, v_dim))
        i, f = (m + kind.spread * rng.standard_normal((length, heads)) for m in (kind.i, kind.f))
        documents = np.cumsum(rng.uniform(size=length) < kind.packed)
        memory, memory_bar = rng.standard_normal((2, heads, qk_dim, v_dim))
        normalizer, normalizer_bar = rng.standard_normal((2, heads, qk_dim))
        stabilizer, stabilizer_bar = rng.standard_normal((2, heads))
        state = (memory, normalizer + kind.overlap, stabilizer + kind.i)
        return q, k, v, i, f, *state, h_bar, memory_bar, normalizer_bar, stabilizer_bar, documents

    rows = (row(KINDS.get(kind, kind)) for kind in kinds)
    *arrays, documents = (np.stack(x) for x in zip(*rows, strict=True))
    arrays = [x.astype(dtype) for x in arrays]
    return Problem(
        tuple(arrays[:5]),
        ref.MLSTMState(*arrays[5:8]),
        documents.astype(np.int32),
        arrays[8],
        ref.MLSTMState(*arrays[9:]),
    )


def evaluate(problem: Problem, *, from_empty: bool = False, **options) -> dict[str, jax.Array]:
    """h, the last state, and all gradients, by the operator."""
    h, state, gradients = _compiled(from_empty, **options)(problem)
    results = {"h": h} | {f"last {name}": getattr(state, name) for name in FIELDS}
    gradients = {f"d{name}": x for name, x in zip(NAMES, gradients, strict=True)}
    return results | {name: x for name, x in gradients.items() if _applies(name, from_empty)}


# These programs run for milliseconds and compile for seconds.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def _compiled(from_empty: bool, **options):
    @quick_jit
    def run(problem):
        def forward(*arguments):
            return mlstm(
                *arguments[:5],
                initial_state=None if from_empty else MLSTMState(*arguments[5:]),
                segment_ids=problem.segment_ids,
                return_state=True,
                **options,
            )

        (h, state), pull = jax.vjp(forward, *problem.inputs, *problem.state)
        bars = (problem.h_bar, MLSTMState(*problem.state_bar))
        return h, state, pull(jax.tree.map(lambda bar, x: bar.astype(x.dtype), bars, (h, state)))

    return run


def expect(
    problem: Problem, *, from_empty: bool = False, through_normalizer: bool = True, **options
) -> dict[str, np.ndarray]:
    """The same by the oracle."""
    options |= {
        "initial_state": None if from_empty else problem.state,
        "segment_ids": problem.segment_ids,
    }
    h, state = ref.recurrence(*problem.inputs, **options)
    results = {"h": h} | {f"last {name}": getattr(state, name) for name in FIELDS}
    options["through_normalizer"] = through_normalizer
    gradients = ref.gradients(*problem.inputs, problem.h_bar, problem.state_bar, **options)
    gradients = {f"d{name}": x for name, x in gradients.items()}
    return results | {name: x for name, x in gradients.items() if _applies(name, from_empty)}


def _applies(name: str, from_empty: bool) -> bool:
    return not (from_empty and name[1:] in FIELDS)


def expect_terms(problem: Problem, **options) -> dict[str, np.ndarray]:
    """Sizes of what the results are sums of: rounding errors are relative to these.

    A gradient's part through the normalizer may cancel the rest of it, where one token outweighs
    the others; those of the gates and of the stabilizer are inner products besides.
    """
    terms = expect(problem, through_normalizer=False, **options)
    terms["di"] = terms["df"] = np.abs(terms["dk"] * problem.inputs[1]).sum(axis=-1)
    if "dmemory" in terms:
        terms["dstabilizer"] = np.abs(terms["dmemory"] * problem.state.memory).sum(axis=(-2, -1))
    return terms


def assert_close(actual, expected, tolerance, name="", terms=0.0):
    """Every number is finite, and each row's relative root mean square error within bounds.

    Relative to the expected numbers, and to `terms` where these are given. Products of many gates
    fall below what float32 can hold: 1e-30 counts as zero.
    """
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape, name
    terms = np.broadcast_to(terms, expected.shape)
    for row, (got, wanted, term) in enumerate(zip(actual, expected, terms, strict=True)):
        assert np.isfinite(got).all(), f"{name}, row {row}"
        error = np.linalg.norm(got - wanted)
        scale = np.linalg.norm(wanted) + np.linalg.norm(term)
        bound = tolerance * scale + 1e-30 * np.sqrt(got.size)
        assert error <= bound, f"{name}, row {row}: {error / scale:.2e}"


def assert_all_close(actual, expected, tolerance, terms=None):
    """`assert_close` of every entry of two dicts."""
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        assert_close(actual[name], wanted, tolerance, name, 0.0 if terms is None else terms[name])
