"""`SlidingWindowAttention`: the layer's arithmetic, its state, its use from Linen."""

import functools

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from swr_jax.nn.attention import SlidingWindowAttention, rotary_embedding

FEATURES, LENGTH, WINDOW = 32, 23, 6
WINDOWS = [1, WINDOW, None]


def make(window, *, heads=4, kv_heads=2, **options):
    return SlidingWindowAttention(
        FEATURES,
        num_heads=heads,
        num_kv_heads=kv_heads,
        window=window,
        rngs=nnx.Rngs(0),
        **options,
    )


@functools.cache
def compiled(window):
    """A layer of this window as pure functions, without and with a state."""
    definition, variables = nnx.split(make(window))
    full = jax.jit(lambda x, **options: nnx.merge(definition, variables)(x, **options))
    step = jax.jit(
        lambda x, state, **options: nnx.merge(definition, variables)(x, state=state, **options)
    )
    return full, step


def sample(length=LENGTH, batch=2):
    rng = np.random.default_rng(length)
    return jnp.asarray(rng.normal(size=(batch, length, FEATURES)), jnp.float32)


def numpy_layer(layer, x, positions, segment_ids):
    """The layer in float64 NumPy, token by token and head by head."""
    kernel = lambda name: np.asarray(getattr(layer, name).kernel[...], np.float64)  # noqa: E731
    x = np.asarray(x, np.float64)
    batch, length, _ = x.shape
    dim, group = layer.head_dim, layer.num_heads // layer.num_kv_heads
    out = np.zeros((batch, length, layer.num_heads * dim))

    def rotated(vector, position):
        # Pairs (i, i + dim / 2) as complex numbers, turned by the angle of their frequency.
        pairs = vector[: dim // 2] + 1j * vector[dim // 2 :]
        turned = pairs * np.exp(1j * position * 10_000.0 ** (-2 * np.arange(dim // 2) / dim))
        return np.concatenate([turned.real, turned.imag])

    for b in range(batch):
        q, k, v = (x[b] @ kernel(name) for name in ("query", "key", "value"))
        for n in range(layer.num_heads):
            own, shared = (
                slice(n * dim, (n + 1) * dim),
                slice(n // group * dim, (n // group + 1) * dim),
            )
            for i in range(length):
                oldest = 0 if layer.window is None else max(0, i - layer.window + 1)
                seen = [j for j in range(oldest, i + 1) if segment_ids[b, j] == segment_ids[b, i]]
                query = rotated(q[i, own], positions[b, i])
                logits = [query @ rotated(k[j, shared], positions[b, j]) for j in seen]
                weights = np.exp(np.array(logits) / np.sqrt(dim))
                out[b, i, own] = weights @ v[seen][:, shared] / weights.sum()
    return out @ kernel("output")


def packing():
    """Two rows of documents: numbers of the documents, and positions within them."""
    lengths = [[9, 1, 13], [23]]
    segment_ids = np.array([np.repeat(np.arange(1, len(row) + 1), row) for row in lengths])
    positions = np.array([np.concatenate([np.arange(n) for n in row]) for row in lengths])
    return jnp.asarray(segment_ids, jnp.int32), jnp.asarray(positions, jnp.int32)


def relative_error(got, wanted):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    return np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2))


@pytest.mark.parametrize("window", WINDOWS)
def test_equals_the_layer_written_out_in_float64(window):
    x, (segment_ids, positions) = sample(), packing()
    full, _ = compiled(window)
    packed = full(x, segment_ids=segment_ids, positions=positions)
    assert relative_error(packed, numpy_layer(make(window), x, positions, segment_ids)) <= 2e-6
    plain = numpy_layer(make(window), x, np.tile(np.arange(LENGTH), (2, 1)), np.ones((2, LENGTH)))
    assert relative_error(full(x), plain) <= 2e-6


# Decoding, lengths around the window, chunks longer than it, one call over all.
CHUNKINGS = [
    [1] * LENGTH,
    [1, WINDOW - 1, WINDOW, WINDOW + 1, 1, 1, 2],
    [2 * WINDOW, 1, 2, 2 * WINDOW - 4],
    [LENGTH],
]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("chunks", CHUNKINGS, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_any_chunking_equals_one_call(window, chunks, packed):
    full, step = compiled(window)
    x, (segment_ids, positions) = sample(), packing()
    options = {"segment_ids": segment_ids, "positions": positions} if packed else {}
    state, outputs, start = make(window).init_state(2, max_length=LENGTH), [], 0
    for length in chunks:
        part = slice(start, start + length)
        y, state = step(x[:, part], state, **{name: z[:, part] for name, z in options.items()})
        outputs.append(y)
        start += length
    assert start == LENGTH
    wanted = full(x, **options)
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), wanted, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(state.position, [LENGTH, LENGTH])


def test_chunks_past_the_loop_over_blocks_equal_one_call():
    layer, x = make(100), sample(1300, batch=1)
    _, state = layer(x[:, :150], state=layer.init_state(1, max_length=1))
    y, _ = layer(x[:, 150:], state=state)
    np.testing.assert_allclose(y, layer(x)[:, 150:], rtol=0, atol=2e-6)


def test_without_segment_ids_a_stream_goes_on_in_the_last_segment():
    full, step = compiled(None)
    x, segment_ids = sample(), jnp.full((2, LENGTH), 7)
    state = make(None).init_state(2, max_length=LENGTH)
    _, state = step(x[:, :9], state, segment_ids=segment_ids[:, :9])
    y, _ = step(x[:, 9:], state)
    np.testing.assert_allclose(y, full(x)[:, 9:], rtol=0, atol=2e-6)


def test_state_of_a_window_does_not_grow_with_the_stream():
    sizes = {
        n: sum(x.size for x in jax.tree.leaves(make(WINDOW).init_state(2, max_length=n)))
        for n in (1, 100_000)
    }
    assert sizes[1] == sizes[100_000]


def test_an_overflowing_cache_is_refused_or_poisons_the_result():
    layer, x = make(None), sample(8)
    with pytest.raises(ValueError, match=r"8 tokens after 0 do not fit .* max_length=7"):
        layer(x, state=layer.init_state(2, max_length=7))
    _, state = layer(x[:, :5], state=layer.init_state(2, max_length=7))
    with pytest.raises(ValueError, match="3 tokens after 5 do not fit"):
        layer(x[:, 5:], state=state)
    _, step = compiled(None)
    assert jnp.isnan(step(x[:, 5:], state)[0]).all()
    assert jnp.isfinite(step(x[:, 5:7], state)[0]).all()


def test_rotary_logits_depend_on_distances_only():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 4, 1, 16)), jnp.float32) for _ in range(2))

    def logits(shift):
        positions = jnp.arange(4)[None] + shift
        turned = [rotary_embedding(x, positions) for x in (q, k)]
        return jnp.einsum("btnd,bsnd->ts", *turned)

    np.testing.assert_allclose(logits(0), logits(1000), rtol=0, atol=2e-3)
    assert np.abs(logits(0) - jnp.einsum("btnd,bsnd->ts", q, k)).max() > 0.1


