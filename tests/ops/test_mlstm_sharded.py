"""mLSTM over a mesh: what each device computes, and what travels between them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_cases import collectives, mesh_of
from mlstm_cases import assert_close, draw, quick_jit

from swr_jax import mlstm
from swr_jax.ops import reference_mlstm as ref

FLOAT32 = 1e-5
SIGMOID = {"input_gate": "sigmoid"}
KINDS = ("plain", "packed", "as initialised", "forgetful", "loud", "silent", "wild", "plain")


def run_split(problem, sizes, packed, **options):
    """h and every gradient over a mesh, and the compiled text."""
    mesh = mesh_of(*sizes)
    sharding = jax.NamedSharding(mesh, jax.P(("data", "fsdp"), "sequence", "tensor"))
    documents = jnp.asarray(problem.segment_ids) if packed else None

    def gradients(h_bar, *inputs):
        h, pull = jax.vjp(lambda *x: mlstm(*x, segment_ids=documents, **options), *inputs)
        return h, *pull(h_bar)

    with jax.set_mesh(mesh):
        arguments = [jax.device_put(x, sharding) for x in (problem.h_bar, *problem.inputs)]
        compiled = quick_jit(gradients, out_shardings=sharding).lower(*arguments).compile()
        return compiled(*arguments), compiled.as_text()


def expected(problem, packed, **options):
    options |= {"segment_ids": problem.segment_ids if packed else None}
    h, last = ref.recurrence(*problem.inputs, **options)
    nothing = ref.MLSTMState(*(np.zeros_like(x) for x in last))
    gradients = ref.gradients(*problem.inputs, problem.h_bar, nothing, **options)
    return h, *(gradients[name] for name in ("q", "k", "v", "i", "f"))


@pytest.mark.parametrize(
    ("length", "sizes", "packed", "options"),
    [
        (100, (2, 1, 1, 4), True, {}),
        (96, (1, 2, 2, 2), False, SIGMOID),
        (8, (1, 1, 1, 8), False, {}),  # a token to a device
    ],
)
def test_a_split_sequence_gathers_one_state_of_each_device(length, sizes, packed, options):
    """And, to find the first token of a document, one identifier of the left neighbour."""
    problem = draw(length, KINDS, heads=2)
    got, text = run_split(problem, sizes, packed, chunk_size=16, **options)
    travels = {"all-gather": 1, "reduce-scatter": 1}
    assert collectives(text) == travels | ({"collective-permute": 1} if packed else {})
    names = ("h", "dq", "dk", "dv", "di", "df")
    for name, x, exact in zip(names, got, expected(problem, packed, **options), strict=True):
        assert_close(x, exact, FLOAT32, name)


def test_batch_and_heads_are_computed_apart():
    problem = draw(20, KINDS, heads=2)
    got, text = run_split(problem, (2, 2, 2, 1), packed=True, chunk_size=16)
    assert collectives(text) == {}
    assert_close(got[0], expected(problem, packed=True)[0], FLOAT32)


def test_streams_with_a_state_are_computed_apart():
    problem = draw(20, KINDS, heads=2)

    def stream(*inputs):
        first, state = mlstm(*(x[:, :7] for x in inputs), return_state=True, chunk_size=16)
        rest, state = mlstm(
            *(x[:, 7:] for x in inputs), initial_state=state, return_state=True, chunk_size=16
        )
        return jnp.concatenate([first, rest], axis=1), state.memory

    wanted = quick_jit(stream)(*problem.inputs)
    mesh = mesh_of(2, 2, 2, 1)
    sharding = jax.NamedSharding(mesh, jax.P(("data", "fsdp"), None, "tensor"))
    with jax.set_mesh(mesh):
        inputs = [jax.device_put(x, sharding) for x in problem.inputs]
        compiled = quick_jit(stream).lower(*inputs).compile()
        got = compiled(*inputs)
    assert collectives(compiled.as_text()) == {}
    for x, one_device in zip(got, wanted, strict=True):
        assert not x.sharding.is_fully_replicated
        assert_close(x, np.asarray(one_device, np.float64), FLOAT32)


def test_an_axis_that_does_not_divide_is_left_out():
    """Three rows, three heads, and seven tokens for two devices."""
    problem = draw(7, KINDS[:3])
    with jax.set_mesh(mesh_of(2, 1, 2, 2)):
        h = jax.jit(mlstm)(*problem.inputs)
    assert_close(h, ref.recurrence(*problem.inputs)[0], FLOAT32)
