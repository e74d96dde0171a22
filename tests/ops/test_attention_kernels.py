"""Which attention kernels are picked, on a GPU without tokamax and on a simulated TPU.

jax.nn stands in for cuDNN.
"""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_cases import mesh_of
from simulation import simulated_tpu

from swr_jax.ops import attention, attention_splash
from swr_jax.ops import reference as ref
from swr_jax.ops.attention import sliding_window_attention
from swr_jax.ops.attention_evaluation import run


def inputs(tokens):
    """Queries, keys and values, bfloat16."""
    rng = np.random.default_rng(tokens)
    return (jnp.asarray(rng.normal(size=(2, tokens, 4, 8)), jnp.bfloat16) for _ in range(3))


def dense_attention(q, k, v, window):
    """Masked softmax attention in float64, with every weight written out."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.einsum("btnd,bsnd->bnts", q, k) / np.sqrt(q.shape[3])
    age = np.subtract.outer(np.arange(q.shape[1]), np.arange(q.shape[1]))
    weights = np.where((age >= 0) & (age < (window or np.inf)), np.exp(logits), 0)
    return np.einsum("bnts,bsnd->btnd", weights / weights.sum(-1, keepdims=True), v)


@dataclasses.dataclass
class Device:
    """What the choice of an implementation asks a device for."""

    platform: str
    compute_capability: str
    device_kind: str = "a GPU"


@pytest.fixture
def calls_of_cudnn(monkeypatch):
    """On one Hopper GPU without tokamax; how jax.nn's attention is called there."""
    calls = []

    def attend(q, k, v, **options):
        calls.append(options)
        return dot_product_attention(q, k, v, **options | {"implementation": "xla"})

    dot_product_attention = jax.nn.dot_product_attention
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(jax, "devices", lambda: [Device("gpu", "9.0")])
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tokamax" else find_spec(name)
    )
    return calls


@pytest.mark.parametrize("window", [None, 7])
def test_a_gpu_without_tokamax_has_fused_attention(calls_of_cudnn, window):
    q, k, v = inputs(40)
    actual = sliding_window_attention(q, k, v, window=window)
    size = None if window is None else (window - 1, 0)
    expected = {"is_causal": True, "local_window_size": size, "scale": None}
    assert calls_of_cudnn == [expected | {"implementation": "cudnn"}]
    assert ref.relative_rms(actual, dense_attention(q, k, v, window)) < 1e-2
    assert attention.implementation_of(q, window=window) == "cudnn"


@pytest.mark.parametrize("window", [4, 7, 11])
def test_a_split_sequence_has_fused_attention(request, window):
    """Plain causal windows for cuDNN, whatever a device has from the left: 8 tokens are its own."""
    q, k, v = inputs(32)
    mesh = mesh_of(2, 1, 1, 4)
    calls = request.getfixturevalue("calls_of_cudnn")  # From here on devices are a fake.
    with jax.set_mesh(mesh):
        attend = functools.partial(sliding_window_attention, window=window)
        out, pull = jax.vjp(jax.jit(attend), q, k, v)
        gradients = pull(out)
    expected = {"local_window_size": (window - 1, 0), "scale": None, "implementation": "cudnn"}
    assert calls == [{"is_causal": True} | expected]
    assert ref.relative_rms(out, dense_attention(q, k, v, window)) < 1e-2
    wanted = jax.vjp(lambda *x: sliding_window_attention(*x, window=window), q, k, v)[1](out)
    for x, one_device in zip(gradients, wanted, strict=True):
        assert ref.relative_rms(x, np.asarray(one_device, np.float64)) < 1e-2


def test_what_cudnn_cannot_do_goes_to_xla(calls_of_cudnn, monkeypatch):
    q, k, v = inputs(40)
    sliding_window_attention(q, k, v, window=7, segment_ids=jnp.zeros((2, 40), int))
    sliding_window_attention(q[:, :20], k, v, window=7)
    sliding_window_attention(q, k, v, window=7, logits_soft_cap=2.0)
    sliding_window_attention(*(x[..., :3] for x in (q, k, v)), window=7)
    sliding_window_attention(*(x.astype(jnp.float32) for x in (q, k, v)), window=7)
    monkeypatch.setattr(jax, "devices", lambda: [Device("gpu", "7.5")])
    sliding_window_attention(q, k, v, window=7)
    assert {options["implementation"] for options in calls_of_cudnn} == {"xla"}


