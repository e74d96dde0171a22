"""`sliding_window_attention`: values, gradients, memory, independence of what it may not see."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import dense_attention, inputs, relative_error, segments

from swr_jax.ops.attention import cached_attention, sliding_window_attention


@functools.partial(jax.jit, static_argnames=("window", "implementation"))
def attend(q, k, v, cotangent, segment_ids=None, *, window, implementation=None):
    """Output and the three gradients."""
    out, pullback = jax.vjp(
        lambda q, k, v: sliding_window_attention(
            q, k, v, window=window, segment_ids=segment_ids, implementation=implementation
        ),
        q,
        k,
        v,
    )
    return out, pullback(cotangent)


def assert_exact(q, k, v, cotangent, *, window, segment_ids=None, tolerance=1e-6, **options):
    out, gradients = attend(q, k, v, cotangent, segment_ids, window=window, **options)
    wanted, wanted_gradients = dense_attention(q, k, v, window, segment_ids, cotangent)
    assert out.dtype == q.dtype
    assert relative_error(out, wanted) <= tolerance
    for name, got, want in zip("qkv", gradients, wanted_gradients, strict=True):
        # With one visible key the weights are constant: the gradient of q and k is exactly zero.
        if np.abs(want).max() < 1e-12:
            assert np.abs(np.asarray(got, np.float64)).max() < 1e-6, name
        else:
            assert relative_error(got, want) <= tolerance, name


# T in {1, w - 1, w, w + 1, 2 w, 3 w + 5}, without the lengths of zero.
LENGTHS = [
    (window, length)
    for window in (1, 2, 7, 16)
    for length in sorted({1, window - 1, window, window + 1, 2 * window, 3 * window + 5} - {0})
]


@pytest.mark.parametrize(("window", "length"), LENGTHS)
def test_window_equals_dense_attention(window, length):
    assert_exact(*inputs(length), window=window, segment_ids=segments(length, every=5))


@pytest.mark.parametrize("window", [None, 29, 1000])
def test_a_window_that_covers_everything_is_full_attention(window):
    args = inputs(29)
    assert_exact(*args, window=window)
    np.testing.assert_allclose(
        attend(*args, window=window)[0], attend(*args, window=None)[0], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 6), (6, 2), (6, 1)])
def test_key_value_heads_serve_consecutive_query_heads(heads, kv_heads):
    assert_exact(*inputs(21, heads=heads, kv_heads=kv_heads), window=7)


# Lengths past the chunk of 512 queries, so that blocks and chunks are looped over; windows on
# both sides of it; odd remainders.
@pytest.mark.parametrize(
    ("queries", "keys", "window"),
    [
        (1301, 1301, 16),
        (1301, 1301, 100),
        (1100, 1100, 600),
        (2050, 2050, None),
    ],
)
def test_long_sequences_equal_dense_attention(queries, keys, window):
    args = inputs(queries, keys, batch=1, heads=2, kv_heads=1)
    for packing in (segments(keys, batch=1, every=300), jnp.zeros((1, keys), jnp.int32)):
        assert_exact(*args, window=window, segment_ids=packing)


@pytest.mark.parametrize("window", [None, 100])
def test_long_sequences_without_segments_equal_dense_attention(window):
    assert_exact(*inputs(600, batch=1, heads=2, kv_heads=1), window=window)


@pytest.mark.parametrize(
    ("queries", "keys", "window"), [(5, 40, 7), (40, 43, 7), (700, 1000, 100), (1, 9, None)]
)
def test_queries_may_be_the_last_of_the_tokens(queries, keys, window):
    assert_exact(*inputs(queries, keys), window=window, segment_ids=segments(keys, every=30))


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 8e-3), ("float16", 1e-3)])
@pytest.mark.parametrize("window", [None, 7])
def test_half_precision_costs_only_its_own_rounding(dtype, tolerance, window):
    assert_exact(*inputs(53, dtype=dtype), window=window, tolerance=tolerance)


def test_softmax_is_float32_for_bfloat16_inputs():
    # 1000 equal weights: a bfloat16 sum of exponentials would stop growing at 256.
    q, k, v, _ = inputs(1000, batch=1, heads=1, kv_heads=1, dtype="bfloat16")
    out = sliding_window_attention(0 * q, k, jnp.ones_like(v), window=None)
    np.testing.assert_allclose(np.asarray(out, np.float32), 1.0, rtol=1e-2)


@pytest.mark.parametrize("window", [None, 16])
def test_large_logits_do_not_overflow(window):
    q, k, v, cotangent = inputs(40)
    q, k = 100 * q, 100 * k  # logits of 1e4, known to 1e-3 in float32
    out, gradients = attend(q, k, v, cotangent, window=window)
    assert relative_error(out, dense_attention(q, k, v, window)) <= 1e-2
    assert all(jnp.isfinite(x).all() for x in gradients)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("implementation", ["xla", "tokamax"])
def test_named_implementations_agree_with_dense_attention(implementation, window):
    args = inputs(40)
    for packing in (None, segments(40)):
        assert_exact(*args, window=window, segment_ids=packing, implementation=implementation)


@pytest.mark.parametrize("window", [None, 1, 7, 64, 100])
def test_a_future_token_changes_nothing_before_it(window):
    q, k, v, _ = inputs(700, batch=1)
    run = jax.jit(functools.partial(sliding_window_attention, window=window))
    before = run(q, k, v)
    changed = [x.at[:, 400].add(3.0) for x in (q, k, v)]
    after = run(*changed)
    np.testing.assert_array_equal(before[:, :400], after[:, :400])
    assert np.abs(before[:, 400] - after[:, 400]).max() > 0.1
    if window is not None:
        np.testing.assert_array_equal(before[:, 400 + window :], after[:, 400 + window :])


@pytest.mark.parametrize("window", [None, 7, 100])
def test_packed_documents_equal_separate_runs(window):
    lengths = [3, 200, 1, 97]
    q, k, v, _ = inputs(sum(lengths), batch=1)
    packing = np.repeat(np.arange(1, 5, dtype=np.int32), lengths)[None]
    run = jax.jit(functools.partial(sliding_window_attention, window=window))
    packed = run(q, k, v, segment_ids=jnp.asarray(packing))
    for end, length in zip(np.cumsum(lengths), lengths, strict=True):
        part = slice(end - length, end)
        alone = run(q[:, part], k[:, part], v[:, part])
        np.testing.assert_allclose(packed[:, part], alone, rtol=0, atol=2e-6)


@pytest.mark.parametrize("queries", [5, 1])
@pytest.mark.parametrize("window", [None, 7, 16])
def test_a_cache_in_any_order_equals_dense_attention(window, queries):
    keys, slots = 23, 30
    before = keys - queries
    q, k, v, _ = inputs(queries, keys)
    packing = segments(keys, every=12)
    order = np.random.default_rng(0).permutation(slots)
    place = np.full((2, slots), -1, np.int32)
    place[:, order[:before]] = np.arange(before)
    cache = [np.full((2, slots, 2, 8), 1e3, np.float32) for _ in range(2)]
    cached_segments = np.ones((2, slots), np.int32)
    for stored, x in zip([*cache, cached_segments], (k, v, packing), strict=True):
        stored[:, order[:before]] = x[:, :before]
    out = cached_attention(
        q,
        k[:, before:],
        v[:, before:],
        *map(jnp.asarray, cache),
        query_index=jnp.broadcast_to(jnp.arange(before, keys), (2, queries)),
        cached_index=jnp.asarray(place),
        segment_ids=jnp.asarray(packing[:, before:]),
        cached_segment_ids=jnp.asarray(cached_segments),
        window=window,
    )
    assert relative_error(out, dense_attention(q, k, v, window, packing)) <= 1e-6


def test_one_query_reads_its_cache_where_it_lies():
    cache = jax.ShapeDtypeStruct((2, 4096, 2, 32), jnp.float32)
    q = jax.ShapeDtypeStruct((2, 1, 4, 32), jnp.float32)
    new = jax.ShapeDtypeStruct((2, 1, 2, 32), jnp.float32)
    one, many = (jax.ShapeDtypeStruct((2, n), jnp.int32) for n in (1, 4096))

    def attend(q, k, v, cached_k, cached_v, query, cached, segment, cached_segment):
        return cached_attention(
            q,
            k,
            v,
            cached_k,
            cached_v,
            query_index=query,
            cached_index=cached,
            segment_ids=segment,
            cached_segment_ids=cached_segment,
            window=None,
        )

    arguments = (q, new, new, cache, cache, one, many, one, many)
    used = jax.jit(attend).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    assert used < cache.size * cache.dtype.itemsize / 2  # logits and weights: a few for each key


def temporary_bytes(length, *, window, backward):
    """Scratch memory of the compiled computation, 4 heads of 16 features, packed."""
    x = jax.ShapeDtypeStruct((1, length, 4, 16), jnp.float32)
    packing = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def run(q, k, v, packing):
        return sliding_window_attention(q, k, v, window=window, segment_ids=packing)

    def gradients(*args):
        return jax.grad(lambda *args: (run(*args) ** 2).sum(), argnums=(0, 1, 2))(*args)

    compiled = jax.jit(gradients if backward else run).lower(x, x, x, packing).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("window", [64, 1024])
def test_memory_of_a_window_is_linear_in_length(window, backward):
    short, long = (
        temporary_bytes(length, window=window, backward=backward) for length in (4096, 16384)
    )
    assert long <= 4.2 * short
    assert long <= 0.05 * 16384 * 16384 * 4 * 4


@pytest.mark.parametrize("backward", [False, True])
def test_memory_of_full_attention_is_far_below_quadratic(backward):
    short, long = (
        temporary_bytes(length, window=None, backward=backward) for length in (4096, 16384)
    )
    assert short <= 0.6 * 4096 * 4096 * 4 * 4
    assert long <= 4.2 * short


@pytest.mark.parametrize("window", [None, 7])
def test_works_under_vmap_scan_and_remat(window):
    q, k, v, _ = inputs(20)
    run = functools.partial(sliding_window_attention, window=window)
    stacked = [jnp.stack([x, 2 * x]) for x in (q, k, v)]
    vmapped = jax.vmap(run)(*stacked)
    _, scanned = jax.lax.scan(lambda c, x: (c, jax.checkpoint(run)(*x)), None, tuple(stacked))
    for i in range(2):
        wanted = dense_attention(*(x[i] for x in stacked), window)
        assert relative_error(vmapped[i], wanted) <= 1e-6
        assert relative_error(scanned[i], wanted) <= 1e-6


@pytest.mark.parametrize("window", [None, 16])
def test_sharded_over_batch_and_heads_equals_unsharded(window):
    q, k, v, _ = inputs(600, batch=4, heads=4, kv_heads=2)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"))
    place = jax.NamedSharding(mesh, jax.P("data", None, "tensor"))
    run = jax.jit(functools.partial(sliding_window_attention, window=window), out_shardings=place)
    out = run(*(jax.device_put(x, place) for x in (q, k, v)))
    assert relative_error(out, dense_attention(q, k, v, window)) <= 1e-6
    compiled = run.lower(*(jax.device_put(x, place) for x in (q, k, v))).compile().as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in compiled


X = np.zeros((2, 6, 4, 8), np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": X[0]}, r"q has shape \(6, 4, 8\).*batch, time, heads, features"),
        ({"k": X[:1], "v": X[:1]}, "k has shape .* batch and features per head must agree"),
        ({"v": X[:, :5]}, r"v has shape \(2, 5, 4, 8\) and k has \(2, 6, 4, 8\)"),
        ({"k": X[:, :, :3], "v": X[:, :, :3]}, "k has 3 heads and q has 4"),
        ({"k": X[:, :4], "v": X[:, :4]}, "q has 6 tokens and k has 4"),
        ({"q": X.astype(np.int32)}, "q has dtype int32; it must be floating"),
        ({"v": X.astype(np.float16)}, "v has dtype float16 and q has float32"),
        ({"q": X[:, :0], "k": X[:, :0], "v": X[:, :0]}, "every size must be at least 1"),
        ({"window": 0}, "window=0; it must be an int of at least 1"),
        ({"window": 2.0}, "window=2.0; it must be an int"),
        ({"segment_ids": np.zeros((2, 5), np.int32)}, r"segment_ids has shape \(2, 5\)"),
        ({"segment_ids": np.zeros((2, 6), np.float32)}, "segment_ids has dtype float32"),
        ({"implementation": "flash"}, "implementation='flash'; it must be None, 'xla'"),
    ],
)
def test_bad_input_is_named(change, message):
    options = {"q": X, "k": X, "v": X, "window": None} | change
    qkv = [jnp.asarray(options.pop(name)) for name in "qkv"]
    with pytest.raises(ValueError, match=message):
        sliding_window_attention(*qkv, **options)


def test_a_named_implementation_that_cannot_run_here_fails():
    if jax.default_backend() != "cpu":
        pytest.fail("written for the CPU, where cuDNN is missing")
    with pytest.raises((NotImplementedError, RuntimeError), match=r"(?i)cudnn|custom.?call|cuda"):
        attend(*inputs(16, dtype="bfloat16"), window=None, implementation="cudnn")


def test_importing_the_operator_imports_no_kernel_library():
    code = "import sys, swr_jax.ops.attention; assert 'tokamax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
