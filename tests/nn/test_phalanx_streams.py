"""`Phalanx` as a stream: prefill and decode in pieces of any length, documents that change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrence_cases import assert_rows_close

from swr_jax.nn import Phalanx

FEATURES, BLOCK = 24, 4
LENGTH = 5 * BLOCK + 3
FLOAT32 = 2e-6
VARIANTS = {
    "published": {},
    "grouped": {"num_gate_heads": 3, "global_heads": 2, "lookback": 2, "gate_activation": "silu"},
    "bare": {"pre_gate": False, "post_gate": False, "lookback": 0, "global_heads": 1},
    "exact": {"lookback": None},
}


def make(variant, **options):
    options = {"head_dim": 4, "block_size": BLOCK} | VARIANTS[variant] | options
    return Phalanx(FEATURES, rngs=nnx.Rngs(0), **options)


@functools.cache
def compiled(variant):
    definition, variables = nnx.split(make(variant))
    full = jax.jit(lambda x, **arguments: nnx.merge(definition, variables)(x, **arguments))
    step = jax.jit(
        lambda x, state, **arguments: nnx.merge(definition, variables)(x, state=state, **arguments)
    )
    return full, step


def sample(length=LENGTH):
    rng = np.random.default_rng(length)
    return jnp.asarray(rng.normal(size=(2, length, FEATURES)), jnp.float32)


def fed_in_pieces(variant, x, chunks, segment_ids=None):
    """Outputs and last state of a stream fed in `chunks`, which add up to its length."""
    _, step = compiled(variant)
    state, outputs, start = make(variant).init_state(2, max_length=x.shape[1]), [], 0
    for length in chunks:
        part = slice(start, start + length)
        ids = {} if segment_ids is None else {"segment_ids": segment_ids[:, part]}
        y, state = step(x[:, part], state, **ids)
        outputs.append(y)
        start += length
    assert start == x.shape[1]
    return jnp.concatenate(outputs, axis=1), state


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("prompt", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 5])
def test_prefill_then_decode_is_one_full_forward(variant, prompt):
    full, _ = compiled(variant)
    x = sample()
    y, state = fed_in_pieces(variant, x, [prompt] + [1] * (LENGTH - prompt))
    assert_rows_close(y, full(x), FLOAT32)
    if state.window is not None and state.window.lookback is not None:
        np.testing.assert_array_equal(state.window.position, [LENGTH % BLOCK] * 2)


def documents(boundaries):
    """[2, LENGTH]: a new document at each of the boundaries in row 0; in row 1 at half of them."""
    starts = np.zeros((2, LENGTH), np.int32)
    starts[0, boundaries] = 1
    starts[1, boundaries[::2]] = 1
    return jnp.asarray(1 + np.cumsum(starts, axis=1), jnp.int32)


@given(
    st.lists(st.sampled_from([1, 2, 3, 5]), min_size=LENGTH, max_size=LENGTH),
    st.lists(st.integers(1, LENGTH - 1), max_size=5),
)
@settings(max_examples=25, deadline=None)
def test_any_chunking_of_packed_documents_is_one_full_forward(chunks, boundaries):
    """Documents begin in the middle of a call, at its first token, and at one-token calls."""
    chunks = [n for n, end in zip(chunks, np.cumsum(chunks), strict=True) if end <= LENGTH]
    chunks += [1] * (LENGTH - sum(chunks))
    full, _ = compiled("grouped")
    x, segment_ids = sample(), documents(boundaries)
    y, state = fed_in_pieces("grouped", x, chunks, segment_ids)
    assert_rows_close(y, full(x, segment_ids=segment_ids), FLOAT32)
    np.testing.assert_array_equal(state.last_segment, segment_ids[:, -1])


@pytest.mark.parametrize("chunk", [1, 3])
def test_a_new_document_at_the_first_token_of_a_call_forgets_the_state(chunk):
    """In the row where the segment changed, and in no other."""
    full, step = compiled("grouped")
    x = sample(BLOCK + chunk)
    first, second = x[:, :BLOCK], x[:, BLOCK:]
    ids = jnp.asarray([[3], [3]], jnp.int32)
    start = make("grouped").init_state(2)
    _, state = step(first, start, segment_ids=jnp.repeat(ids, BLOCK, axis=1))
    changed = jnp.repeat(ids + jnp.asarray([[1], [0]]), chunk, axis=1)
    y, _ = step(second, state, segment_ids=changed)
    assert_rows_close(y[:1], full(second)[:1], FLOAT32)
    assert_rows_close(y[1:], full(x)[1:, BLOCK:], FLOAT32)


def test_without_segment_ids_a_stream_goes_on_in_the_last_segment():
    full, step = compiled("grouped")
    x, ids = sample(), jnp.full((2, 9), 7, jnp.int32)
    _, state = step(x[:, :9], make("grouped").init_state(2), segment_ids=ids)
    y, state = step(x[:, 9:], state)
    assert_rows_close(y, full(x)[:, 9:], FLOAT32)
    np.testing.assert_array_equal(state.last_segment, [7, 7])


def test_decoding_keeps_the_computation_dtype_and_a_float32_state():
    layer, x = make("grouped", dtype=jnp.bfloat16), sample()
    step = nnx.jit(lambda layer, x, state: layer(x, state=state))
    state, outputs = layer.init_state(2), []
    for token in range(LENGTH):
        y, state = step(layer, x[:, token : token + 1], state)
        outputs.append(y)
    assert y.dtype == jnp.bfloat16
    assert {v.dtype.name for v in jax.tree.leaves(state)} == {"float32", "int32"}
    whole = nnx.jit(lambda layer, x: layer(x))(layer, x)
    assert_rows_close(jnp.concatenate(outputs, axis=1), whole.astype(jnp.float32), 4e-3)


def test_the_state_does_not_grow_with_the_stream():
    layer = make("grouped")
    sizes = {
        sum(x.size for x in jax.tree.leaves(layer.init_state(2, max_length=n)))
        for n in (1, 100_000)
    }
    assert len(sizes) == 1


def test_gradients_flow_through_the_state():
    """Cut in two, carrying the state: the same gradient by the first piece's inputs."""
    full, step = compiled("published")
    x = sample()

    def in_two(x):
        y, state = step(x[:, :7], make("published").init_state(2))
        z, _ = step(x[:, 7:], state)
        return jnp.sum(jnp.sin(jnp.concatenate([y, z], axis=1)))

    wanted = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(full(x)))))(x)
    assert_rows_close(jax.jit(jax.grad(in_two))(x), wanted, FLOAT32)
