"""Which attention kernels are picked on a GPU without tokamax; jax.nn stands in for cuDNN."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_cases import mesh_of

from swr_jax.ops import attention
from swr_jax.ops import reference as ref
from swr_jax.ops.attention import sliding_window_attention


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
    expected = {"is_causal": True, "local_window_size": size, "implementation": "cudnn"}
    assert calls_of_cudnn == [expected]
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
    expected = {"local_window_size": (window - 1, 0), "implementation": "cudnn"}
    assert calls == [{"is_causal": True} | expected]
    assert ref.relative_rms(out, dense_attention(q, k, v, window)) < 1e-2
    wanted = jax.vjp(lambda *x: sliding_window_attention(*x, window=window), q, k, v)[1](out)
    for x, one_device in zip(gradients, wanted, strict=True):
        assert ref.relative_rms(x, np.asarray(one_device, np.float64)) < 1e-2


def test_what_cudnn_cannot_do_goes_to_xla(calls_of_cudnn, monkeypatch):
    q, k, v = inputs(40)
    sliding_window_attention(q, k, v, window=7, segment_ids=jnp.zeros((2, 40), int))
    sliding_window_attention(q[:, :20], k, v, window=7)
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
