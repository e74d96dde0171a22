"""mLSTM against the float64 recurrence: outputs, last states, and every gradient."""

import pytest
from mlstm_cases import assert_all_close, draw, evaluate, expect

FLOAT32 = 1e-5


@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 37])
def test_results_and_gradients_are_those_of_the_recurrence(length, input_gate):
    problem = draw(length)
    got = evaluate(problem, chunk_size=16, input_gate=input_gate)
    assert_all_close(got, expect(problem, input_gate=input_gate), FLOAT32)
