"""The Hopper kernels of the gated delta rule in the interpreter, races detected, scratch poisoned.

Against the float64 recurrence, through the operator.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gated_delta_cases import Problem, draw, draw_rows
from recurrence_cases import assert_rows_close
from simulation import in_own_process, simulated_gpu

from pallas_kernels.gated_delta import mosaic_gpu
from pallas_kernels.gated_delta.mosaic_gpu import TuningConfig
from pallas_kernels.gated_delta.mosaic_gpu_walk import Walk
from swr_jax import GatedDeltaState, gated_delta_rule
from swr_jax.ops import reference_gated_delta as ref
from swr_jax.ops.gated_delta_evaluation import evaluate

# What is returned in bfloat16 is rounded to it; all else is as exact as two parts of 16 bits.
BFLOAT16 = 4e-3
FLOAT32 = 1e-4
NAMES = ("o", "final", *ref.Gradients._fields)
# Of the rows of `draw_rows`: of keys that are all the same nothing is left but rounding errors.
DIFFERENT_KEYS = np.array([row for row in range(14) if row != 11])


def in_bfloat16(problem):
    """q, k, v and the cotangent of o; all else in float32."""
    low = {name: jnp.asarray(getattr(problem, name), jnp.bfloat16) for name in ("q", "k", "v")}
    low["o_bar"] = jnp.asarray(problem.o_bar, jnp.bfloat16)
    return Problem(*(jnp.asarray(x, jnp.float32) for x in problem))._replace(**low)


def check(run, problem, documents=None, rows=...):
    """Results and every gradient of `run`, a function of the arguments and the initial state."""
    problem = in_bfloat16(problem)
    with simulated_gpu():
        found, pull = jax.vjp(run, *problem.arguments, problem.initial)
        found = jax.block_until_ready((*found, *pull(problem.cotangents)))
    exact = Problem(*(np.asarray(x, np.float64) for x in problem))
    start = (exact.initial, documents)
    wanted = (
        *ref.gated_delta_rule(*exact.arguments, *start),
        *ref.gated_delta_gradients(*exact.arguments, *exact.cotangents, *start),
    )
    given = (problem.o_bar, problem.initial, *problem.arguments, problem.initial)
    for name, x, expected, like in zip(NAMES, found, wanted, given, strict=True):
        assert x.dtype == like.dtype, name
        tolerance = BFLOAT16 if x.dtype == jnp.bfloat16 else FLOAT32
        assert_rows_close(x[rows], expected[rows], tolerance, name)


def compare(*sizes):
    """The operator: every kind of gate, keys that are alike, documents; states before and after."""
    problem, documents = draw_rows(*sizes)

    def run(*arguments):
        *arguments, initial = arguments
        o, state = gated_delta_rule(
            *arguments,
            initial_state=GatedDeltaState(initial),
            segment_ids=documents,
            return_state=True,
            implementation="mosaic_gpu",
        )
        return o, state.memory

    check(run, problem, documents, DIFFERENT_KEYS)


def compare_groups(length, v_dim):
    """Two warpgroups to a thread block."""

    def run(*arguments):
        return mosaic_gpu.gated_delta_rule(*arguments, config=TuningConfig(groups=2))

    check(run, draw(length, "near one", batch=1, heads=1, qk_dim=40, v_dim=v_dim))


def compare_without_queries():
    """As a device makes of its part of a sequence what it does to the memory before it."""
    problem = in_bfloat16(draw(70, "near one", batch=1, heads=1, qk_dim=48))
    _, *arguments = problem.arguments

    def both(implementation):
        def last(*arguments):
            return evaluate(implementation, None, *arguments, chunk_size=64)[1]

        memory, pull = jax.vjp(last, *arguments, problem.initial)
        return jax.block_until_ready((memory, *pull(problem.final_bar)))

    with simulated_gpu():
        found = both("mosaic_gpu")
    for x, y in zip(found, both("xla"), strict=True):
        tolerance = BFLOAT16 if x.dtype == jnp.bfloat16 else FLOAT32
        assert_rows_close(x, np.asarray(y, np.float64), tolerance)


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 2, 4, 1),
        (65, 1, 5, 7),
        pytest.param((63, 2, 16, 9), marks=pytest.mark.slow),
        pytest.param((64, 1, 64, 65), marks=pytest.mark.slow),
        pytest.param((300, 1, 128, 256), marks=pytest.mark.slow),
        pytest.param((1009, 1, 130, 33), marks=pytest.mark.slow),
        pytest.param((130, 1, 256, 64), marks=pytest.mark.slow),
    ],
)
def test_results_and_gradients_are_those_of_the_recurrence(sizes):
    in_own_process(__name__, "compare", *sizes)


def test_two_warpgroups_share_keys_and_queries():
    in_own_process(__name__, "compare_groups", 130, 128)


def test_without_queries_there_is_a_state_and_its_gradient():
    in_own_process(__name__, "compare_without_queries")


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        ((8, 128, 16, 128, 256), 2),
        ((1, 1024, 16, 128, 256), 1),  # of two, not half of the chip has one
        ((8, 128, 16, 128, 192), 1),  # an odd number of tiles
        ((8, 128, 16, 256, 256), 1),  # of two, there is no room for a chunk beside another
    ],
)
def test_thread_blocks_have_two_warpgroups_where_these_fill_the_chip(sizes, groups):
    assert mosaic_gpu.suited_groups(Walk(*sizes, groups=1), 132) == groups


def _arguments(dtype=jnp.bfloat16, q_dim=8, time=3):
    q, v = (jnp.zeros((1, time, 1, size), dtype) for size in (q_dim, 8))
    gate = jnp.zeros((1, time, 1))
    return q, q, v, gate, gate, jnp.zeros((1, 1, q_dim, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (_arguments(jnp.float32), r"q\.dtype=float32: the tensor cores would round it"),
        (_arguments(q_dim=257), "Dk=257: the kernels take up to 256"),
        (_arguments(time=0), r"q has shape \(1, 0, 1, 8\): the kernels need 1 or more"),
    ],
)
def test_what_is_out_of_reach_is_not_implemented_and_says_why(arguments, message):
    with pytest.raises(NotImplementedError, match=message):
        mosaic_gpu.gated_delta_rule(*arguments)


def test_a_tuning_out_of_range_is_refused():
    with pytest.raises(ValueError, match="groups=3: must be 1, 2 or None"):
        TuningConfig(groups=3)


def test_the_kernels_are_the_default_and_run_where_they_can(monkeypatch):
    """Of numbers in float32, for one, XLA takes care."""
    calls, kernel = [], mosaic_gpu.gated_delta_rule

    def watched(*arrays):
        calls.append(arrays[0].dtype)
        return kernel(*arrays)

    monkeypatch.setattr(mosaic_gpu, "gated_delta_rule", watched)
    for dtype in (jnp.bfloat16, jnp.float32):
        *arguments, _ = _arguments(dtype)
        with simulated_gpu():
            jax.eval_shape(gated_delta_rule, *arguments)
    assert calls == [jnp.bfloat16, jnp.float32]
    with simulated_gpu(), pytest.raises(NotImplementedError, match=r"q\.dtype=float32"):
        gated_delta_rule(*arguments, implementation="mosaic_gpu")
