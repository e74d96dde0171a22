"""Outputs, states and gradients of the recurrences equal the float64 oracles at every shape."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recurrence_cases import (
    as_state,
    assert_close,
    assert_rows_close,
    assert_states_close,
    draw,
    draw_rows,
    draw_state,
    rounded,
)

from swr_jax import (
    gated_sliding_window_recurrence,
    linear_recurrence,
    sliding_window_recurrence,
)
from swr_jax.ops import reference as ref

FLOAT32 = 1e-6


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: its window, sizes and start; `gate_heads` None is the plain recurrence."""

    length: int
    block_size: int
    lookback: int | None
    heads: int
    features: int
    start: str = "nothing"  # or "state", positions that differ by row; or "carrier", an array
    gate_heads: int | None = None

    def __str__(self) -> str:
        gates = "" if self.gate_heads is None else f"-K{self.gate_heads}"
        return (
            f"T{self.length}-l{self.block_size}-k{self.lookback}-H{self.heads}-D{self.features}"
            f"{gates}-{self.start}"
        )

    @property
    def window(self) -> dict[str, int | None]:
        return {"block_size": self.block_size, "lookback": self.lookback}


def problem(case: Case) -> tuple[dict[str, np.ndarray], np.ndarray, ref.RecurrenceState]:
    """Differentiable arguments by name, segment_ids, and the oracle's initial state."""
    a, u, documents = draw_rows(case.length, case.heads, case.features)
    state = draw_state(len(a), case.heads, case.features, case.lookback, case.block_size)
    rng = np.random.default_rng(7)
    if case.gate_heads is None:
        arguments = {"a": a, "u": u}
    else:
        gates = (len(a), case.length, case.gate_heads, case.features)
        b, c = rng.standard_normal((2, *gates)).astype(np.float32)
        arguments = {"a": a, "b": b, "c": c, "v": u}
    if case.start != "state":
        zero = ref.zero_state(len(a), case.heads, case.features, case.lookback)
        if case.start == "carrier" and case.lookback is None:
            zero = zero._replace(local=state.local)
        elif case.start == "carrier":
            carriers = np.zeros_like(state.carriers)
            carriers[:, 0] = state.carriers[:, 0]
            zero = zero._replace(carriers=carriers)
        state = zero
    return arguments, documents, rounded(state)


