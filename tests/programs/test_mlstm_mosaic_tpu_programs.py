"""Programs around the TPU kernels of the mLSTM, compiled by the TPU's own compiler."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import targets
from pallas_kernels.mlstm.mosaic_tpu import chunkwise

pytestmark = pytest.mark.targets


def both(q, k, v, log_i, log_f, state, dh, dstate, **options):
    """Results and every gradient."""
    function = functools.partial(
        chunkwise, **({"chunk_size": 128, "stabilized": True, "normalized": True} | options)
    )
    results, pull = jax.vjp(function, q, k, v, log_i, log_f, state)
    return results, pull((dh, dstate))


def shapes(batch, time, heads, q_dim, v_dim, dtype, sharding=lambda *_: None):
    """Arguments of `both`; `sharding` takes the axes' letters."""

    def struct(axes, *shape, dtype=dtype):
        return jax.ShapeDtypeStruct((batch, *shape), dtype, sharding=sharding(axes))

    q, v = struct("bthk", time, heads, q_dim), struct("bthd", time, heads, v_dim)
    gate = struct("bth", time, heads, dtype=jnp.float32)
    sizes = {"bhkd": (heads, q_dim, v_dim), "bhk": (heads, q_dim), "bh": (heads,)}
    state = tuple(struct(axes, *shape, dtype=jnp.float32) for axes, shape in sizes.items())
    return q, q, v, gate, gate, state, v, state


@pytest.mark.parametrize("chip", ["v5e", pytest.param("tpu7x", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 1000, 4, 128, 256, jnp.float32), {}),
        ((1, 600, 8, 128, 256, jnp.float32), {}),
        ((1, 300, 3, 64, 64, jnp.bfloat16), {"normalized": False, "stabilized": False}),
        ((1, 130, 5, 40, 200, jnp.float16), {}),
        ((1, 1024, 2, 512, 512, jnp.bfloat16), {}),
        ((1, 1, 1, 1, 1, jnp.bfloat16), {}),
    ],
)
def test_any_shape_compiles(chip, shape, options):
    program = targets.compile_program(chip, functools.partial(both, **options), *shapes(*shape))
    assert len(program.kernels) == 2


def test_compiles_where_64_bits_are_enabled():
    with jax.enable_x64(True):
        program = targets.compile_program("v5e", both, *shapes(1, 256, 2, 128, 128, jnp.bfloat16))
    assert len(program.kernels) == 2


def test_rematerialised_the_forward_pass_keeps_no_states():
    """Which would be written, and read by nobody; they are kept by the one that is repeated."""

    def gradients(*arguments):
        *arguments, dh, dstate = arguments
        function = functools.partial(chunkwise, chunk_size=128, stabilized=True, normalized=True)
        results, pull = jax.vjp(jax.checkpoint(function), *arguments)
        return results, pull((dh, dstate))

    program = targets.compile_program("v5e", gradients, *shapes(1, 256, 2, 128, 128, jnp.bfloat16))
    names = ["mlstm_backward", "mlstm_forward", "mlstm_keeping_forward"]
    assert [name.split(".")[0] for name in sorted(program.kernels)] == names


def test_over_a_mesh_nothing_is_communicated():
    devices = np.array(targets.devices("v5e", "2x2", kernels=False)).reshape(2, 2)
    mesh = Mesh(devices, ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    axes = {"b": "data", "h": "tensor"}

    def sharding(letters):
        return NamedSharding(mesh, P(*(axes.get(letter) for letter in letters)))

    with jax.set_mesh(mesh):
        program = targets.compile_program(
            "v5e", both, *shapes(4, 256, 4, 128, 256, jnp.bfloat16, sharding)
        )
    assert len(program.kernels) == 2
    assert not program.collectives
