"""Programs around the TPU kernels of the gated delta rule, compiled by the TPU's own compiler."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import targets
from pallas_kernels.gated_delta.mosaic_tpu import gated_delta_rule as kernel
from swr_jax import GatedDeltaState, gated_delta_rule

pytestmark = pytest.mark.targets


def both(q, k, v, alpha, beta, memory, do, dmemory, *, rule=kernel):
    """Results and every gradient."""
    results, pull = jax.vjp(rule, q, k, v, alpha, beta, memory)
    return results, pull((do, dmemory))


def operator(*arguments):
    """The public operator, from state to state."""
    *arguments, memory = arguments
    o, state = gated_delta_rule(
        *arguments, initial_state=GatedDeltaState(memory), return_state=True
    )
    return o, state.memory


def without_state(q, k, v, alpha, beta, do):
    """Of a sequence that begins empty: o and every gradient."""
    o, pull = jax.vjp(gated_delta_rule, q, k, v, alpha, beta)
    return o, pull(do)


def shapes(batch, time, heads, q_dim, v_dim, dtype, sharding=lambda *_: None):
    """Arguments of `both`; `sharding` takes the axes' letters."""

    def struct(axes, *shape, dtype=dtype):
        return jax.ShapeDtypeStruct((batch, *shape), dtype, sharding=sharding(axes))

    q, v = struct("bthk", time, heads, q_dim), struct("bthd", time, heads, v_dim)
    gate = struct("bth", time, heads, dtype=jnp.float32)
    memory = struct("bhkd", heads, q_dim, v_dim, dtype=jnp.float32)
    return q, q, v, gate, gate, memory, v, memory


@pytest.mark.parametrize("chip", ["v5e", pytest.param("tpu7x", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 1000, 4, 128, 256, jnp.float32),
        (1, 300, 3, 64, 64, jnp.bfloat16),
        (1, 130, 5, 40, 200, jnp.float16),
        (1, 1024, 2, 256, 512, jnp.bfloat16),
        (1, 256, 1, 512, 512, jnp.float32),
        # What fills VMEM best, and several chunks of one grid step.
        (1, 1024, 4, 128, 128, jnp.bfloat16),
        (1, 512, 2, 128, 384, jnp.bfloat16),
        (1, 256, 1, 640, 512, jnp.bfloat16),
        (1, 256, 1, 256, 1024, jnp.bfloat16),
        (1, 1, 1, 1, 1, jnp.bfloat16),
    ],
    ids=str,
)
def test_any_shape_compiles(chip, shape):
    program = targets.compile_program(chip, both, *shapes(*shape))
    assert len(program.kernels) == 2


def test_compiles_where_64_bits_are_enabled():
    with jax.enable_x64(True):
        program = targets.compile_program("v5e", both, *shapes(1, 256, 2, 128, 128, jnp.bfloat16))
    assert len(program.kernels) == 2


def test_rematerialised_the_forward_pass_keeps_no_states():
    """Which would be written, and read by nobody; they are kept by the one that is repeated."""

    def gradients(*arguments):
        *arguments, do, dmemory = arguments
        results, pull = jax.vjp(jax.checkpoint(kernel), *arguments)
        return results, pull((do, dmemory))

    arguments = shapes(1, 256, 2, 128, 128, jnp.bfloat16)
    results = re.findall(
        r"(?m)^ *(\S.*?) = pallas_call\[", str(jax.make_jaxpr(gradients)(*arguments))
    )
    states = "f32[1,2,2,128,128]"
    assert sorted(states in result for result in results) == [False, False, True]
    program = targets.compile_program("v5e", gradients, *arguments)
    assert len(program.kernels) == 3


def _mesh(chip, *, sequence, kind):
    devices = np.array(targets.devices(chip, "2x2", kernels=False)).reshape(2, 1 + sequence, -1)
    return Mesh(devices, ("data", "sequence", "tensor"), axis_types=(kind,) * 3)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)
def test_over_batch_and_heads_nothing_is_communicated(kind):
    mesh = _mesh("v5e", sequence=False, kind=kind)
    axes = {"b": "data", "h": "tensor"}

    def sharding(letters):
        return NamedSharding(mesh, P(*(axes.get(letter) for letter in letters)))

    def program(*arguments):
        return both(*arguments, rule=operator)

    with jax.set_mesh(mesh):
        arguments = shapes(4, 256, 4, 128, 256, jnp.bfloat16, sharding)
        program = targets.compile_program("v5e", program, *arguments)
    assert len(program.kernels) == 2
    assert not program.collectives


@pytest.mark.parametrize("case", ["three rows over two devices", "a state, and a split sequence"])
def test_what_a_mesh_does_not_divide_is_left_to_xla(case):
    """Where the compiler would have to split a kernel, which it cannot."""
    state = case.startswith("a state")
    mesh = _mesh("v5e", sequence=state, kind=AxisType.Auto)
    rows = 4 if state else 3
    axes = {"b": "data", "t": "sequence"} if state else {}

    def sharding(letters):
        return NamedSharding(mesh, P(*(axes.get(letter) for letter in letters)))

    def program(*arguments):
        return both(*arguments, rule=operator)

    with jax.set_mesh(mesh):
        arguments = shapes(rows, 256, 3, 128, 256, jnp.bfloat16, sharding)
        compiled = targets.compile_program("v5e", program, *arguments)
        with pytest.raises(NotImplementedError, match="automatic axes"):
            jax.eval_shape(kernel, *arguments[:6])
    assert not compiled.kernels


def test_a_split_sequence_gathers_the_maps_of_its_parts():
    mesh = _mesh("v5e", sequence=True, kind=AxisType.Auto)
    axes = {"b": "data", "t": "sequence"}

    def sharding(letters):
        return NamedSharding(mesh, P(*(axes.get(letter) for letter in letters)))

    with jax.set_mesh(mesh):
        *arguments, _, do, _ = shapes(4, 512, 4, 128, 256, jnp.bfloat16, sharding)
        program = targets.compile_program("v5e", without_state, *arguments, do)
    assert len(program.kernels) == 4  # of the maps, and of the outputs
    assert program.collectives
