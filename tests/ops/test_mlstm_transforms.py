"""mLSTM token by token, under vmap, checkpoint and scan, on a mesh; and the memory it takes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from mlstm_cases import FIELDS, NAMES, assert_close, draw, expect, quick_jit

from swr_jax import MLSTMState, mlstm, mlstm_step
from swr_jax.ops import reference_mlstm as ref

FLOAT32 = 1e-5
SIGMOID = {"input_gate": "sigmoid"}


def stream(inputs, state, **options):
    """The recurrent form: h [B, T, H, Dv] and the last state."""

    def body(state, token):
        return mlstm_step(state, *token, **options)

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tuple(inputs))
    state, h = jax.lax.scan(body, state, tokens)
    return jnp.moveaxis(h, 0, 1), state


# --- steps ------------------------------------------------------------------------------------

ONE_DOCUMENT = ("plain", "as initialised", "loud", "silent", "never forgetting, all equal")


@pytest.mark.parametrize("options", [{}, SIGMOID | {"normalize": False}], ids=str)
def test_steps_are_the_recurrence_gradients_included(options):
    problem = draw(11, ONE_DOCUMENT)

    @quick_jit
    def run(inputs, state, bars):
        results, pull = jax.vjp(functools.partial(stream, **options), inputs, state)
        return results, pull(bars)

    bars = (problem.h_bar, MLSTMState(*problem.state_bar))
    (h, last), (inputs, state) = run(problem.inputs, MLSTMState(*problem.state), bars)
    wanted = expect(problem, **options)
    assert_close(h, wanted["h"], FLOAT32)
    for name in FIELDS:
        assert_close(getattr(last, name), wanted[f"last {name}"], FLOAT32, name)
    for name, gradient in zip(NAMES, (*inputs, *jax.tree.leaves(state)), strict=True):
        assert_close(gradient, wanted[f"d{name}"], FLOAT32, f"d{name}")


@pytest.mark.parametrize("options", [{}, pytest.param(SIGMOID, marks=pytest.mark.slow)], ids=str)
def test_a_prefill_and_steps_are_one_sequence(options):
    chunk_size = 8
    problem = draw(27, ONE_DOCUMENT)
    wanted, last = ref.recurrence(*problem.inputs, **options)

    @functools.partial(quick_jit, static_argnums=0)
    def run(n, *inputs):
        before = [x[:, :n] for x in inputs]
        h, state = mlstm(*before, chunk_size=chunk_size, return_state=True, **options)
        rest, state = stream([x[:, n:] for x in inputs], state, **options)
        return jnp.concatenate([h, rest], axis=1), state

    for n in (1, chunk_size, 2 * chunk_size + 1):
        h, state = run(n, *problem.inputs)
        assert_close(h, wanted, FLOAT32)
        for name in FIELDS:
            assert_close(getattr(state, name), getattr(last, name), FLOAT32, name)


def test_extreme_gates_in_a_step_give_finite_numbers():
    """Also from an empty state, with a zero query."""
    values = (1e4, -1e4)
    cases = [(i, f, m) for i in values for f in values for m in (0.0, 1e4, -1e4, -np.inf)]
    i, f, m = (jnp.asarray(x, jnp.float32)[:, None] for x in zip(*cases, strict=True))
    q, k, v, *_ = (jnp.asarray(x) for x in draw(2, ("plain",) * len(cases), heads=1).inputs)
    state = MLSTMState.zeros(len(cases), 1, 5, 7).replace(stabilizer=m)

    @quick_jit
    @functools.partial(jax.value_and_grad, argnums=range(6), has_aux=True)
    def run(state, *inputs):
        tokens = [jnp.stack([x, x], axis=1) for x in inputs]
        h, state = stream(tokens, state)
        loss = jnp.sum(h**2) + jnp.sum(state.memory) + jnp.sum(state.normalizer)
        return loss, (h, state.memory, state.normalizer)

    for query in (q[:, 0], 0 * q[:, 0]):
        for x in jax.tree.leaves(run(state, query, k[:, 0], v[:, 0], i, f)):
            assert np.isfinite(x).all()


def test_a_step_keeps_the_dtypes_of_the_state():
    problem = draw(1, ("plain",))
    inputs = [x[:, 0] for x in problem.inputs]
    state = MLSTMState.zeros(1, 3, 5, 7, jnp.bfloat16)
    assert state.stabilizer.dtype == jnp.float32
    after, h = quick_jit(mlstm_step)(state, *inputs)
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)
    assert_close(h, ref.recurrence(*problem.inputs)[0][:, 0], FLOAT32)
    assert_close(after.memory, ref.recurrence(*problem.inputs)[1].memory, 4e-3)


# --- transformations --------------------------------------------------------------------------


def gradients(fn, *arguments):
    """Of <cos v, h>, with h itself."""
    h, pull = jax.vjp(fn, *arguments)
    return h, *pull(jnp.cos(arguments[2]).astype(h.dtype))


def test_vmap_is_a_loop():
    """Over an axis that is not the first, gradients inside."""
    problem = draw(21, ("plain", "packed"))
    fn = functools.partial(mlstm, chunk_size=8)
    inputs = [jnp.asarray(x)[:, None] for x in problem.inputs]
    inputs[2] = jnp.moveaxis(inputs[2], 0, 2)
    run = quick_jit(jax.vmap(functools.partial(gradients, fn), in_axes=(0, 0, 2, 0, 0)))
    h, _ = ref.recurrence(*problem.inputs)
    wanted = ref.gradients(*problem.inputs, np.cos(problem.inputs[2]))
    for x, expected in zip(run(*inputs), (h, *(wanted[name] for name in "qkvif")), strict=True):
        assert_close(x[:, 0], expected, FLOAT32)


def test_rematerialisation_gives_the_same_gradients():
    problem = draw(21, ("plain", "packed"))
    fn = jax.checkpoint(functools.partial(mlstm, chunk_size=8))
    got = quick_jit(functools.partial(gradients, fn))(*problem.inputs)
    wanted = ref.gradients(*problem.inputs, np.cos(problem.inputs[2]))
    for x, name in zip(got[1:], "qkvif", strict=True):
        assert_close(x, wanted[name], FLOAT32, name)


def test_a_scan_over_pieces_that_carries_the_state_is_one_call():
    """Pieces of 10 tokens against chunks of 4: outputs, last state, gradients through time."""
    problem = draw(30, ONE_DOCUMENT)

    def pieces(inputs, state):
        def body(state, piece):
            h, state = mlstm(*piece, chunk_size=4, initial_state=state, return_state=True)
            return state, h

        cut = [jnp.moveaxis(x.reshape(x.shape[0], 3, 10, *x.shape[2:]), 1, 0) for x in inputs]
        state, h = jax.lax.scan(body, state, cut)
        return jnp.moveaxis(h, 0, 1).reshape(problem.h_bar.shape), state

    @quick_jit
    def run(inputs, state, bars):
        results, pull = jax.vjp(pieces, inputs, state)
        return results, pull(bars)

    inputs = tuple(jnp.asarray(x) for x in problem.inputs)
    bars = (jnp.asarray(problem.h_bar), MLSTMState(*problem.state_bar))
    (h, last), (inputs, state) = run(inputs, MLSTMState(*problem.state), bars)
    wanted = expect(problem)
    assert_close(h, wanted["h"], FLOAT32)
    assert_close(last.memory, wanted["last memory"], FLOAT32)
    for name, gradient in zip(NAMES, (*inputs, *jax.tree.leaves(state)), strict=True):
        assert_close(gradient, wanted[f"d{name}"], FLOAT32, f"d{name}")


# --- meshes -----------------------------------------------------------------------------------

COLLECTIVE = re.compile(r"all-reduce|all-gather|collective-permute|all-to-all|reduce-scatter")
SHARDED = P("data", None, "tensor")  # of every array [B, T, H, ...]


@pytest.mark.parametrize("how", ["shard_map", "compiler", "explicit"])
def test_batch_and_heads_are_sharded_without_communication(how):
    """By `shard_map`, by the compiler, and with shardings in the types of the arrays."""
    problem = draw(21, ("plain", "packed") * 2, heads=2)
    axes = (AxisType.Explicit if how == "explicit" else AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=axes)

    def run(segment_ids, *inputs):
        def fn(*inputs):
            return mlstm(*inputs, chunk_size=8, segment_ids=segment_ids, return_state=True)

        h, pull, state = jax.vjp(fn, *inputs, has_aux=True)
        return h, pull(jnp.cos(inputs[2])), state

    specs = (P("data"), *(SHARDED,) * 5)
    outputs = (SHARDED, (SHARDED,) * 5, P("data", "tensor"))
    place = functools.partial(jax.tree.map, functools.partial(NamedSharding, mesh))
    if how == "shard_map":
        run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=outputs)
    with jax.set_mesh(mesh):
        arguments = jax.device_put((problem.segment_ids, *problem.inputs), place(specs))
        shardings = place(outputs) if how == "compiler" else None
        compiled = quick_jit(run, out_shardings=shardings).lower(*arguments).compile()
        h, grads, state = compiled(*arguments)
    assert not COLLECTIVE.findall(compiled.as_text())
    assert tuple(h.sharding.spec)[:3] == tuple(SHARDED)

    options = {"segment_ids": problem.segment_ids}
    wanted, last = ref.recurrence(*problem.inputs, **options)
    assert_close(h, wanted, FLOAT32)
    assert_close(state.memory, last.memory, FLOAT32)
    wanted = ref.gradients(*problem.inputs, np.cos(problem.inputs[2]), **options)
    for name, gradient in zip("qkvif", grads, strict=True):
        assert_close(gradient, wanted[name], FLOAT32, name)


def test_what_is_replicated_in_shard_map_gets_the_sum_of_its_gradients():
    """Keys, values and a learned initial state that every device holds whole."""
    problem = draw(9, ("plain",) * 4, heads=2)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    q, k, v, i, f = (jnp.asarray(x) for x in problem.inputs)
    first = MLSTMState(*(jnp.asarray(x[:1]) for x in problem.state))

    def run(q, k, v, i, f, state):
        def loss(k, v, state):
            def spread(x):
                return jnp.broadcast_to(x, (q.shape[0], *x.shape[1:]))

            state = jax.tree.map(spread, state)
            return jnp.sum(mlstm(q, spread(k), spread(v), i, f, initial_state=state) ** 2)

        return jax.grad(loss, argnums=(0, 1, 2))(k, v, state)

    split, whole = P("data"), P()
    specs = (split, whole, whole, split, split, whole)
    sharded = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=whole)
    arguments = (q, k[:1], v[:1], i, f, first)
    got, wanted = quick_jit(sharded)(*arguments), quick_jit(run)(*arguments)
    jax.tree.map(functools.partial(assert_close, tolerance=1e-6), got, wanted)


# --- memory -----------------------------------------------------------------------------------


def test_temporary_memory_is_linear_and_less_than_the_scores():
    """Forward and backward; a row of scores of its chunk would be 2 KiB a token at chunk 512."""

    def temporaries(time):
        wide = jax.ShapeDtypeStruct((1, time, 1, 8), jnp.float32)
        gate = jax.ShapeDtypeStruct((1, time, 1), jnp.float32)
        run = functools.partial(gradients, functools.partial(mlstm, chunk_size=512))
        lowered = quick_jit(run).lower(wide, wide, wide, gate, gate)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8192) - temporaries(4096) < 4096 * 512 * 4 / 2
