"""The gated delta rule under vmap, checkpoint, scan and on a mesh; and the memory it takes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gated_delta_cases import Problem, draw, draw_rows
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from recurrence_cases import assert_close, assert_rows_close

from swr_jax import GatedDeltaState, gated_delta_rule
from swr_jax.ops import reference_gated_delta as ref

FLOAT32 = 1e-5


def run(*arguments, **options):
    """Output and last state from arguments of which the last is the initial state."""
    *arguments, initial = arguments
    state = GatedDeltaState(initial)
    o, state = gated_delta_rule(
        *arguments, **{"chunk_size": 16} | options, initial_state=state, return_state=True
    )
    return o, state.memory


def run_with_gradients(problem):
    found, pull = jax.vjp(run, *problem[:6])
    return *found, *pull(problem.cotangents)


def test_vmap_over_problems_is_a_loop_over_them():
    """Also over an axis that is not the first, and with gradients inside."""
    problems = [draw(21, "some zeros", seed=seed).rounded(np.float32) for seed in range(3)]
    axes = Problem(0, 1, 0, 2, 0, 0, 1, 0)
    stacked = Problem(*map(np.stack, zip(*problems, strict=True), axes))
    together = jax.jit(jax.vmap(run_with_gradients, in_axes=(axes,)))(stacked)
    alone = jax.jit(run_with_gradients)
    for number, problem in enumerate(problems):
        for got, wanted in zip(together, alone(problem), strict=True):
            assert_rows_close(got[number], wanted, FLOAT32)


def test_rematerialisation_gives_the_same_gradients():
    problem = draw(37).rounded(np.float32)

    def gradients(operator):
        def loss(*arguments):
            return jnp.sum(jnp.sin(operator(*arguments)[0]))

        return jax.jit(jax.grad(loss, argnums=range(6)))(*problem[:6])

    for got, wanted in zip(gradients(jax.checkpoint(run)), gradients(run), strict=True):
        assert_rows_close(got, wanted, FLOAT32)


def test_a_scan_over_pieces_that_carries_the_state_is_one_call():
    """Pieces of 10 tokens against chunks of 16: outputs, last state, gradients through time."""
    problem, _ = draw_rows(40, 2, 4, 3)

    def cut(x):
        return jnp.moveaxis(x.reshape(x.shape[0], 4, 10, *x.shape[2:]), 1, 0)

    def body(memory, inputs):
        return run(*inputs, memory)[::-1]

    def forward(*arguments):
        *arguments, initial = arguments
        memory, o = jax.lax.scan(body, initial, tuple(map(cut, arguments)))
        return jnp.moveaxis(o, 0, 1).reshape(problem.v.shape), memory

    @jax.jit
    def both(problem):
        found, pull = jax.vjp(forward, *problem[:6])
        return *found, *pull(problem.cotangents)

    wanted = (
        *ref.gated_delta_rule(*problem.arguments, problem.initial),
        *ref.gated_delta_gradients(*problem.arguments, *problem.cotangents, problem.initial),
    )
    for got, exact in zip(both(problem), wanted, strict=True):
        assert_rows_close(got, exact, FLOAT32)


def test_forward_mode_agrees_with_reverse_mode():
    """Of XLA's form; kernels have none."""
    by_xla = functools.partial(run, implementation="xla")
    problem = draw(37, "some zeros").rounded(np.float32)
    primals = problem[:6]
    tangents = draw(37, seed=1).rounded(np.float32)[:6]

    @jax.jit
    def both(primals, tangents, cotangents):
        _, moved = jax.jvp(by_xla, primals, tangents)
        _, pull = jax.vjp(by_xla, *primals)
        return moved, pull(cotangents)

    moved, pulled = both(primals, tangents, problem.cotangents)
    forward = sum(np.vdot(x, y) for x, y in zip(moved, problem.cotangents, strict=True))
    reverse = sum(np.vdot(x, y) for x, y in zip(pulled, tangents, strict=True))
    np.testing.assert_allclose(forward, reverse, rtol=1e-4)


# --- meshes -----------------------------------------------------------------------------------

