"""Random problems for tests of recurrences, and their comparison with the float64 oracles."""

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from swr_jax import RecurrenceState
from swr_jax.ops import reference as ref

DECAYS = ("uniform", "zeros", "some zeros", "ones", "tiny", "negative")


def draw_decay(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    a = rng.uniform(0.05, 1.0, shape)
    if kind == "zeros":
        return np.zeros(shape)
    if kind == "some zeros":
        return np.where(rng.uniform(size=shape) < 0.3, 0.0, a)
    if kind == "ones":
        return np.ones(shape)
    if kind == "tiny":
        return np.where(rng.uniform(size=shape) < 0.3, 1e-30, a)
    if kind == "negative":
        return rng.uniform(-1.0, 1.0, shape)
    return a


def draw(
    length: int,
    kind: str = "uniform",
    *,
    batch: int = 2,
    heads: int = 3,
    features: int = 5,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([seed, length])
    a = draw_decay(kind, (batch, length, heads), rng)
    return a, rng.standard_normal((batch, length, heads, features))


def draw_state(
    batch: int, heads: int, features: int, lookback: int | None, block_size: int, seed: int = 0
) -> ref.RecurrenceState:
    """A state with a different position in every row, as a batch of unequal prompts leaves it."""
    rng = np.random.default_rng([seed, 1])
    number = lookback or 0
    return ref.RecurrenceState(
        local=rng.standard_normal((batch, heads, features)),
        carriers=rng.standard_normal((batch, number, heads, features)),
        decays=rng.uniform(-1.0, 1.0, (batch, number, heads)),
        position=rng.integers(0, 1 if lookback is None else block_size, batch).astype(np.int32),
    )


@st.composite
def problems(draw_from):
    length = draw_from(st.integers(1, 45), label="length")
    block_size = 2 ** draw_from(st.integers(0, 5), label="log2 block_size")
    lookback = draw_from(st.sampled_from([0, 1, 2, 3, None]), label="lookback")
    batch, heads, features = (draw_from(st.integers(1, 3)) for _ in range(3))
    seed = draw_from(st.integers(0, 2**16), label="seed")
    kind = draw_from(st.sampled_from(DECAYS), label="decay")
    a, u = draw(length, kind, batch=batch, heads=heads, features=features, seed=seed)
    state = draw_state(batch, heads, features, lookback, block_size, seed)
    return a, u, block_size, lookback, state


def draw_rows(
    length: int, heads: int, features: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decays and inputs, float32, and segment_ids: a batch with every kind of decay in it.

    The first rows have one kind each and are one document; two more rows are packed.
    """
    rng = np.random.default_rng([seed, length, heads, features])
    kinds = (*DECAYS, "uniform", "negative")
    a = np.concatenate([draw_decay(kind, (1, length, heads), rng) for kind in kinds])
    u = rng.standard_normal((len(kinds), length, heads, features))
    documents = np.zeros((len(kinds), length), np.int32)
    documents[-2:] = np.cumsum(rng.uniform(size=(2, length)) < 0.2, axis=1)
    return a.astype(np.float32), u.astype(np.float32), documents


def rounded(state: ref.RecurrenceState, dtype: np.dtype = np.float32) -> ref.RecurrenceState:
    """The oracle's state with every number rounded to `dtype`."""
    return ref.RecurrenceState(*(field.astype(dtype) for field in state[:3]), state.position)


def as_state(
    state: ref.RecurrenceState, block_size: int, lookback: int | None, dtype=np.float32
) -> RecurrenceState:
    """The operators' form of an oracle's state."""
    fields = (jnp.asarray(field, dtype) for field in state[:3])
    position = jnp.asarray(state.position, jnp.int32)
    return RecurrenceState(*fields, position, block_size=block_size, lookback=lookback)


def assert_close(actual, expected, tolerance=1e-12):
    """Every number is finite, and the relative root mean square error at most `tolerance`."""
    actual = np.asarray(actual, np.float64)
    assert np.isfinite(actual).all()
    assert ref.relative_rms(actual, expected) <= tolerance


def assert_rows_close(actual, expected, tolerance, name=""):
    """`assert_close` for each row of the batch, so that none hides behind a larger one.

    Products of many decays fall below what float32 can hold: 1e-30 counts as zero.
    """
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape, name
    for row, (got, wanted) in enumerate(zip(actual, expected, strict=True)):
        assert np.isfinite(got).all(), f"{name}, row {row}"
        error = np.linalg.norm(got - wanted)
        bound = tolerance * np.linalg.norm(wanted) + 1e-30 * np.sqrt(got.size)
        assert error <= bound, f"{name}, row {row}: {error / np.linalg.norm(wanted):.2e}"


def assert_states_close(actual, expected, tolerance=1e-12):
    """States, in the operators' form or the oracle's, agree field by field."""
    for name in ("local", "carriers", "decays"):
        assert_rows_close(getattr(actual, name), getattr(expected, name), tolerance, name)
    np.testing.assert_array_equal(actual.position, expected.position)
    assert actual.position.dtype == np.int32
