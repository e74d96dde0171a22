"""The Hopper kernels of the gated delta rule through the real compilers, and what they take."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding

from pallas_kernels import catalogue, targets
from pallas_kernels.gated_delta.mosaic_gpu import TuningConfig, backward, forward
from swr_jax import gated_delta_rule, nn

pytestmark = pytest.mark.targets

CHIP = "h100"
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
WALKS = {"gated_delta_walk_forward", "gated_delta_walk_backward"}
OTHERS = {"gated_delta_triangles", "gated_delta_cotangents"}


def test_within_budget_at_the_published_shapes():
    results = catalogue.check(CHIP, "gated_delta/")
    names = {report.name for report, _ in results}
    assert names == {
        f"gated_delta/{shape}/{passes}"
        for shape in ("published", "long")
        for passes in ("forward", "forward+backward")
    }
    for report, broken in results:
        assert broken == [], report.name
        for kernel in report.kernels:
            # The one with three warpgroups spills a little.
            assert kernel.spills == 0 or "cotangents" in kernel.name, kernel.name


# Features that are padded; several blocks of features of keys; the longest keys.
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((2, 100, 3, 40, 72), marks=pytest.mark.slow),
        (1, 128, 2, 192, 64),
        pytest.param((1, 64, 1, 256, 128), marks=pytest.mark.slow),
    ],
)
def test_other_heads_compile(sizes):
    batch, time, heads, q_dim, v_dim = sizes
    struct = jax.ShapeDtypeStruct
    q, v = (struct((batch, time, heads, size), jnp.bfloat16) for size in (q_dim, v_dim))
    gate = struct((batch, time, heads), jnp.float32)
    memory = struct((batch, heads, q_dim, v_dim), jnp.float32)
    config = TuningConfig()

    def both(do, dmemory, *arguments):
        return forward(config, *arguments), backward(config, *arguments, do, dmemory)

    given = q, q, v, gate, gate, memory
    report = targets.compile_for(CHIP, both, v, memory, *given, name=f"{sizes}")
    assert {kernel.name for kernel in report.kernels} == WALKS | OTHERS


def hopper_mesh(axis_type):
    """Two by two H100s."""
    devices = np.array(targets.devices(CHIP, "1x1x4")).reshape(2, 2)
    return Mesh(devices, ("data", "tensor"), axis_types=(axis_type,) * 2)


@pytest.mark.parametrize("mode", ["automatic", "explicit", "shard_map"])
def test_devices_share_batch_and_heads_without_communication(mode):
    mesh = hopper_mesh(AxisType.Explicit if mode == "explicit" else AxisType.Auto)
    spec = jax.P("data", None, "tensor")
    struct = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, spec))
    q, v = (struct((4, 200, 6, size), jnp.bfloat16) for size in (64, 128))
    gate = struct(q.shape[:3], jnp.float32)

    def both(*arguments):
        o, pull = jax.vjp(gated_delta_rule, *arguments)
        return o, *pull(o)

    fn = both
    if mode == "shard_map":
        fn = jax.shard_map(both, mesh=mesh, in_specs=spec, out_specs=spec)
    with jax.set_mesh(mesh):
        text = jax.jit(fn).lower(q, q, v, gate, gate).compile().as_text()
    assert kernels_of(text) == WALKS | OTHERS
    calls = [line for line in text.splitlines() if "mosaic_gpu" in line and "custom-call(" in line]
    for call in calls:
        assert "bf16[2,256,3,64]" in call
    for collective in COLLECTIVES:
        assert not re.search(rf"\b{collective}(-start)?\(", text), collective


def test_the_layer_gets_the_kernels_by_default():
    """A function for Hoppers that are not there, under their mesh, forward and backward."""
    mesh = hopper_mesh(AxisType.Auto)
    layer = nnx.eval_shape(
        lambda: nn.GatedDeltaNet(256, num_heads=2, dtype=jnp.bfloat16, rngs=nnx.Rngs(params=0))
    )
    graph, parameters = nnx.split(layer)

    def loss(parameters, x):
        return jnp.sum(nnx.merge(graph, parameters)(x).astype(jnp.float32))

    sharding = NamedSharding(mesh, jax.P("data"))
    x = jax.ShapeDtypeStruct((4, 512, 256), jnp.bfloat16, sharding=sharding)
    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(parameters, x).compile().as_text()
    assert kernels_of(text) == WALKS | OTHERS


def kernels_of(text):
    """Names of the kernels in a compiled program."""
    return {name for name in WALKS | OTHERS if re.search(rf"\b{name}\b", text)}
