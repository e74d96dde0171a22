"""The Hopper kernels through the real compilers, and what they take there."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding

from pallas_kernels import catalogue, targets
from pallas_kernels.swr.mosaic_gpu import block_two_pass
from swr_jax import gated_sliding_window_recurrence, nn

pytestmark = pytest.mark.targets

CHIP = "h100"
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def test_within_budget_at_the_reference_shape():
    results = catalogue.check(CHIP, "swr/")
    assert {report.name for report, _ in results} == {
        f"swr/{form}/{window}/{passes}"
        for form in ("plain", "gated")
        for window in ("window16", "window64", "exact")
        for passes in ("forward", "forward+backward")
    }
    for report, broken in results:
        assert broken == [], report.name
        # Nothing is copied, transposed or padded around the kernels.
        if "window" in report.name:
            assert report.other_operations == {}, report.name


def gradients(window, state, gated, a, v):
    """Output and every gradient, of arrays that all come from a and v."""
    local, previous = (v[:, 0].astype(jnp.float32) if name in state else None for name in "lp")

    def call(a, v, local, previous):
        return block_two_pass(a, v, (v, v) if gated else None, local, previous, **window)

    result, pull = jax.vjp(call, a, v, local, previous)
    return result, pull(result)


@pytest.mark.parametrize(
    ("shape", "window", "state", "gated", "dtypes"),
    [
        ((1, 1, 1, 16), (16, 1), "", True, ("float32", "float32")),
        ((2, 1000, 20, 16), (16, 1), "lp", True, ("float32", "bfloat16")),
        ((2, 1001, 20, 16), (16, 0), "l", False, ("bfloat16", "float32")),
        ((3, 4099, 12, 64), (128, 1), "l", True, ("bfloat16", "bfloat16")),
        ((3, 4099, 12, 64), (16, None), "l", True, ("float16", "float16")),
        ((1, 300, 7, 8), (32, 1), "p", False, ("float16", "float16")),
        ((1, 300, 7, 128), (64, 1), "", False, ("float32", "bfloat16")),
        ((2, 257, 64, 16), (128, 1), "lp", True, ("float32", "float32")),
        ((2, 257, 3, 24), (16, None), "", False, ("bfloat16", "bfloat16")),
    ],
)
def test_compiles_without_spills(shape, window, state, gated, dtypes):
    a = jax.ShapeDtypeStruct(shape[:3], dtypes[0])
    v = jax.ShapeDtypeStruct(shape, dtypes[1])
    window = dict(zip(("block_size", "lookback"), window, strict=True))
    report = targets.compile_for(
        CHIP, lambda a, v: gradients(window, state, gated, a, v), a, v, name=f"{shape} {window}"
    )
    assert {kernel.name for kernel in report.kernels} >= {"swr_forward", "swr_backward"}
    for kernel in report.kernels:
        assert kernel.spills == 0, kernel.name


def test_a_blackwell_takes_them_too():
    """In a process of its own: one process compiles for one kind of GPU."""
    command = [sys.executable, "-m", "pallas_kernels.targets", "--chip=b200", "--kernel=window16"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "swr/gated/window16/forward+backward" in result.stdout


def hopper_mesh(axis_type):
    """Two by two H100s."""
    devices = np.array(targets.devices(CHIP, "1x1x4")).reshape(2, 2)
    return Mesh(devices, ("data", "tensor"), axis_types=(axis_type,) * 2)


@pytest.mark.parametrize("mode", ["automatic", "explicit", "shard_map", "unnamed mesh"])
def test_devices_share_batch_and_heads_without_communication(mode):
    """Each device's kernels see its quarter, whichever way the arrays came to be split."""
    mesh = hopper_mesh(AxisType.Explicit if mode == "explicit" else AxisType.Auto)
    spec = jax.P("data", None, "tensor")
    wide = jax.ShapeDtypeStruct((4, 512, 64, 16), jnp.bfloat16, sharding=NamedSharding(mesh, spec))
    a = jax.ShapeDtypeStruct(wide.shape[:3], jnp.bfloat16, sharding=wide.sharding)

    def both(a, b, c, v):
        x, pull = jax.vjp(gated_sliding_window_recurrence, a, b, c, v)
        return x, *pull(x)

    fn = both
    if mode == "shard_map":
        fn = jax.shard_map(both, mesh=mesh, in_specs=spec, out_specs=spec)
    if mode == "unnamed mesh":
        # As a trainer does that names shardings, but sets no mesh.
        with jax.default_device(mesh.devices.flat[0]):
            lowered = jax.jit(fn).lower(a, wide, wide, wide)
    else:
        with jax.set_mesh(mesh):
            lowered = jax.jit(fn).lower(a, wide, wide, wide)
    text = lowered.compile().as_text()
    calls = [line for line in text.splitlines() if "mosaic_gpu" in line and "custom-call(" in line]
    assert len(calls) == 2
    for call in calls:
        # 32 heads of 16 features as the kernels address them; 64 heads would be four lines.
        assert "bf16[2,512,2,256]" in call
        assert not re.search(r"\[4,512|512,4,256\]", call)
    for collective in COLLECTIVES:
        assert not re.search(rf"\b{collective}(-start)?\(", text), collective


def test_the_layer_gets_the_kernels_by_default():
    """A function for Hoppers that are not there, under their mesh, forward and backward."""
    mesh = hopper_mesh(AxisType.Auto)
    layer = nnx.eval_shape(
        lambda: nn.Phalanx(256, global_heads=8, dtype=jnp.bfloat16, rngs=nnx.Rngs(params=0))
    )
    graph, parameters = nnx.split(layer)

    def loss(parameters, x):
        return jnp.sum(nnx.merge(graph, parameters)(x).astype(jnp.float32))

    x = jax.ShapeDtypeStruct(
        (4, 512, 256), jnp.bfloat16, sharding=NamedSharding(mesh, jax.P("data"))
    )
    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(parameters, x).compile().as_text()
    # Window and global heads, forward and backward; 512 tokens in chunks need two reductions.
    names = re.findall(r"swr_(?:forward|backward|reduce)", text)
    assert set(names) == {"swr_forward", "swr_backward", "swr_reduce"}