COLLECTIVE = re.compile(
    r"all-reduce|all-gather|collective-permute|all-to-all|reduce-scatter|collective-broadcast"
)
SHARDED = P("data", None, "tensor")  # of every array [B, T, H, ...]
SPECS = Problem(*(SHARDED,) * 5, P("data", "tensor"), SHARDED, P("data", "tensor"))
OUTPUTS = (SHARDED, P("data", "tensor"), *SPECS[:6])


def by_shard_map():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"))
    mapped = jax.shard_map(run_with_gradients, mesh=mesh, in_specs=(SPECS,), out_specs=OUTPUTS)
    return jax.jit(mapped), mesh


def by_sharding():
    """The compiler places everything between the sharded arguments and results."""
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    place = functools.partial(NamedSharding, mesh)
    outputs = tuple(map(place, OUTPUTS))
    return jax.jit(run_with_gradients, out_shardings=outputs), mesh


def by_explicit_axes():
    """Shardings are part of the types of all that lies between."""
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    return jax.jit(run_with_gradients), mesh


@pytest.mark.parametrize("wrap", [by_shard_map, by_sharding, by_explicit_axes])
def test_batch_and_heads_are_sharded_without_communication(wrap):
    """Outputs, state and gradients of both: no collective in the compiled program."""
    problem = draw(53, batch=8, heads=4, qk_dim=4, v_dim=4).rounded(np.float32)
    sharded, mesh = wrap()
    with jax.set_mesh(mesh):
        placed = jax.tree.map(
            lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), problem, SPECS
        )
        compiled = sharded.lower(placed).compile()
        results = compiled(placed)
    assert not COLLECTIVE.findall(compiled.as_text())
    assert len(results[0].sharding.device_set) == 8
    wanted = (
        *ref.gated_delta_rule(*problem.arguments, problem.initial),
        *ref.gated_delta_gradients(*problem.arguments, *problem.cotangents, problem.initial),
    )
    for got, exact in zip(results, wanted, strict=True):
        assert_close(got, exact, FLOAT32)


def test_shard_map_without_an_initial_state():
    """Nor with one that is the same on every device: the carry varies as the inputs do."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    problem = draw(20, batch=4).rounded(np.float32)
    start = GatedDeltaState.zeros(1, 3, 5, 7)

    def both(*arguments):
        return gated_delta_rule(*arguments), gated_delta_rule(*arguments, initial_state=start)

    mapped = jax.shard_map(both, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    wanted, _ = ref.gated_delta_rule(*problem.arguments)
    for got in jax.jit(mapped)(*problem.arguments):
        assert_rows_close(got, wanted, FLOAT32)


# --- memory -----------------------------------------------------------------------------------

HEADS, DIM = 2, 32


def compiled_at(length, *, backward, chunk_size=64):
    qkv = jax.ShapeDtypeStruct((1, length, HEADS, DIM), jnp.float32)
    gate = jax.ShapeDtypeStruct((1, length, HEADS), jnp.float32)
    operator = functools.partial(gated_delta_rule, chunk_size=chunk_size)

    def both(*arguments):
        o, pull = jax.vjp(operator, *arguments)
        return o, pull(arguments[2])

    fn = both if backward else operator
    return jax.jit(fn).lower(qkv, qkv, qkv, gate, gate).compile()


@pytest.mark.parametrize("backward", [False, True])
def test_memory_is_linear_in_the_sequence(backward):
    length = 8192
    short, long = (compiled_at(n, backward=backward) for n in (length, 2 * length))
    small, large = (x.memory_analysis().temp_size_in_bytes for x in (short, long))
    assert large <= 2.05 * small
    # Copies of inputs and outputs in chunks, and a state for every chunk: no state for every token,
    # which were DIM times the values.
    values = 4 * length * HEADS * DIM
    assert small <= (8 if backward else 4) * values + values * DIM // 64
    assert not re.search(rf"\[[\d,]*{length},{length}[\d,]*\]", short.as_text())


def test_a_square_array_would_be_found():
    text = jax.jit(lambda x: x @ x.T).lower(jnp.ones((8192, 2))).compile().as_text()
    assert re.search(r"\[[\d,]*8192,8192[\d,]*\]", text)
