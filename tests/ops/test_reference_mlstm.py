"""The oracles of the mLSTM against each other, and their gradient against finite differences."""

import numpy as np
import pytest
from mlstm_cases import NAMES, draw

from swr_jax.ops import reference_mlstm as ref
from swr_jax.ops.reference import finite_difference_gradient, relative_rms

OPTIONS = ({}, {"input_gate": "sigmoid"}, {"input_gate": "sigmoid", "normalize": False})
MODERATE = ("plain", "packed", "as initialised")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_stabilizer_changes_nothing_but_the_range_of_numbers(options):
    problem = draw(37, MODERATE)
    options = options | {"initial_state": problem.state, "segment_ids": problem.segment_ids}
    h, state = ref.recurrence(*problem.inputs, **options)
    wanted, memory, normalizer = ref.unstabilized(*problem.inputs, **options)
    scale = np.exp(state.stabilizer)
    assert relative_rms(h, wanted) <= 1e-13
    assert relative_rms(scale[..., None, None] * state.memory, memory) <= 1e-13
    assert relative_rms(scale[..., None] * state.normalizer, normalizer) <= 1e-13


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_parallel_form_is_the_recurrence(options):
    problem = draw(37, MODERATE)
    options = options | {"segment_ids": problem.segment_ids}
    h, _ = ref.recurrence(*problem.inputs, **options)
    assert relative_rms(ref.parallel(*problem.inputs, **options), h) <= 1e-13


@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
def test_the_gradient_of_the_parallel_form_is_that_of_the_recurrence(input_gate):
    problem = draw(37, MODERATE)
    options = {"input_gate": input_gate, "segment_ids": problem.segment_ids}
    h, gradients = ref.parallel_gradients(*problem.inputs, problem.h_bar, **options)
    assert relative_rms(h, ref.recurrence(*problem.inputs, **options)[0]) <= 1e-13
    wanted = ref.gradients(*problem.inputs, problem.h_bar, **options)
    for name, found in gradients.items():
        assert relative_rms(found, wanted[name]) <= 1e-12, name


def test_enormous_gates_stay_in_range():
    problem = draw(37, ("loud", "silent", "forgetful", "wild"))
    q, k, v, i, f = problem.inputs
    h, state = ref.recurrence(q, k, v, 100 * i, 100 * f)
    assert np.isfinite(h).all()
    assert all(np.isfinite(x).all() for x in state)
    assert np.abs(h).max() > 1e-3


@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
def test_a_stream_in_pieces_is_one_sequence(input_gate):
    problem = draw(20, ("plain", "loud"))
    whole, last = ref.recurrence(*problem.inputs, input_gate=input_gate)
    first, state = ref.recurrence(*(x[:, :7] for x in problem.inputs), input_gate=input_gate)
    rest, state = ref.recurrence(
        *(x[:, 7:] for x in problem.inputs), input_gate=input_gate, initial_state=state
    )
    np.testing.assert_array_equal(np.concatenate([first, rest], axis=1), whole)
    for got, wanted in zip(state, last, strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_gradient_is_that_of_finite_differences(options):
    """Through normalizer, stabilizer, documents and state: no ties, no bound closer than a step."""
    # The sigmoid gate leaves the e^30 of a loud state in the sum, and the difference in its digits.
    kinds = MODERATE + (("loud", "wild") if not options else ())
    problem = draw(6, kinds, heads=1, qk_dim=2, v_dim=3, dtype=np.float64)
    options = options | {"segment_ids": problem.segment_ids}
    arguments = dict(zip(NAMES, (*problem.inputs, *problem.state), strict=True))

    def loss(**changed):
        *inputs, memory, normalizer, stabilizer = (arguments | changed).values()
        start = ref.MLSTMState(memory, normalizer, stabilizer)
        h, state = ref.recurrence(*inputs, initial_state=start, **options)
        terms = zip((h, *state), (problem.h_bar, *problem.state_bar), strict=True)
        return sum(np.sum(x * bar) for x, bar in terms)

    got = ref.gradients(
        *problem.inputs,
        problem.h_bar,
        problem.state_bar,
        initial_state=problem.state,
        **options,
    )
    assert tuple(got) == NAMES
    for name, gradient in got.items():
        wanted = finite_difference_gradient(
            lambda x, name=name: loss(**{name: x}), arguments[name], step=1e-6
        )
        assert relative_rms(gradient, wanted) <= 1e-6, name


def test_without_the_normalizers_part_it_is_not_a_gradient():
    problem = draw(6, ("loud",), heads=1, qk_dim=2, v_dim=3)
    exact = ref.gradients(*problem.inputs, problem.h_bar)
    partial = ref.gradients(*problem.inputs, problem.h_bar, through_normalizer=False)
    assert relative_rms(partial["q"], exact["q"]) > 0.1
    assert relative_rms(partial["v"], exact["v"]) == 0
