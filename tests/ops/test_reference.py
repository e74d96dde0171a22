"""The NumPy oracles agree with each other, with brute force and with finite differences."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrence_cases import (
    DECAYS,
    assert_close,
    assert_states_close,
    draw,
    draw_state,
    problems,
)

from swr_jax.ops import reference as ref

BLOCK = 8
# T = 1, around one block, two blocks, 3 l + 5, primes.
LENGTHS = (1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 5, 13, 37)
LOOKBACKS = (0, 1, 2, 3, None)


def by_definition(a, u, block_size, lookback, position=0):
    """Sum over every token seen of its input times the product of the decays passed since."""
    x = np.zeros(u.shape)
    for b, i, h in np.ndindex(a.shape):
        for j in range(i + 1):
            distance = (position + i) // block_size - (position + j) // block_size
            if lookback is None or distance <= lookback:
                x[b, i, h] += np.prod(a[b, j + 1 : i + 1, h]) * u[b, j, h]
    return x


# --- the exact recurrence ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("length", LENGTHS)
def test_every_route_to_the_exact_recurrence_agrees(length, kind):
    a, u = draw(length, kind)
    over_time = a.swapaxes(1, 2)
    expected = by_definition(a, u, BLOCK, None)
    decomposition = ref.hierarchical_decomposition(over_time, BLOCK)

    assert_close(ref.linear_recurrence(a, u), expected)
    assert_close(ref.apply_operator(ref.transfer_operator(over_time), u), expected)
    assert_close(ref.apply_operator(ref.assemble(decomposition), u), expected)
    assert_close(ref.evaluate(decomposition, u), expected)
    assert_close(ref.block_two_pass(a, u, block_size=BLOCK, lookback=None), expected)
    assert_close(ref.stream(a, u, BLOCK, None)[0], expected)
    assert_close(ref.sliding_window_recurrence(a, u, block_size=BLOCK, lookback=None), expected)
    flat = u
    for factor in ref.kogge_stone_factors(over_time):
        flat = ref.apply_operator(factor, flat)
    assert_close(flat, expected)


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("length", LENGTHS)
def test_transfer_operator_inverts_the_difference_operator(length, kind):
    a, _ = draw(length, kind)
    a = a.swapaxes(1, 2)
    operator = ref.transfer_operator(a)
    difference = np.eye(length) - a[..., :, None] * np.eye(length, k=-1)
    assert_close(difference @ operator, np.broadcast_to(np.eye(length), operator.shape))


@pytest.mark.parametrize("length", LENGTHS)
def test_kogge_stone_factors_are_logarithmically_many_and_commute(length):
    a, _ = draw(length)
    a = a.swapaxes(1, 2)
    operator, factors = ref.transfer_operator(a), ref.kogge_stone_factors(a)
    assert len(factors) == max(1, int(np.ceil(np.log2(length))))
    for order in (factors, factors[::-1]):
        product = np.broadcast_to(np.eye(length), operator.shape)
        for factor in order:
            product = product @ factor
        assert_close(product, operator)


def test_linear_recurrence_continues_from_an_initial_state():
    a, u = draw(29, "negative")
    whole = ref.linear_recurrence(a, u)
    assert_close(ref.linear_recurrence(a[:, 11:], u[:, 11:], whole[:, 10]), whole[:, 11:])


def test_off_diagonal_blocks_of_the_exact_operator_have_rank_one():
    a, _ = draw(4 * BLOCK, batch=1, heads=1)
    operator = ref.transfer_operator(a[0, :, 0])
    parts = ref.hierarchical_decomposition(a[0, :, 0], BLOCK)
    for t, s in itertools.combinations(range(4), 2):
        t, s = s, t
        block = operator[t * BLOCK : (t + 1) * BLOCK, s * BLOCK : (s + 1) * BLOCK]
        between = np.prod(parts.block_decay[s + 1 : t])
        assert_close(block, between * np.outer(parts.prefix[t], parts.last_row[s]))


# --- the window -------------------------------------------------------------------------------


@pytest.mark.parametrize("lookback", LOOKBACKS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", DECAYS)
def test_every_route_to_the_windowed_recurrence_agrees(length, lookback, kind):
    a, u = draw(length, kind)
    expected = by_definition(a, u, BLOCK, lookback)
    decomposition = ref.hierarchical_decomposition(a.swapaxes(1, 2), BLOCK)
    assert_close(ref.sliding_window_recurrence(a, u, block_size=BLOCK, lookback=lookback), expected)
    assert_close(ref.block_two_pass(a, u, block_size=BLOCK, lookback=lookback), expected)
    assert_close(ref.apply_operator(ref.assemble(decomposition, lookback), u), expected)
    assert_close(ref.evaluate(decomposition, u, lookback), expected)
    assert_close(ref.stream(a, u, BLOCK, lookback)[0], expected)


def test_position_p_of_a_block_sees_exactly_p_plus_1_tokens_and_the_previous_block():
    """With unit decays and unit inputs the output counts the tokens seen: the jagged window."""
    length = 4 * 16
    ones = np.ones((1, length, 1))
    x = ref.sliding_window_recurrence(ones, ones[..., None], block_size=16, lookback=1)
    seen = [p + 1 + (16 if t else 0) for t in range(4) for p in range(16)]
    np.testing.assert_array_equal(x[0, :, 0, 0], seen)
    assert np.mean(seen[16:]) == 24.5


@pytest.mark.parametrize("lookback", [0, 1, 2, None])
def test_a_token_is_felt_in_its_window_and_changes_nothing_outside(lookback):
    a, u = draw(5 * BLOCK + 3, batch=1)
    routes = {
        "masked": lambda u: ref.sliding_window_recurrence(
            a, u, block_size=BLOCK, lookback=lookback
        ),
        "two-pass": lambda u: ref.block_two_pass(a, u, block_size=BLOCK, lookback=lookback),
        "stream": lambda u: ref.stream(a, u, BLOCK, lookback)[0],
    }
    for name, route in routes.items():
        before = route(u)
        for token in (0, BLOCK - 1, BLOCK, 2 * BLOCK + 3):
            perturbed = u.copy()
            perturbed[:, token] += 1.0
            changed = (route(perturbed) != before).any(axis=(0, 2, 3))
            end = None if lookback is None else (token // BLOCK + lookback + 1) * BLOCK
            expected = np.zeros(u.shape[1], bool)
            expected[token:end] = True
            np.testing.assert_array_equal(changed, expected, err_msg=f"{name}, token {token}")


def test_the_first_decay_of_a_block_acts_on_the_carrier():
    """A published pseudo-code drops it: x_t = w_t + g_t v_{t-1} needs g_t = (a_1, a_1 a_2, ..)."""
    a = np.ones((1, 2 * BLOCK, 1))
    a[:, BLOCK] = 0.5
    u = np.zeros((1, 2 * BLOCK, 1, 1))
    u[:, 0] = 1.0
    expected = np.r_[np.full(BLOCK, 1.0), np.full(BLOCK, 0.5)]
    for x in (
        ref.sliding_window_recurrence(a, u, block_size=BLOCK),
        ref.block_two_pass(a, u, block_size=BLOCK),
        ref.stream(a, u, BLOCK, 1)[0],
    ):
        np.testing.assert_array_equal(x[0, :, 0, 0], expected)


def test_block_size_one_and_blocks_longer_than_the_sequence():
    a, u = draw(11)
    for lookback in (0, 1, 4):
        expected = by_definition(a, u, 1, lookback)
        for x in (
            ref.sliding_window_recurrence(a, u, block_size=1, lookback=lookback),
            ref.block_two_pass(a, u, block_size=1, lookback=lookback),
            ref.stream(a, u, 1, lookback)[0],
        ):
            assert_close(x, expected)
    whole = ref.linear_recurrence(a, u)
    assert_close(ref.sliding_window_recurrence(a, u, block_size=64, lookback=0), whole)


def test_a_lookback_over_all_blocks_is_the_exact_recurrence():
    a, u = draw(37)
    x = ref.sliding_window_recurrence(a, u, block_size=BLOCK, lookback=4)
    assert_close(x, ref.linear_recurrence(a, u))


# --- packed documents -------------------------------------------------------------------------


@pytest.mark.parametrize("lookback", LOOKBACKS)
def test_packed_documents_cannot_see_each_other(lookback):
    """A reset at every boundary: the exact window of the packed row, restricted to the document."""
    a, u = draw(37, batch=1)
    ids = np.repeat([4, 1, 1, 7, 0], [5, 3, 11, 1, 17])[None]
    x = ref.sliding_window_recurrence(a, u, block_size=BLOCK, lookback=lookback, segment_ids=ids)
    starts = [0, 5, 19, 20, 37]
    for start, end in itertools.pairwise(starts):
        alone = by_definition(a[:, start:end], u[:, start:end], BLOCK, lookback, position=start)
        assert_close(x[:, start:end], alone)
    cut = ref.reset_decays(a, ids)
    assert_close(ref.stream(cut, u, BLOCK, lookback)[0], x)
    assert_close(ref.block_two_pass(cut, u, block_size=BLOCK, lookback=lookback), x)


def test_reset_decays_leaves_the_argument_and_the_first_token_alone():
    a = np.full((2, 5, 1), 0.5)
    cut = ref.reset_decays(a, [[3, 3, 4, 4, 3], [1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(cut[..., 0], [[0.5, 0.5, 0.0, 0.5, 0.0], [0.5] * 5])
    np.testing.assert_array_equal(a, 0.5)
    np.testing.assert_array_equal(ref.reset_decays(a, None), a)


# --- states -----------------------------------------------------------------------------------


@pytest.mark.parametrize("lookback", LOOKBACKS)
@pytest.mark.parametrize("split", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 5])
def test_prefill_then_decode_is_one_full_forward(split, lookback):
    length = 5 * BLOCK + 2
    a, u = draw(length)
    whole, last = ref.stream(a, u, BLOCK, lookback)
    prompt, state = ref.stream(a[:, :split], u[:, :split], BLOCK, lookback)
    rest, end = ref.stream(a[:, split:], u[:, split:], BLOCK, lookback, state)
    np.testing.assert_array_equal(np.concatenate([prompt, rest], axis=1), whole)
    for field, expected in zip(end, last, strict=True):
        np.testing.assert_array_equal(field, expected)
    masked = ref.sliding_window_recurrence(
        a[:, split:], u[:, split:], block_size=BLOCK, lookback=lookback, initial_state=state
    )
    assert_close(masked, whole[:, split:])


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
def test_the_state_holds_what_its_fields_say(length):
    """Against the definitions: local states of the last blocks, and products of later decays."""
    a, u = draw(length)
    lookback = 2
    _, state = ref.stream(a, u, BLOCK, lookback)
    local = by_definition(a, u, BLOCK, 0)
    start = length // BLOCK * BLOCK
    np.testing.assert_array_equal(state.position, [length - start] * 2)
    assert state.position.dtype == np.int32
    assert_close(state.local, local[:, -1] if length > start else np.zeros_like(local[:, -1]))
    for k in range(lookback):
        end = start - k * BLOCK
        assert_close(state.carriers[:, k], local[:, end - 1] if end > 0 else 0 * local[:, 0])
        assert_close(state.decays[:, k], np.prod(a[:, max(end, 0) :], axis=1))


def test_the_state_without_a_window_is_the_last_output():
    a, u = draw(3 * BLOCK)
    x, state = ref.stream(a, u, BLOCK, None)
    np.testing.assert_array_equal(state.local, x[:, -1])
    np.testing.assert_array_equal(state.position, 0)
    assert state.carriers.shape[1] == state.decays.shape[1] == 0


@pytest.mark.parametrize("lookback", LOOKBACKS)
@pytest.mark.parametrize("length", [1, BLOCK, 3 * BLOCK + 5])
def test_masked_and_streaming_forms_agree_from_any_state(length, lookback):
    """Rows of the batch stand at different positions in their blocks."""
    a, u = draw(length, batch=4)
    state = draw_state(4, 3, 5, lookback, BLOCK)
    masked = ref.sliding_window_recurrence(
        a, u, block_size=BLOCK, lookback=lookback, initial_state=state
    )
    assert_close(masked, ref.stream(a, u, BLOCK, lookback, state)[0])


def test_streaming_leaves_the_state_it_was_given_alone():
    a, u = draw(2 * BLOCK + 1)
    state = draw_state(2, 3, 5, 2, BLOCK)
    copies = [field.copy() for field in state]
    ref.stream(a, u, BLOCK, 2, state)
    for field, copy in zip(state, copies, strict=True):
        np.testing.assert_array_equal(field, copy)


def test_a_state_of_another_lookback_is_refused():
    a, u = draw(3)
    state = ref.zero_state(2, 3, 5, 2)
    with pytest.raises(ValueError, match="holds 2 carriers, lookback=1 needs 1"):
        ref.stream(a, u, BLOCK, 1, state)
    with pytest.raises(ValueError, match="holds 2 carriers, lookback=None needs 0"):
        ref.sliding_window_recurrence(a, u, block_size=8, lookback=None, initial_state=state)


# --- the gated form ---------------------------------------------------------------------------


def test_gates_are_shared_by_consecutive_heads():
    heads, gate_heads, features = 6, 2, 5
    a, v = draw(19, heads=heads)
    rng = np.random.default_rng(7)
    b, c = rng.standard_normal((2, 2, 19, gate_heads, features))
    y = ref.gated_sliding_window_recurrence(a, b, c, v, block_size=BLOCK, lookback=1)
    for head in range(heads):
        group = head // (heads // gate_heads)
        x = by_definition(a[:, :, [head]], b[:, :, [group]] * v[:, :, [head]], BLOCK, 1)
        assert_close(y[:, :, [head]], x * c[:, :, [group]] + v[:, :, [head]])


# --- helpers ----------------------------------------------------------------------------------


def test_relative_rms():
    assert ref.relative_rms([3.0, 4.0], [3.0, 4.0]) == 0.0
    assert ref.relative_rms([0.0, 0.0], [0.0, 0.0]) == 0.0
    assert ref.relative_rms([], []) == 0.0
    assert ref.relative_rms([1.0], [0.0]) == np.inf
    assert np.isnan(ref.relative_rms([np.nan], [0.0]))
    assert np.isnan(ref.relative_rms([np.nan], [1.0]))
    assert ref.relative_rms([1.0, 1.0], [2.0, 2.0]) == 0.5
    with pytest.raises(ValueError, match="shape"):
        ref.relative_rms(np.ones((2, 1)), np.ones((2, 2)))


def test_finite_differences_of_a_known_function():
    x = np.array([[0.3, -1.2], [2.0, 0.7]])
    gradient = ref.finite_difference_gradient(lambda x: np.sum(np.sin(x) * x), x)
    assert_close(gradient, np.cos(x) * x + np.sin(x), tolerance=1e-9)
    linear = ref.finite_difference_gradient(lambda x: x[0, 0] * x[1, 1] + 5, x, step=1.0)
    np.testing.assert_allclose(linear, [[0.7, 0.0], [0.0, 0.3]], rtol=1e-15)


def test_low_precision_inputs_are_computed_in_float64():
    a, u = draw(37)
    a, u = a.astype(np.float16), u.astype(np.float32)
    exact = by_definition(a.astype(np.float64), u.astype(np.float64), BLOCK, 1)
    for x in (
        ref.sliding_window_recurrence(a, u, block_size=BLOCK),
        ref.block_two_pass(a, u, block_size=BLOCK),
        ref.stream(a, u, BLOCK, 1)[0],
    ):
        assert x.dtype == np.float64
        assert_close(x, exact)


def test_the_module_needs_numpy_alone():
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[1]); "
        "sys.exit(any(name.split('.')[0] in ('jax', 'flax', 'swr_jax') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code, ref.__file__], check=False).returncode == 0


# --- properties -------------------------------------------------------------------------------


@given(problems(), st.lists(st.integers(0, 45), max_size=4))
@settings(max_examples=150, deadline=None)
def test_any_chunking_of_the_stream_gives_the_masked_form(problem, splits):
    a, u, block_size, lookback, initial = problem
    expected = ref.sliding_window_recurrence(
        a, u, block_size=block_size, lookback=lookback, initial_state=initial
    )
    edges = [0, *sorted(min(split, a.shape[1]) for split in splits), a.shape[1]]
    state, pieces = initial, []
    for start, end in itertools.pairwise(edges):
        x, state = ref.stream(a[:, start:end], u[:, start:end], block_size, lookback, state)
        pieces.append(x)
    assert_close(np.concatenate(pieces, axis=1), expected)
    assert_states_close(state, ref.stream(a, u, block_size, lookback, initial)[1])


@given(problems())
@settings(max_examples=150, deadline=None)
def test_masked_two_pass_and_hierarchical_forms_agree(problem):
    a, u, block_size, lookback, _ = problem
    expected = ref.sliding_window_recurrence(a, u, block_size=block_size, lookback=lookback)
    decomposition = ref.hierarchical_decomposition(a.swapaxes(1, 2), block_size)
    assert_close(ref.block_two_pass(a, u, block_size=block_size, lookback=lookback), expected)
    assert_close(ref.evaluate(decomposition, u, lookback), expected)
    assert_close(ref.apply_operator(ref.assemble(decomposition, lookback), u), expected)
