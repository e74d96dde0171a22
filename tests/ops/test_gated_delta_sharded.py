"""The gated delta rule over a mesh: what each device computes, and what travels between them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gated_delta_cases import Problem, draw, draw_rows
from mesh_cases import collectives, mesh_of
from mlstm_cases import quick_jit
from recurrence_cases import assert_rows_close

from swr_jax import gated_delta_rule
from swr_jax.ops import reference_gated_delta as ref

FLOAT32 = 1e-5
NAMES = ("o", "q", "k", "v", "alpha", "beta")
SAME_KEYS = 11  # of the rows of `draw_rows`
GATHERED = {"all-gather": 1, "reduce-scatter": 1}


def run_split(problem, sizes, documents, **options):
    """o and every gradient over a mesh, and the compiled text."""
    mesh = mesh_of(*sizes)
    sharding = jax.NamedSharding(mesh, jax.P(("data", "fsdp"), "sequence", "tensor"))

    def gradients(o_bar, *arguments):
        o, pull = jax.vjp(
            lambda *x: gated_delta_rule(*x, segment_ids=documents, **options), *arguments
        )
        return o, *pull(o_bar)

    with jax.set_mesh(mesh):
        arguments = [jax.device_put(x, sharding) for x in (problem.o_bar, *problem.arguments)]
        compiled = quick_jit(gradients, out_shardings=sharding).lower(*arguments).compile()
        return compiled(*arguments), compiled.as_text()


def check(problem, sizes, documents=None, **options):
    """Compare with the oracle; return what was sent."""
    got, text = run_split(problem, sizes, documents, **options)
    o, _ = ref.gated_delta_rule(*problem.arguments, segment_ids=documents)
    gradients = ref.gated_delta_gradients(*problem.arguments, problem.o_bar, segment_ids=documents)
    for name, x, exact in zip(NAMES, got, (o, *gradients), strict=False):
        assert_rows_close(x, exact, FLOAT32, name)
    return collectives(text)


@pytest.mark.parametrize(
    ("length", "sizes", "packed"),
    [
        (100, (2, 1, 1, 4), True),
        (72, (1, 1, 2, 2), False),
        (8, (1, 1, 1, 8), False),  # a token to a device
    ],
)
def test_a_split_sequence_gathers_one_map_of_each_device(length, sizes, packed):
    """And, to find the first token of a document, one identifier of the left neighbour."""
    problem, documents = draw_rows(length, 2, 5, 3)
    # With all keys the same, and nothing in memory but what they wrote, decays change nothing.
    rows = [row for row in range(14) if row != SAME_KEYS][-12:]
    problem = Problem(*(x[rows] for x in problem))
    sent = check(problem, sizes, documents[rows] if packed else None, chunk_size=16)
    assert sent == GATHERED | ({"collective-permute": 1} if packed else {})


def test_batch_and_heads_are_computed_apart():
    problem = draw(20, "some zeros", batch=4, heads=2).rounded(np.float32)
    assert check(problem, (2, 2, 2, 1), chunk_size=16) == {}


def test_a_token_reaches_the_last_device_undiminished():
    """Nothing decays and nothing is written over: the first value, read by the last query."""
    problem = draw(64, "ones", "zeros", batch=1, heads=1).rounded(np.float32)
    problem.beta[:, 0] = 1
    problem.q[:, -1] = problem.k[:, 0]
    got, _ = run_split(problem, (1, 1, 1, 8), None)
    np.testing.assert_allclose(got[0][:, -1], problem.v[:, 0], rtol=1e-6)


def test_an_axis_that_does_not_divide_is_left_out():
    """Three rows, three heads, and seven tokens for two devices."""
    problem = draw(7, batch=3).rounded(np.float32)
    with jax.set_mesh(mesh_of(2, 1, 2, 2)):
        o = jax.jit(gated_delta_rule)(*map(jnp.asarray, problem.arguments))
    assert_rows_close(o, ref.gated_delta_rule(*problem.arguments)[0], FLOAT32)
