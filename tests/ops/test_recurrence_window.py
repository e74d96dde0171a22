"""What a token sees, what reaches it from other tokens, and streams cut anywhere."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrence_cases import (
    as_state,
    assert_rows_close,
    assert_states_close,
    draw,
    draw_rows,
    draw_state,
    problems,
    rounded,
)

from swr_jax import (
    RecurrenceState,
    gated_sliding_window_recurrence,
    recurrence_step,
    sliding_window_recurrence,
)
from swr_jax.ops import reference as ref

FLOAT32 = 1e-6


@functools.partial(jax.jit, static_argnames=("block_size", "lookback"))
def recur(a, u, state=None, **window):
    return sliding_window_recurrence(a, u, initial_state=state, return_state=True, **window)


step = jax.jit(recurrence_step)


@functools.partial(jax.jit, static_argnames=("block_size", "lookback"))
def forward_and_gradients(a, u, x_bar, documents=None, **window):
    def forward(a, u):
        return sliding_window_recurrence(a, u, segment_ids=documents, **window)

    x, pull = jax.vjp(forward, a, u)
    return x, *pull(x_bar)


# --- who sees whom ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block_size", "lookback"), [(4, 0), (4, 1), (4, 3), (32, 1), (4, None), (1, 2)]
)
def test_a_bad_token_spoils_its_window_and_not_one_bit_outside(block_size, lookback):
    """NaN, infinity and huge numbers: the rest is equal bit for bit, outputs and gradients.

    du of a token needs no input at all. da of a token needs the inputs that it sees, and those
    that its window's later tokens see with it.
    """
    length = 6 * block_size + 3
    window = {"block_size": block_size, "lookback": lookback}
    a, u = (x.astype(np.float32) for x in draw(length, batch=1, heads=2, features=3))
    x_bar = draw(length, batch=1, heads=2, features=3, seed=1)[1].astype(np.float32)
    x, da, du = map(np.asarray, forward_and_gradients(a, u, x_bar, **window))
    for token, bad in itertools.product(
        sorted({0, block_size - 1, 2 * block_size + block_size // 2}), (np.nan, np.inf, 1e30)
    ):
        block = token // block_size
        end = length if lookback is None else (block + lookback + 1) * block_size
        outside = np.r_[0:token, end:length]
        spoilt = u.copy()
        spoilt[:, token] = bad
        bad_x, bad_da, bad_du = map(np.asarray, forward_and_gradients(a, spoilt, x_bar, **window))
        np.testing.assert_array_equal(bad_x[:, outside], x[:, outside])
        np.testing.assert_array_equal(bad_du, du)
        np.testing.assert_array_equal(bad_da[:, outside], da[:, outside])
        assert (bad_x[:, token:end] != x[:, token:end]).any(axis=(0, 2, 3)).sum() >= 1

        # A decay acts on everything that comes through its token: the same tokens see it.
        spoilt = a.copy()
        spoilt[:, token] = bad
        bad_x = np.asarray(forward_and_gradients(spoilt, u, x_bar, **window)[0])
        np.testing.assert_array_equal(bad_x[:, outside], x[:, outside])

        # Backwards: what a token's cotangent reaches is what the token sees.
        oldest = 0 if lookback is None else max(0, block - lookback) * block_size
        unseen = np.r_[0:oldest, token + 1 : length]
        spoilt = x_bar.copy()
        spoilt[:, token] = bad
        _, bad_da, bad_du = map(np.asarray, forward_and_gradients(a, u, spoilt, **window))
        np.testing.assert_array_equal(bad_du[:, unseen], du[:, unseen])
        np.testing.assert_array_equal(bad_da[:, unseen], da[:, unseen])


@pytest.mark.parametrize(("block_size", "lookback"), [(4, 1), (32, 2), (4, None)])
def test_documents_do_not_feel_each_other_at_all(block_size, lookback):
    window = {"block_size": block_size, "lookback": lookback}
    a, u = (x.astype(np.float32) for x in draw(37, batch=1))
    x_bar = draw(37, batch=1, seed=1)[1].astype(np.float32)
    documents = np.repeat([4, 1, 1, 7, 0], [5, 3, 11, 1, 17])[None].astype(np.int32)
    results = forward_and_gradients(a, u, x_bar, documents, **window)
    for document in (4, 1, 7, 0):
        here = documents[0] == document
        others = np.where(here[None, :, None, None], 1, np.float32(1e30))
        spoilt = forward_and_gradients(a, u * others, x_bar * others, documents, **window)
        for result, bad in zip(results, spoilt, strict=True):
            np.testing.assert_array_equal(result[:, here], bad[:, here])


def test_results_do_not_depend_on_how_much_follows():
    """A launch geometry that cuts T somewhere would show: 8704 is where a public kernel does."""
    a, u = (x.astype(np.float32) for x in draw(9001, batch=1, heads=2, features=2))
    for lookback in (1, None):
        whole, _ = recur(a, u, lookback=lookback)
        prefix, _ = recur(a[:, :8704], u[:, :8704], lookback=lookback)
        np.testing.assert_array_equal(prefix, whole[:, :8704])
        exact = ref.block_two_pass(a, u, block_size=16, lookback=lookback)
        assert_rows_close(whole, exact, FLOAT32)


# --- streams ----------------------------------------------------------------------------------

BLOCK = 8
SPLITS = (1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 5)


@pytest.mark.parametrize(
    ("split", "lookback"),
    [(split, 1) for split in SPLITS]
    + [(split, lookback) for split in (2 * BLOCK, 3 * BLOCK + 5) for lookback in (0, 2, None)],
)
def test_prefill_then_decode_is_one_full_forward(split, lookback):
    """A public kernel counts the tail twice where the prompt is a multiple of the block."""
    window = {"block_size": BLOCK, "lookback": lookback}
    a, u, _ = draw_rows(split + 2 * BLOCK + 1, 2, 3)
    x, state = recur(a[:, :split], u[:, :split], **window)
    outputs = [x]
    for token in range(split, a.shape[1]):
        state, x = step(state, a[:, token], u[:, token])
        outputs.append(x[:, None])
    expected, last = ref.stream(a, u, BLOCK, lookback)
    assert_rows_close(jnp.concatenate(outputs, axis=1), expected, FLOAT32)
    assert_states_close(state, last, FLOAT32)


@pytest.mark.parametrize("lookback", [0, 1, 3, None])
def test_every_step_reaches_the_oracles_state(lookback):
    a, u, _ = draw_rows(2 * BLOCK + 3, 2, 3)
    oracle = rounded(draw_state(len(a), 2, 3, lookback, BLOCK))
    state = as_state(oracle, BLOCK, lookback)
    for token in range(a.shape[1]):
        wanted, oracle = ref.stream(
            a[:, token : token + 1], u[:, token : token + 1], BLOCK, lookback, oracle
        )
        state, x = step(state, a[:, token], u[:, token])
        assert_rows_close(x, wanted[:, 0], FLOAT32)
        assert_states_close(state, oracle, FLOAT32)


def test_a_step_returns_the_dtype_of_its_input_and_keeps_that_of_the_state():
    a, u = draw(1)
    state = RecurrenceState.zeros(2, 3, 5)
    after, x = step(state, jnp.asarray(a[:, 0], jnp.bfloat16), jnp.asarray(u[:, 0], jnp.bfloat16))
    assert x.dtype == jnp.bfloat16
    assert [y.dtype for y in jax.tree.leaves(after)] == [y.dtype for y in jax.tree.leaves(state)]
    assert_rows_close(x, u[:, 0], 4e-3)


@given(st.lists(st.sampled_from([1, 2, 5, 8, 11]), min_size=1, max_size=8), st.integers(0, 2**16))
@settings(max_examples=40, deadline=None)
def test_any_chunking_of_a_stream_is_one_stream(chunks, seed):
    length, lookback = sum(chunks), 2
    a, u, _ = draw_rows(length, 1, 2, seed)
    oracle = rounded(draw_state(len(a), 1, 2, lookback, 4, seed))
    state, pieces, start = as_state(oracle, 4, lookback), [], 0
    for chunk in chunks:
        part = slice(start, start + chunk)
        x, state = recur(a[:, part], u[:, part], state, block_size=4, lookback=lookback)
        pieces.append(np.asarray(x))
        start += chunk
    wanted, last = ref.stream(a, u, 4, lookback, oracle)
    assert_rows_close(np.concatenate(pieces, axis=1), wanted, FLOAT32)
    assert_states_close(state, last, FLOAT32)


# --- properties -------------------------------------------------------------------------------


def equals_the_oracle(problem):
    a, u, block_size, lookback, state = problem
    a, u, state = a.astype(np.float32), u.astype(np.float32), rounded(state)
    start = as_state(state, block_size, lookback)
    window = {"block_size": block_size, "lookback": lookback}
    x, after = recur(a, u, start, **window)
    wanted, last = ref.stream(a, u, block_size, lookback, state)
    assert_rows_close(x, wanted, FLOAT32)
    assert_states_close(after, last, FLOAT32)


@given(problems())
@settings(max_examples=8, deadline=None)
def test_any_problem_equals_the_oracle(problem):
    equals_the_oracle(problem)


@pytest.mark.slow
@given(problems())
@settings(max_examples=150, deadline=None)
def test_many_problems_equal_the_oracle(problem):
    equals_the_oracle(problem)


# XLA flushes subnormal products to zero, so no weight is as small as that.
weights = st.integers(-1000, 1000).map(lambda n: n / 100)


@given(st.integers(0, 2**16), weights, weights)
@settings(max_examples=25, deadline=None)
def test_the_output_is_linear_in_inputs_and_initial_state(seed, alpha, beta):
    a, u, _ = draw_rows(21, 2, 3, seed)
    _, w, _ = draw_rows(21, 2, 3, seed + 1)
    alpha, beta = np.float32(alpha), np.float32(beta)
    one, other = (as_state(draw_state(len(a), 2, 3, 1, BLOCK, s), BLOCK, 1) for s in (seed, 2**17))
    # The same positions and decays, or there would be nothing to add.
    other = other.replace(position=one.position, decays=one.decays)

    def mixed(x, y):
        return alpha * x + beta * y

    both = one.replace(
        local=mixed(one.local, other.local), carriers=mixed(one.carriers, other.carriers)
    )
    x, y, z = (
        np.asarray(recur(a, inputs, state, block_size=BLOCK, lookback=1)[0], np.float64)
        for inputs, state in ((u, one), (w, other), (mixed(u, w), both))
    )
    scale = np.abs(alpha * x) + np.abs(beta * y)
    assert np.linalg.norm(z - mixed(x, y)) <= 2 * FLOAT32 * np.linalg.norm(scale)


@given(st.integers(0, 4), st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_shifting_time_by_whole_blocks_shifts_the_output(blocks, seed):
    """Silence before the sequence changes nothing, bit for bit; a shift by less would."""
    length = 2 * BLOCK + 5
    frame = length + 4 * BLOCK
    a, u, _ = draw_rows(length, 2, 3, seed)

    def shifted(by):
        b, _, _ = draw_rows(frame, 2, 3, seed)
        v = np.zeros((len(a), frame, 2, 3), np.float32)
        b[:, by : by + length], v[:, by : by + length] = a, u
        return np.asarray(recur(b, v, block_size=BLOCK, lookback=1)[0])[:, by : by + length]

    np.testing.assert_array_equal(shifted(blocks * BLOCK), shifted(0))
    assert (shifted(3) != shifted(0)).any()


def test_gating_is_the_plain_recurrence_between_two_products():
    a, v, _ = draw_rows(37, 4, 3)
    b, c = np.random.default_rng(0).standard_normal((2, len(a), 37, 2, 3)).astype(np.float32)
    o = jax.jit(gated_sliding_window_recurrence)(a, b, c, v)
    x = jax.jit(sliding_window_recurrence)(a, np.repeat(b, 2, axis=2) * v)
    assert_rows_close(o, x * np.repeat(c, 2, axis=2) + v, FLOAT32)