def test_rotary_angles_are_float32_for_bfloat16_inputs():
    x = jnp.ones((1, 1, 1, 16))
    position = jnp.array([[4097]])  # no bfloat16
    exact = rotary_embedding(x, position)
    half = rotary_embedding(x.astype(jnp.bfloat16), position)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(half, np.float32), exact, rtol=0, atol=1e-2)


def test_bfloat16_computation_keeps_float32_parameters():
    layer, x = make(WINDOW, dtype=jnp.bfloat16), sample()
    assert {v.dtype for v in jax.tree.leaves(nnx.state(layer))} == {jnp.dtype("float32")}
    y, state = layer(x, state=layer.init_state(2, max_length=LENGTH))
    assert y.dtype == state.keys.dtype == jnp.bfloat16
    assert relative_error(y, compiled(WINDOW)[0](x)) <= 2e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3, "window": 4}, "features=32 is not a multiple of num_heads=3"),
        ({"num_heads": 4, "num_kv_heads": 3, "window": 4}, "num_heads=4, num_kv_heads=3"),
        ({"num_heads": 32, "window": 4}, "head_dim=1; rotary"),
        ({"num_heads": 4, "window": 0}, "window=0; it must be at least 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SlidingWindowAttention(FEATURES, rngs=nnx.Rngs(0), **options)


def test_drops_into_a_linen_model():
    class Model(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x):
            attention = nnx.bridge.to_linen(
                SlidingWindowAttention, FEATURES, num_heads=4, num_kv_heads=2, window=WINDOW
            )
            return x + attention(x)

    x = sample()
    model = Model()
    variables = model.init(jax.random.key(0), x)
    y = jax.jit(model.apply)(variables, x)

    layer = make(WINDOW)
    (kernels,) = flax.linen.meta.unbox(variables)["params"].values()
    for name in ("query", "key", "value", "output"):
        getattr(layer, name).kernel[...] = kernels[name]["kernel"]
    np.testing.assert_allclose(y, x + layer(x), rtol=0, atol=2e-6)

    gradients = jax.grad(lambda variables: model.apply(variables, x).sum())(variables)
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(gradients["params"]))