def test_without_the_cudnn_library_it_is_xla(calls_of_cudnn, monkeypatch):
    attend = jax.nn.dot_product_attention

    def missing(*arrays, implementation, **options):
        if implementation == "cudnn":
            raise RuntimeError("cuDNN is not detected.")
        return attend(*arrays, implementation=implementation, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", missing)
    q, _, _ = inputs(16)
    assert attention.implementation_of(q) == "xla"


@pytest.mark.parametrize(
    ("queries", "keys", "kv_heads", "window", "packed", "fused"),
    [
        (256, 256, 2, None, True, True),
        (128, 300, 1, 100, False, True),  # keys in no whole lanes
        (128, 300, 1, 100, False, False),
        pytest.param(256, 256, 2, None, True, False, marks=pytest.mark.slow),
        pytest.param(256, 384, 2, 128, True, True, marks=pytest.mark.slow),
        pytest.param(256, 384, 2, 128, True, False, marks=pytest.mark.slow),
    ],
)
def test_a_tpu_has_kernels_for_windows_and_documents(
    monkeypatch, queries, keys, kv_heads, window, packed, fused
):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    if not fused:
        monkeypatch.setattr(attention_splash, "_MOST_TILES_FUSED", 0)
        monkeypatch.setattr(attention_splash, "_MOST_TILES_FUSED_IN_WINDOWS", 0)
    rng = np.random.default_rng(keys)
    sizes = ((queries, 2), (keys, kv_heads), (keys, kv_heads), (queries, 2))
    q, k, v, bar = (
        jnp.asarray(rng.normal(size=(1, length, heads, 128)), jnp.bfloat16)
        for length, heads in sizes
    )
    documents = jnp.arange(keys)[None] // 70 if packed else None
    attend = functools.partial(sliding_window_attention, window=window, segment_ids=documents)
    with simulated_tpu():
        out, pull = jax.vjp(attend, q, k, v)
        found = (out, *pull(bar))
        named = attend(q, k, v, implementation="splash")
    np.testing.assert_array_equal(np.asarray(named, np.float32), np.asarray(out, np.float32))
    out, pull = jax.vjp(attend, *(x.astype(jnp.float32) for x in (q, k, v)))
    wanted = (out, *pull(bar.astype(jnp.float32)))
    for x, exact in zip(found, wanted, strict=True):
        assert 0 < ref.relative_rms(x, np.asarray(exact, np.float64)) < 1e-2


def test_a_split_sequence_has_the_kernels_of_a_tpu():
    """Two parts with a halo of 99 keys, of which the first one's are nobody's."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 256, 1, 128)), jnp.bfloat16) for _ in range(3))
    start = [0, 128 - 99]
    parts = []
    for part, place in enumerate(start):
        own = slice(128 * part, 128 * (part + 1))
        before = jnp.zeros_like(k[:, :99]) if part == 0 else None
        keys, values = (
            jnp.concatenate([before if part == 0 else x[:, place:128], x[:, own]], axis=1)
            for x in (k, v)
        )
        with simulated_tpu():
            first = jnp.int32(128 * part - 99)
            parts.append(run(q[:, own], keys, values, 100, None, "splash", first))
    wanted = dense_attention(q, k, v, 100)
    assert ref.relative_rms(jnp.concatenate(parts, axis=1), wanted) < 1e-2


def test_what_the_kernels_of_a_tpu_cannot_do_goes_to_xla(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    q, k, v = inputs(40)
    with simulated_tpu():
        with pytest.raises(NotImplementedError, match=r"T=40: .* multiples of 128"):
            sliding_window_attention(q, k, v, window=7, implementation="splash")
        assert attention.implementation_of(q, window=7) == "xla"
