"""Bad input to the mLSTM: a ValueError that names the argument, its value and the rule."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from simulation import simulated_gpu

from swr_jax import MLSTMState, RecurrenceState, mlstm, mlstm_step

INPUTS = {
    "q": jnp.ones((2, 5, 3, 4)),
    "k": jnp.ones((2, 5, 3, 4)),
    "v": jnp.ones((2, 5, 3, 6)),
    "i": jnp.ones((2, 5, 3)),
    "f": jnp.ones((2, 5, 3)),
}
TOKEN = {f"{name}_t": x[:, 0] for name, x in INPUTS.items()}
STATE = MLSTMState.zeros(2, 3, 4, 6)


def raises(message):
    return pytest.raises(ValueError, match=re.escape(message))


@pytest.mark.parametrize("chunk_size", [0, -4, 12, 16.0, True, "16"])
def test_chunk_size_is_a_power_of_two(chunk_size):
    with raises(f"{chunk_size=}: must be an int, a power of two and at least 1"):
        mlstm(**INPUTS, chunk_size=chunk_size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_gate": "tanh"}, "input_gate='tanh': unknown; must be one of ['exp', 'sigmoid']"),
        ({"normalize": False}, "normalize=False with input_gate='exp': the exponential gate is"),
    ],
)
def test_options(options, message):
    with raises(message):
        mlstm(**INPUTS, **options)
    with raises(message):
        mlstm_step(STATE, **TOKEN, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": INPUTS["q"][0]}, "q.shape=(5, 3, 4): must have 4 axes, [B, T, H, Dk]"),
        ({"f": INPUTS["v"]}, "f.shape=(2, 5, 3, 6): must have 3 axes, [B, T, H]"),
        ({"k": INPUTS["v"]}, "q.shape=(2, 5, 3, 4) and k.shape=(2, 5, 3, 6): must be equal"),
        ({"v": INPUTS["v"][:, :4]}, "v.shape=(2, 4, 3, 6): must begin with [B, T, H] like q, here"),
        ({"i": INPUTS["i"][..., :1]}, "i.shape=(2, 5, 1): must begin with [B, T, H] like q"),
        ({"f": INPUTS["f"][:1]}, "f.shape=(1, 5, 3): must begin with [B, T, H] like q"),
        ({"v": INPUTS["v"][..., :0]}, "v.shape=(2, 5, 3, 0): every axis of [B, T, H, Dv] needs"),
        ({"i": INPUTS["i"].astype(int)}, "i.dtype=int32: must be a floating dtype"),
        ({"q": 1.0}, "q is a float: must be an array [B, T, H, Dk]"),
        ({"segment_ids": jnp.ones((2, 4), int)}, "segment_ids.shape=(2, 4): must be [B, T], here"),
        ({"segment_ids": jnp.ones((2, 5))}, "segment_ids.dtype=float32: must be an integer dtype"),
    ],
)
def test_arrays_fit_together(changes, message):
    with raises(message):
        mlstm(**INPUTS | changes)


def test_no_tokens():
    with raises("q.shape=(2, 0, 3, 4): every axis of [B, T, H, Dk] needs at least 1"):
        mlstm(**{name: x[:, :0] for name, x in INPUTS.items()})


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (jnp.ones((2, 3, 4, 6)), "must be an MLSTMState, as MLSTMState.zeros or return_state=True"),
        (RecurrenceState.zeros(2, 3, 4), " is a RecurrenceState: must be an MLSTMState"),
        (MLSTMState.zeros(1, 3, 4, 6), ".memory.shape=(1, 3, 4, 6): must be (2, 3, 4, 6) for"),
        (STATE.replace(normalizer=jnp.ones((2, 3, 6))), ".normalizer.shape=(2, 3, 6): must be (2,"),
        (STATE.replace(stabilizer=jnp.ones(3)), ".stabilizer.shape=(3,): must be (2, 3)"),
    ],
)
def test_a_state_fits_the_inputs(state, message):
    with raises(message):
        mlstm(**INPUTS, initial_state=state)
    with raises(message):
        mlstm_step(state, **TOKEN)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_t": INPUTS["q"]}, "q_t.shape=(2, 5, 3, 4): must have 3 axes, [B, H, Dk]"),
        ({"k_t": TOKEN["v_t"]}, "q_t.shape=(2, 3, 4) and k_t.shape=(2, 3, 6): must be equal"),
        ({"v_t": TOKEN["v_t"][:1]}, "v_t.shape=(1, 3, 6): must begin with [B, H] like q_t, here"),
        ({"f_t": TOKEN["f_t"][:, :1]}, "f_t.shape=(2, 1): must begin with [B, H] like q_t"),
        ({"i_t": TOKEN["i_t"].astype(int)}, "i_t.dtype=int32: must be a floating dtype"),
    ],
)
def test_one_tokens_arrays_fit_together(changes, message):
    with raises(message):
        mlstm_step(STATE, **TOKEN | changes)


def test_an_implementation_that_is_not_there():
    with raises("implementation='triton': unknown; must be None or one of"):
        mlstm(**INPUTS, implementation="triton")
    with raises("implementation='mosaic_gpu': not available on cpu (cpu), which has ['xla']"):
        mlstm(**INPUTS, implementation="mosaic_gpu")


def test_a_kernel_that_does_not_cover_the_case_says_so_when_it_is_named():
    """And is passed over when it is not."""
    with simulated_gpu():
        with pytest.raises(NotImplementedError, match=r"mosaic_gpu: .*float32"):
            mlstm(**INPUTS, implementation="mosaic_gpu")
        h = mlstm(**INPUTS)
    np.testing.assert_array_equal(h, mlstm(**INPUTS, implementation="xla"))


def test_forward_mode_is_refused():
    def run(q):
        return mlstm(**INPUTS | {"q": q})

    with pytest.raises(TypeError, match=r"forward-mode autodiff .* custom_vjp"):
        jax.jvp(run, (INPUTS["q"],), (INPUTS["q"],))
