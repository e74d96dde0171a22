"""Programs around the TPU kernels, compiled by the TPU's own compiler, with no TPU at hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import targets
from pallas_kernels.swr.mosaic_tpu import block_two_pass, block_two_pass_heads_minor

pytestmark = pytest.mark.targets


def forward_and_backward(function, a, v, gates, local, previous, dx, dfinal, **options):
    """Every result and every gradient of a backend's `block_two_pass`."""
    results, pull = jax.vjp(functools.partial(function, **options), a, v, gates, local, previous)
    return results, pull((dx, dfinal))


def shapes(batch, time, heads, features, dtype, *, gate_heads=None, lookback=1, sharding=None):
    """Arguments of `forward_and_backward` for arrays with features minor."""

    def struct(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    v = struct(batch, time, heads, features)
    gates = None if gate_heads is None else (struct(batch, time, gate_heads, features),) * 2
    state = struct(batch, heads, features, dtype=jnp.float32)
    exact = lookback is None
    previous = state if lookback == 1 else None
    return struct(batch, time, heads), v, gates, state, previous, v, state if exact else None


@pytest.mark.parametrize("chip", ["v5e", pytest.param("tpu7x", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [
        ((2, 1000, 128, 16), jnp.float32, {"gate_heads": 128, "lookback": None}),
        ((2, 37, 3, 5), jnp.float32, {"block_size": 8}),
        ((8, 1, 128, 16), jnp.bfloat16, {"gate_heads": 128}),
        ((2, 301, 130, 40), jnp.bfloat16, {"gate_heads": 10, "block_size": 128}),
        ((1, 40, 200, 128), jnp.float32, {"gate_heads": 200, "lookback": 0}),
        ((2, 100, 130, 16), jnp.float16, {"block_size": 32}),
        ((1, 5, 1, 1), jnp.bfloat16, {"block_size": 1}),
        ((1, 1500, 128, 16), jnp.bfloat16, {"block_size": 1024}),
    ],
)
def test_any_shape_compiles(chip, shape, dtype, options):
    options = {"block_size": 16, "lookback": 1, "gate_heads": None} | options
    gate_heads = options.pop("gate_heads")
    function = functools.partial(forward_and_backward, block_two_pass, **options)
    arguments = shapes(*shape, dtype, gate_heads=gate_heads, lookback=options["lookback"])
    program = targets.compile_program(chip, function, *arguments)
    assert len(program.kernels) == 2


def test_compiles_where_64_bits_are_enabled():
    function = functools.partial(forward_and_backward, block_two_pass, block_size=16, lookback=None)
    with jax.enable_x64(True):
        program = targets.compile_program(
            "v5e", function, *shapes(1, 100, 128, 16, jnp.bfloat16, lookback=None)
        )
    assert len(program.kernels) == 2


def _mesh(kind):
    devices = np.array(targets.devices("v5e", "2x2", kernels=False)).reshape(2, 2)
    return Mesh(devices, ("data", "tensor"), axis_types=(kind, kind))


def _sharded(mesh, gate_heads=256):
    """a, v, b, c and the cotangent of x, split over batch and heads."""

    def struct(*shape):
        spec = P("data", *[None] * (len(shape) - 2), "tensor")
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    tokens, gate = struct(8, 64, 16, 256), struct(8, 64, 16, gate_heads)
    return struct(8, 64, 256), tokens, gate, gate, tokens


def _recurrence(a, v, b, c):
    x, _ = block_two_pass_heads_minor(a, v, (b, c), None, None, block_size=16, lookback=1)
    return x


@pytest.mark.parametrize("gate_heads", [256, 128])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_over_a_mesh_nothing_is_communicated(kind, gate_heads):
    mesh = _mesh(kind)
    function = _recurrence
    if kind == AxisType.Auto:
        spec = P("data", None, None, "tensor")
        function = jax.shard_map(
            _recurrence,
            mesh=mesh,
            in_specs=(P("data", None, "tensor"), spec, spec, spec),
            out_specs=spec,
        )

    def both(a, v, b, c, dx):
        x, pull = jax.vjp(function, a, v, b, c)
        return x, pull(dx)

    with jax.set_mesh(mesh):
        program = targets.compile_program("v5e", both, *_sharded(mesh, gate_heads))
    assert len(program.kernels) == 2
    assert not program.collectives


def test_axes_left_to_the_compiler_are_refused():
    mesh = _mesh(AxisType.Auto)
    with jax.set_mesh(mesh), pytest.raises(NotImplementedError, match="'data', 'tensor'"):
        jax.eval_shape(_recurrence, *_sharded(mesh)[:4])