def computed(case: Case):
    """Output, state and gradients of one case by the operator and by the oracle."""
    arguments, documents, initial = problem(case)
    value = arguments["u" if case.gate_heads is None else "v"]
    x_bar = np.random.default_rng(8).standard_normal(value.shape).astype(np.float32)
    if case.start == "state":
        beginning = {name: getattr(initial, name) for name in ("local", "carriers", "decays")}
    elif case.start == "carrier":
        of_oracle = "local" if case.lookback is None else "carriers"
        beginning = {"carrier": _newest(getattr(initial, of_oracle))}
    else:
        beginning = {}

    def loss(arguments, beginning):
        start = None
        if case.start == "state":
            start = as_state(initial, **case.window).replace(**beginning)
        elif case.start == "carrier":
            start = beginning["carrier"]
        options = {"initial_state": start, "segment_ids": documents, "return_state": True}
        if case.gate_heads is None:
            x, state = sliding_window_recurrence(**arguments, **case.window, **options)
        else:
            x, state = gated_sliding_window_recurrence(**arguments, **case.window, **options)
        return jnp.sum(x * x_bar), (x, state)

    run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (gradients, at_start), (x, state) = run(arguments, beginning)

    options = case.window | {"segment_ids": documents, "initial_state": initial}
    if case.gate_heads is None:
        wanted = ref.sliding_window_recurrence(**arguments, **options)
        wanted_gradients = ref.sliding_window_gradients(**arguments, x_bar=x_bar, **options)
        u = value
    else:
        wanted = ref.gated_sliding_window_recurrence(**arguments, **options)
        wanted_gradients = ref.gated_gradients(**arguments, y_bar=x_bar, **options)
        u = np.repeat(arguments["b"], case.heads // case.gate_heads, axis=2).astype(float) * value
    decays = ref.reset_decays(arguments["a"], documents)
    _, wanted_state = ref.stream(decays, u, case.block_size, case.lookback, initial)
    if case.start == "carrier":
        wanted_gradients["carrier"] = _newest(wanted_gradients[of_oracle])
    return (x, state, gradients | at_start), (wanted, wanted_state, wanted_gradients)


def _newest(x: np.ndarray) -> np.ndarray:
    """[B, K, H, D] -> [B, H, D]; [B, H, D] as it is."""
    return x[:, 0] if x.ndim == 4 else x


# Lengths 1, l - 1, l, l + 1, 2 l, 3 l + 5 and primes; blocks of more than 8 rows and the exact
# recurrence take the hierarchical path.
CASES = [
    Case(1, 16, 1, 1, 1),
    Case(1, 4, 2, 2, 3, "state"),
    Case(15, 16, 1, 3, 5, "state"),
    Case(16, 16, 0, 2, 1),
    Case(32, 16, 2, 1, 7, "carrier"),
    Case(53, 16, 5, 2, 3, "state"),
    Case(53, 16, 1, 4, 5),
    Case(53, 16, None, 3, 5, "state"),
    Case(257, 16, None, 2, 3, "carrier"),
    Case(13, 1, 3, 2, 3, "state"),
    Case(11, 2, 5, 3, 1, "carrier"),
    Case(3, 4, 0, 1, 1),
    Case(17, 4, 5, 2, 3, "state"),
    Case(101, 32, 1, 3, 2),
    Case(197, 64, 1, 1, 3, "state"),
    Case(389, 128, 1, 2, 3),
    Case(127, 128, 2, 1, 1, "state"),
    Case(1, 16, 1, 4, 3, "state", 2),
    Case(17, 16, 1, 4, 3, "nothing", 2),
    Case(53, 16, 1, 6, 5, "state", 2),
    Case(37, 4, 2, 3, 1, "carrier", 1),
    Case(101, 32, 1, 2, 3, "state", 1),
    Case(53, 16, None, 4, 3, "state", 4),
]
ALL_CASES = [
    Case(length, block_size, lookback, 3, 2, start, gate_heads)
    for block_size in (1, 2, 4, 16, 32, 64, 128)
    for lookback in (0, 1, 2, 5, None)
    for number, length in enumerate(
        sorted({1, block_size - 1, block_size, block_size + 1, 2 * block_size, 3 * block_size + 5})
    )
    if length
    for start in [("state", "nothing", "carrier" if lookback != 0 else "state")[number % 3]]
    for gate_heads in [(None, 1, None, 3)[number % 4]]
]


def check(case: Case):
    (x, state, gradients), (wanted, wanted_state, wanted_gradients) = computed(case)
    assert_rows_close(x, wanted, FLOAT32)
    assert_states_close(state, wanted_state, FLOAT32)
    assert (state.block_size, state.lookback) == (case.block_size, case.lookback)
    for name, gradient in gradients.items():
        assert_rows_close(gradient, wanted_gradients[name], FLOAT32, name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_states_and_gradients_are_the_oracles(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_outputs_states_and_gradients_at_every_window_length_and_start(case):
    check(case)


@pytest.mark.parametrize("lookback", [1, 3])
def test_long_windowed_sequences(lookback):
    a, u = draw(3001, "negative", batch=1, heads=2, features=2)
    a, u = a.astype(np.float32), u.astype(np.float32)
    x = jax.jit(functools.partial(sliding_window_recurrence, lookback=lookback))(a, u)
    assert_close(x, ref.block_two_pass(a, u, block_size=16, lookback=lookback), FLOAT32)


def test_the_exact_recurrence_does_not_depend_on_the_block_size():
    a, u, _ = draw_rows(53, 3, 2)
    x = linear_recurrence(a, u)
    for block_size in (1, 64):
        np.testing.assert_array_equal(linear_recurrence(a, u, block_size=block_size), x)
    windowed = sliding_window_recurrence(a, u, block_size=8, lookback=None)
    np.testing.assert_array_equal(windowed, x)


def test_a_window_over_everything_is_the_exact_recurrence():
    a, u, _ = draw_rows(53, 3, 2)
    assert_rows_close(sliding_window_recurrence(a, u, lookback=3), linear_recurrence(a, u), FLOAT32)
    one_block = sliding_window_recurrence(a, u, lookback=0, block_size=64)
    assert_rows_close(one_block, linear_recurrence(a, u), FLOAT32)


def test_the_default_window_is_one_block_of_16_before_the_own_one():
    ones = np.ones((1, 64, 1), np.float32)
    seen = [p + 1 + (16 if t else 0) for t in range(4) for p in range(16)]
    np.testing.assert_array_equal(
        sliding_window_recurrence(ones, ones[..., None])[0, :, 0, 0], seen
    )


def test_the_first_decay_of_a_block_acts_on_the_carrier():
    """A published pseudo-code drops it: x_t = w_t + g_t v_{t-1} needs g_t = (a_1, a_1 a_2, ..)."""
    a = np.ones((1, 32, 1), np.float32)
    a[:, 16] = 0.5
    u = np.zeros((1, 32, 1, 1), np.float32)
    u[:, 0] = 1.0
    x = sliding_window_recurrence(a, u)
    np.testing.assert_array_equal(x[0, :, 0, 0], np.r_[np.full(16, 1.0), np.full(16, 0.5)])
