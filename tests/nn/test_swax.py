"""`SWAX`: the stack written out, its two orders, streams, packed documents, other windows."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from layer_cases import (
    documents,
    fed_in_pieces,
    numpy_mlstm_layer,
    parameters_of,
    randomised,
    relative_error,
    sample,
    sigmoid,
)

from swr_jax.nn import SWAX, MLSTMConfig

FEATURES, LENGTH, WINDOW = 16, 19, 5
FLOAT32 = 1e-5
MLSTM = {"num_heads": 2, "chunk_size": 8}
OPTIONS = {
    "depth": 4,
    "window": WINDOW,
    "num_heads": 2,
    "mlstm": MLSTMConfig(**MLSTM),
    "mlp_features": 24,
}
SWA_FIRST, MLSTM_FIRST = ("swa", "mlstm"), ("mlstm", "swa")


@functools.cache
def make(order=SWA_FIRST, **options):
    options = OPTIONS | {"order": order} | options
    return randomised(lambda: SWAX(FEATURES, rngs=nnx.Rngs(0), **options))


@functools.cache
def compiled(**options):
    definition, variables = nnx.split(make(**options))
    full = jax.jit(lambda x, **arguments: nnx.merge(definition, variables)(x, **arguments))
    step = jax.jit(
        lambda x, state, **arguments: nnx.merge(definition, variables)(x, state=state, **arguments)
    )
    return full, step


def numpy_attention(x, p, num_heads):
    """One document [T, M]: softmax over the window, with rotary positions."""
    time, width = x.shape
    q, k, v = (
        (x @ p[f"{name}.kernel"]).reshape(time, num_heads, -1) for name in ("query", "key", "value")
    )
    half = q.shape[2] // 2
    angle = np.outer(np.arange(time), 10_000.0 ** (-np.arange(half) / half))
    turn = np.exp(1j * angle)[:, None]
    q, k = ((y[..., :half] + 1j * y[..., half:]) * turn for y in (q, k))
    out = np.zeros_like(v)
    for t in range(time):
        seen = slice(max(0, t - WINDOW + 1), t + 1)
        scores = np.einsum("hd,shd->hs", q[t], k[seen].conj()).real / np.sqrt(2 * half)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        out[t] = np.einsum("hs,shd->hd", weights, v[seen])
    return out.reshape(time, width) @ p["output.kernel"]


def numpy_stack(x, order, parameters):
    """One document [T, M] through the blocks in float64."""

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-6) * scale

    for period in range(2):
        for place, mixer in enumerate(order):
            prefix = f"{place}."
            p = {
                k.removeprefix(prefix): v[period]
                for k, v in parameters.items()
                if k[0] == prefix[0]
            }
            own = {k.removeprefix("mixer."): v for k, v in p.items()}
            h = norm(x, p["mixer_norm.scale"])
            x = x + (
                numpy_attention(h, own, 2) if mixer == "swa" else numpy_mlstm_layer(h, own, MLSTM)
            )
            h = norm(x, p["mlp_norm.scale"])
            gate = h @ p["mlp.gate.kernel"]
            x = x + (gate * sigmoid(gate) * (h @ p["mlp.up.kernel"])) @ p["mlp.down.kernel"]
    return x


@pytest.mark.parametrize("order", [SWA_FIRST, MLSTM_FIRST], ids="-".join)
def test_equals_the_blocks_written_out_in_float64(order):
    x = sample(LENGTH, FEATURES)
    y = compiled(order=order)[0](x)
    parameters = parameters_of(make(order).periods)
    for row in range(2):
        wanted = numpy_stack(np.asarray(x[row], np.float64), order, parameters)
        assert relative_error(y[row], wanted) <= FLOAT32


def test_the_future_changes_no_bit_of_the_past():
    full, _ = compiled()
    x = sample(LENGTH, FEATURES)
    y = np.asarray(full(x))
    for token in (1, 8, LENGTH - 1):
        changed = np.asarray(full(x.at[:, token].add(1.0)))
        np.testing.assert_array_equal(changed[:, :token], y[:, :token])
        assert (changed[:, token] != y[:, token]).any()


def test_a_token_sees_everything_before_it_beyond_all_windows():
    """Through the memories: two windows of 5 tokens alone end 8 tokens back."""
    full, _ = compiled()
    x = sample(LENGTH, FEATURES)
    changed = full(x.at[:, 0].add(1.0))
    assert (np.abs(changed - full(x)).max(axis=2) > 1e-4).all()


@pytest.mark.parametrize(
    "order", [SWA_FIRST, pytest.param(MLSTM_FIRST, marks=pytest.mark.slow)], ids="-".join
)
def test_pieces_of_packed_documents_are_one_full_forward(order):
    full, step = compiled(order=order)
    x, ids = sample(LENGTH, FEATURES), documents(LENGTH, [6, 8, 15])
    y, _ = fed_in_pieces(make(order), step, x, [6, 1, 1, 6, 1, 1, 1, 1, 1], ids)
    assert relative_error(y, full(x, segment_ids=ids)) <= FLOAT32


def test_packed_documents_equal_separate_runs():
    full, _ = compiled()
    x, ids = sample(LENGTH, FEATURES), documents(LENGTH, [2, 3, 12])
    y = full(x, segment_ids=ids)
    for row in range(2):
        for document in np.unique(ids[row]):
            inside = np.asarray(ids[row] == document)
            # The document at the start of the sequence; what follows there comes too late to act.
            alone = full(jnp.roll(x, -int(np.argmax(inside)), axis=1))[row, : inside.sum()]
            assert relative_error(y[row, inside], alone) <= FLOAT32


def test_the_state_does_not_grow_with_the_stream():
    short, long = (
        jax.eval_shape(lambda n=n: make().init_state(2, max_length=n)) for n in (1, 9**9)
    )
    assert jax.tree.leaves(short) == jax.tree.leaves(long)


def test_windows_share_their_parameters():
    short, long = make(window=2), make()
    jax.tree.map(np.testing.assert_array_equal, nnx.state(short), nnx.state(long))
    x = sample(LENGTH, FEATURES)
    y, other = (compiled(**options)[0](x) for options in ({}, {"window": 2}))
    assert relative_error(y[:, :2], other[:, :2]) <= FLOAT32
    assert relative_error(y[:, 2:], other[:, 2:]) > 1e-2


def test_bfloat16_and_rematerialisation():
    x = sample(LENGTH, FEATURES)
    half = make(dtype=jnp.bfloat16, remat="full")
    y = jax.jit(lambda x: half(x))(x)
    assert y.dtype == jnp.bfloat16
    assert relative_error(y, compiled()[0](x)) <= 3e-2


def test_every_axis_has_a_logical_name():
    for path, variable in nnx.to_flat_state(nnx.state(make())):
        names = variable.out_sharding
        assert names[0] == "layers", path
        assert len(names) == variable.ndim, path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": ("swa", "swa")}, "order=('swa', 'swa'): must be one of ('swa', 'mlstm'), ('mls"),
        ({"depth": 3}, "depth=3 is not a multiple of the 2 mixers"),
        ({"window": 0}, "window=0; it must be at least 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SWAX(FEATURES, rngs=nnx.Rngs(0), **(OPTIONS | options))
