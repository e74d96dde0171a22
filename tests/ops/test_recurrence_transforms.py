"""The recurrences under jit, vmap, checkpoint, scan and on a mesh; and the memory they take."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from recurrence_cases import (
    as_state,
    assert_close,
    assert_rows_close,
    assert_states_close,
    draw,
    draw_rows,
    draw_state,
    rounded,
)

from swr_jax import (
    gated_sliding_window_recurrence,
    linear_recurrence,
    sliding_window_recurrence,
)
from swr_jax.ops import reference as ref

FLOAT32 = 1e-6


def float32(*arrays):
    return tuple(jnp.asarray(x, jnp.float32) for x in arrays)


def test_jit_changes_nothing_but_speed():
    a, u = float32(*draw(21, batch=1))
    x = sliding_window_recurrence(a, u)
    assert_rows_close(x, jax.jit(sliding_window_recurrence)(a, u), FLOAT32)


def test_vmap_over_problems_is_a_loop_over_them():
    """Also over an axis that is not the first, and with gradients inside."""
    operator = functools.partial(sliding_window_recurrence, block_size=4, lookback=2)
    problems = [float32(*draw(21, "some zeros", batch=2, seed=seed)) for seed in range(3)]
    a = jnp.stack([a for a, _ in problems])
    u = jnp.stack([u for _, u in problems], axis=2)

    def run(a, u):
        x, pull = jax.vjp(operator, a, u)
        return x, *pull(jnp.cos(u))

    together = jax.jit(jax.vmap(run, in_axes=(0, 2)))(a, u)
    alone = jax.jit(run)
    for number, (a, u) in enumerate(problems):
        for got, wanted in zip(together, alone(a, u), strict=True):
            assert_rows_close(got[number], wanted, FLOAT32)


@pytest.mark.parametrize("lookback", [2, None])
def test_vmap_over_initial_states_shares_the_inputs(lookback):
    a, u = float32(*draw(21))
    oracles = [rounded(draw_state(2, 3, 5, lookback, 8, seed)) for seed in range(3)]
    states = [as_state(state, 8, lookback) for state in oracles]
    stacked = jax.tree.map(lambda *fields: jnp.stack(fields), *states)
    window = {"block_size": 8, "lookback": lookback}

    def run(state):
        return sliding_window_recurrence(a, u, **window, initial_state=state, return_state=True)

    x, after = jax.jit(jax.vmap(run))(stacked)
    for number, oracle in enumerate(oracles):
        wanted, last = ref.stream(a, u, 8, lookback, oracle)
        assert_rows_close(x[number], wanted, FLOAT32)
        assert_states_close(jax.tree.map(lambda y, n=number: y[n], after), last, FLOAT32)


def test_rematerialisation_gives_the_same_gradients():
    a, u = float32(*draw(37))
    b, c = float32(*np.random.default_rng(0).standard_normal((2, 2, 37, 1, 5)))

    def loss(operator, *arguments):
        return jnp.sum(jnp.sin(operator(*arguments)))

    def gradients(operator):
        return jax.jit(jax.grad(functools.partial(loss, operator), argnums=(0, 1, 2, 3)))

    plain = gradients(gated_sliding_window_recurrence)(a, b, c, u)
    remat = gradients(jax.checkpoint(gated_sliding_window_recurrence))(a, b, c, u)
    for got, wanted in zip(remat, plain, strict=True):
        assert_rows_close(got, wanted, FLOAT32)


@pytest.mark.parametrize("lookback", [1, None])
def test_a_scan_over_chunks_that_carries_the_state_is_one_call(lookback):
    """Chunks of 10 tokens against blocks of 4: outputs, last state, and gradients through time."""
    chunk, chunks, block_size = 10, 4, 4
    a, u, _ = draw_rows(chunk * chunks, 2, 3)
    x_bar = np.random.default_rng(1).standard_normal(u.shape).astype(np.float32)
    oracle = rounded(draw_state(len(a), 2, 3, lookback, block_size))

    def cut(x):
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, chunk, *x.shape[2:]), 1, 0)

    def body(state, inputs):
        x, state = sliding_window_recurrence(
            *inputs,
            block_size=block_size,
            lookback=lookback,
            initial_state=state,
            return_state=True,
        )
        return state, x

    def loss(a, u, local):
        state = as_state(oracle, block_size, lookback).replace(local=local)
        state, x = jax.lax.scan(body, state, (cut(a), cut(u)))
        x = jnp.moveaxis(x, 0, 1).reshape(u.shape)
        return jnp.sum(x * x_bar), (x, state)

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    gradients, (x, state) = run(a, u, oracle.local)
    window = {"block_size": block_size, "lookback": lookback, "initial_state": oracle}
    wanted, last = ref.stream(a, u, block_size, lookback, oracle)
    assert_rows_close(x, wanted, FLOAT32)
    assert_states_close(state, last, FLOAT32)
    expected = ref.sliding_window_gradients(a, u, x_bar, **window)
    for name, gradient in zip(("a", "u", "local"), gradients, strict=True):
        assert_rows_close(gradient, expected[name], FLOAT32, name)


# --- meshes -----------------------------------------------------------------------------------

COLLECTIVE = re.compile(
    r"all-reduce|all-gather|collective-permute|all-to-all|reduce-scatter|collective-broadcast"
)
SHARDED = P("data", None, "tensor")  # of every array [B, T, H or K, ...]


def by_shard_map(run, specs, outputs):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"))
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=outputs)), mesh


def by_sharding(run, specs, outputs):
    """The compiler places everything between the sharded arguments and results."""
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    place = functools.partial(jax.tree.map, functools.partial(NamedSharding, mesh))
    return jax.jit(run, in_shardings=place(specs), out_shardings=place(outputs)), mesh


@pytest.mark.parametrize(
    ("lookback", "block_size", "gated"),
    [(2, 8, True), (None, 16, False), pytest.param(1, 32, True, marks=pytest.mark.slow)],
)
def test_batch_and_heads_are_sharded_without_communication(lookback, block_size, gated):
    """Outputs, states and gradients of both: no collective in the compiled program."""
    batch, heads = 8, 4
    a, u = float32(*draw(53, batch=batch, heads=heads))
    b, c = float32(*np.random.default_rng(0).standard_normal((2, batch, 53, 2, 5)))
    state = as_state(draw_state(batch, heads, 5, lookback, block_size), block_size, lookback)
    operator = gated_sliding_window_recurrence if gated else sliding_window_recurrence

    def run(arguments, state, x_bar):
        def forward(arguments, local, carriers, decays):
            return operator(
                *arguments,
                block_size=block_size,
                lookback=lookback,
                initial_state=state.replace(local=local, carriers=carriers, decays=decays),
                return_state=True,
            )

        primals = (arguments, state.local, state.carriers, state.decays)
        x, pull, after = jax.vjp(forward, *primals, has_aux=True)
        return x, after, pull(x_bar)

    arguments = (a, b, c, u) if gated else (a, u)
    inputs = (arguments, state, jnp.cos(u))
    fields = {"local": P("data", "tensor"), "carriers": SHARDED, "decays": SHARDED}
    of_state = state.replace(**fields, position=P("data"))
    of_arguments = (SHARDED,) * len(arguments)
    specs = (of_arguments, of_state, SHARDED)
    outputs = (SHARDED, of_state, (of_arguments, *fields.values()))
    alone = jax.jit(run)(*inputs)
    for wrap in (by_shard_map, by_sharding):
        sharded, mesh = wrap(run, specs, outputs)
        placed = jax.device_put(inputs, jax.tree.map(lambda s, m=mesh: NamedSharding(m, s), specs))
        compiled = sharded.lower(*placed).compile()
        assert not COLLECTIVE.findall(compiled.as_text())
        results = compiled(*placed)
        assert len(results[0].sharding.device_set) == 8
        for got, wanted in zip(jax.tree.leaves(results), jax.tree.leaves(alone), strict=True):
            assert_rows_close(got, wanted, FLOAT32)


def test_collectives_would_be_found():
    """Time sharded by the compiler, which the operators do not promise, needs them."""
    mesh = jax.make_mesh((8,), ("sequence",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P(None, "sequence"))
    a, u = jax.device_put(float32(*draw(64)), sharding)
    text = jax.jit(linear_recurrence).lower(a, u).compile().as_text()
    assert COLLECTIVE.findall(text)


# --- memory -----------------------------------------------------------------------------------


def associative_scan(a, u):
    """The flat baseline."""

    def combine(left, right):
        return left[0] * right[0], right[0][..., None] * left[1] + right[1]

    return jax.lax.associative_scan(combine, (a, u), axis=1)[1]


def temporary_bytes(operator, *, backward):
    a = jax.ShapeDtypeStruct((1, 8192, 16), jnp.float32)
    u = jax.ShapeDtypeStruct((1, 8192, 16, 16), jnp.float32)

    def run(a, u, x_bar):
        x, pull = jax.vjp(operator, a, u)
        return (x, *pull(x_bar)) if backward else x

    return jax.jit(run).lower(a, u, u).compile().memory_analysis().temp_size_in_bytes


def test_temporary_memory_is_a_fraction_of_an_associative_scans():
    forward = temporary_bytes(associative_scan, backward=False)
    both = temporary_bytes(associative_scan, backward=True)
    for operator in (sliding_window_recurrence, linear_recurrence):
        assert temporary_bytes(operator, backward=False) <= forward / 3
        assert temporary_bytes(operator, backward=True) < both


def test_the_baseline_of_the_memory_test_computes_the_same():
    a, u = float32(*draw(37))
    assert_close(jax.jit(associative_scan)(a, u), ref.linear_recurrence(a, u), FLOAT32)
