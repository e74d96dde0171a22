"""Phalanx on a TPU, simulated: projections write what the kernel reads; nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from simulation import simulated_tpu

from swr_jax.nn import Phalanx
from swr_jax.ops import lane_order
from swr_jax.ops.reference import relative_rms

HEADS, FEATURES, LENGTH = 128, 16, 21


def make(**options):
    options = {"head_dim": FEATURES, "block_size": 8} | options
    layer = Phalanx(HEADS * FEATURES, **options, rngs=nnx.Rngs(0))
    # Biases apart from zero, or their order would not show.
    for name in ("decay", "pre_gate", "post_gate"):
        if (projection := getattr(layer, name)) is not None:
            key = jax.random.key(len(name))
            projection.bias[...] = jax.random.normal(key, projection.bias.shape)
    return layer


def evaluate(layer, x, documents, y_bar):
    """Output, and the gradient of every parameter and of the input."""
    definition, parameters = nnx.split(layer)

    def run(parameters, x):
        return nnx.merge(definition, parameters)(x, segment_ids=documents)

    y, pull = jax.vjp(run, parameters, x)
    return y, pull(y_bar)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"lookback": None, "pre_gate": False}, marks=pytest.mark.slow),
        pytest.param({"global_heads": HEADS, "post_gate": False}, marks=pytest.mark.slow),
        pytest.param(
            {"pre_gate": False, "post_gate": False, "fixed_decay": 0.9}, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_equals_the_layer_elsewhere_in_value_and_gradients(options, monkeypatch):
    layer = make(**options)
    rng = np.random.default_rng(0)
    x, y_bar = rng.standard_normal((2, 1, LENGTH, layer.features)).astype(np.float32)
    documents = np.asarray([[0] * 10 + [1] * (LENGTH - 10)], np.int32)
    expected = evaluate(layer, x, documents, y_bar)
    called = []
    kernel = lane_order.recurrence_in_lane_order
    monkeypatch.setattr(
        lane_order,
        "recurrence_in_lane_order",
        lambda *args, **kwargs: called.append(True) or kernel(*args, **kwargs),
    )
    with simulated_tpu():
        got = evaluate(layer, x, documents, y_bar)
    assert called
    for (path, actual), wanted in zip(
        jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        assert relative_rms(actual, wanted) <= 2e-6, path


@pytest.mark.parametrize(
    ("shape", "dtype", "window", "expected"),
    [
        ((1, 64, 128, 16), jnp.bfloat16, (16, 1), True),
        ((1, 64, 256, 32), jnp.float32, (16, None), True),
        ((1, 64, 64, 16), jnp.bfloat16, (16, 1), False),
        ((1, 64, 128, 8), jnp.bfloat16, (16, 1), False),
        ((1, 64, 128, 16), jnp.float16, (16, 1), False),
        ((1, 64, 128, 16), jnp.bfloat16, (16, 2), False),
    ],
)
def test_what_a_tpu_reads(shape, dtype, window, expected):
    block_size, lookback = window
    arguments = {"block_size": block_size, "lookback": lookback}
    assert not lane_order.is_read_here(shape, jnp.dtype(dtype), **arguments)  # on a CPU
    with simulated_tpu():
        assert lane_order.is_read_here(shape, jnp.dtype(dtype), **arguments) is expected


@pytest.mark.parametrize(
    ("sizes", "heads", "time", "lookback", "expected"),
    [
        ((2, 1, 2, 1), 256, 64, 1, True),
        ((2, 1, 2, 1), 128, 64, 1, False),  # 64 heads on a device
        ((1, 1, 1, 4), 128, 128, 1, True),
        ((1, 1, 1, 4), 128, 72, 1, False),  # blocks lie across the cuts
        ((1, 1, 1, 4), 128, 128, None, False),
    ],
)
def test_over_a_mesh_every_device_needs_whole_groups_and_blocks(
    sizes, heads, time, lookback, expected
):
    axes = ("data", "fsdp", "tensor", "sequence")
    mesh = jax.make_mesh(sizes, axes, axis_types=(AxisType.Auto,) * 4)
    with simulated_tpu(), jax.set_mesh(mesh):
        found = lane_order.is_read_here(
            (2, time, heads, 16), jnp.dtype(jnp.bfloat16), block_size=8, lookback=lookback
        )
    assert found is expected


@pytest.mark.slow
def test_a_split_sequence_hands_on_its_carrier():
    layer = make()
    rng = np.random.default_rng(0)
    x, y_bar = rng.standard_normal((2, 1, 32, layer.features)).astype(np.float32)
    documents = np.asarray([[0] * 20 + [1] * 12], np.int32)
    expected = evaluate(layer, x, documents, y_bar)
    axes = ("data", "fsdp", "tensor", "sequence")
    mesh = jax.make_mesh((1, 1, 1, 2), axes, axis_types=(AxisType.Auto,) * 4)
    with simulated_tpu(cores=1), jax.set_mesh(mesh):
        got = jax.jit(lambda *x: evaluate(layer, *x))(x, documents, y_bar)
    for actual, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert relative_rms(actual, wanted) <= 2e-6
