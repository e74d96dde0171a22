"""Attention whose logits are scaled and softly capped: values, gradients, and who computes them."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import dense_attention, inputs, relative_error, segments
from mesh_cases import mesh_of
from simulation import simulated_tpu

from swr_jax.ops.attention import cached_attention, sliding_window_attention

# A cap that most logits feel: they have a standard deviation of about 2.8 times the scale.
OPTIONS = {"scale": 0.7, "logits_soft_cap": 1.5}
CAPPED = {"scale": 0.7, "soft_cap": 1.5}


def out_and_gradients(q, k, v, cotangent, **options):
    out, pull = jax.vjp(functools.partial(sliding_window_attention, **options), q, k, v)
    return out, *pull(cotangent.astype(out.dtype))


def check(arrays, found, *, window, packing=None, tolerance=1e-6, **oracle):
    *arrays, cotangent = arrays
    out, gradients = dense_attention(*arrays, window, packing, cotangent, **oracle)
    for name, x, exact in zip(("out", *"qkv"), found, (out, *gradients), strict=True):
        assert relative_error(x, exact) <= tolerance, name


@pytest.mark.parametrize(
    ("options", "oracle"),
    [
        (OPTIONS, CAPPED),
        ({"scale": 0.2}, {"scale": 0.2}),
        ({"logits_soft_cap": 0.5}, {"soft_cap": 0.5}),
    ],
)
@pytest.mark.parametrize(("length", "window"), [(40, None), (40, 7)])
def test_equals_attention_written_out(options, oracle, length, window):
    arrays, packing = inputs(length), segments(length)
    run = jax.jit(
        functools.partial(out_and_gradients, window=window, segment_ids=packing, **options)
    )
    check(arrays, run(*arrays), window=window, packing=packing, **oracle)


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (4, 1)])
def test_key_value_heads_serve_consecutive_query_heads(heads, kv_heads):
    arrays = inputs(21, heads=heads, kv_heads=kv_heads)
    found = jax.jit(functools.partial(out_and_gradients, window=7, **OPTIONS))(*arrays)
    check(arrays, found, window=7, **CAPPED)


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 100])
def test_long_sequences_go_chunk_by_chunk(window):
    arrays = inputs(1301, batch=1, heads=2, kv_heads=1)
    found = jax.jit(functools.partial(out_and_gradients, window=window, **OPTIONS))(*arrays)
    check(arrays, found, window=window, **CAPPED)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [("bfloat16", 8e-3), pytest.param("float16", 1e-3, marks=pytest.mark.slow)],
)
def test_half_precision_costs_only_its_own_rounding(dtype, tolerance):
    arrays = inputs(40, dtype=dtype)
    found = jax.jit(functools.partial(out_and_gradients, window=None, **OPTIONS))(*arrays)
    assert {x.dtype for x in found} == {jnp.dtype(dtype)}
    check(arrays, found, window=None, tolerance=tolerance, **CAPPED)


@pytest.mark.parametrize("window", [None, 6])
def test_a_cache_is_attended_alike(window):
    q, k, v, _ = inputs(5, 17)
    places = jnp.broadcast_to(jnp.arange(17), (2, 17))
    out = cached_attention(
        q,
        k[:, 12:],
        v[:, 12:],
        k[:, :12],
        v[:, :12],
        query_index=places[:, 12:],
        cached_index=places[:, :12],
        segment_ids=jnp.zeros((2, 5), jnp.int32),
        cached_segment_ids=jnp.zeros((2, 12), jnp.int32),
        window=window,
        **OPTIONS,
    )
    assert relative_error(out, dense_attention(q, k, v, window, **CAPPED)) <= 1e-6


@pytest.mark.parametrize("window", [None, 17])
def test_a_mesh_computes_the_same(window):
    arrays = inputs(64)
    with jax.set_mesh(mesh_of(2, 1, 2, 2)):
        found = jax.jit(functools.partial(out_and_gradients, window=window, **OPTIONS))(*arrays)
    check(arrays, found, window=window, **CAPPED)


@pytest.mark.parametrize("window", [None, pytest.param(100, marks=pytest.mark.slow)])
def test_a_tpu_has_kernels_for_it(monkeypatch, window):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(1, 128, 2, 128)), jnp.bfloat16) for _ in range(4)]
    options = {"window": window, "scale": 0.1, "logits_soft_cap": 1.5}
    with simulated_tpu():
        found = out_and_gradients(*arrays, **options)
        named = sliding_window_attention(*arrays[:3], implementation="splash", **options)
    np.testing.assert_array_equal(np.asarray(named, np.float32), np.asarray(found[0], np.float32))
    check(arrays, found, window=window, tolerance=2e-2, scale=0.1, soft_cap=1.5)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("tokamax") is None, reason="needs tokamax")
def test_tokamax_is_told_of_it():
    arrays = inputs(40)
    found = out_and_gradients(*arrays, window=7, implementation="tokamax", **OPTIONS)
    check(arrays, found, window=7, tolerance=1e-5, **CAPPED)


def test_cudnn_which_has_none_refuses():
    with pytest.raises(NotImplementedError, match=r"logits_soft_cap=1.5: cuDNN"):
        sliding_window_attention(*inputs(8)[:3], window=None, implementation="cudnn", **OPTIONS)


@pytest.mark.parametrize("name", ["scale", "logits_soft_cap"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), "1"])
def test_numbers_that_are_none_are_named(name, value):
    q, k, v, _ = inputs(4)
    with pytest.raises(ValueError, match=rf"{name}={value!r}; it must be a finite number above 0"):
        sliding_window_attention(q, k, v, window=None, **{name: value})
    place, documents = jnp.zeros((2, 4), jnp.int32), jnp.zeros((2, 4), jnp.int32)
    with pytest.raises(ValueError, match=rf"{name}={value!r}"):
        cached_attention(
            *(q, k, v, k, v),
            query_index=place,
            cached_index=place,
            segment_ids=documents,
            cached_segment_ids=documents,
            window=None,
            **{name: value},
        )
