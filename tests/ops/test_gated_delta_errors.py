"""Bad input to the gated delta rule: a ValueError with the argument, its value and the rule."""

import re

import jax
import jax.numpy as jnp
import pytest

from swr_jax import GatedDeltaState, gated_delta_rule, gated_delta_rule_step

QK, V, GATE = jnp.ones((2, 5, 4, 3)), jnp.ones((2, 5, 4, 6)), jnp.ones((2, 5, 4))
GOOD = {"q": QK, "k": QK, "v": V, "alpha": GATE, "beta": GATE}


def raises(message):
    return pytest.raises(ValueError, match=re.escape(message))


@pytest.mark.parametrize("chunk_size", [0, -4, 12, 16.0, True, "16"])
def test_chunk_size_is_a_power_of_two(chunk_size):
    with raises(f"{chunk_size=}: must be an int, a power of two and at least 1"):
        gated_delta_rule(**GOOD, chunk_size=chunk_size)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": QK[0]}, "q.shape=(5, 4, 3): must have 4 axes, [B, T, H, Dk]"),
        ({"k": GATE}, "k.shape=(2, 5, 4): must have 4 axes, [B, T, H, Dk]"),
        ({"v": V[..., 0]}, "v.shape=(2, 5, 4): must have 4 axes, [B, T, H, Dv]"),
        ({"alpha": QK}, "alpha.shape=(2, 5, 4, 3): must have 3 axes, [B, T, H]"),
        ({"beta": GATE[0]}, "beta.shape=(5, 4): must have 3 axes, [B, T, H]"),
        ({"q": QK[..., :2]}, "q.shape=(2, 5, 4, 2) and k.shape=(2, 5, 4, 3): must be equal"),
        ({"q": QK[:, :1]}, "q.shape=(2, 1, 4, 3) and k.shape=(2, 5, 4, 3): must be equal"),
        (
            {"v": V[:, :4]},
            "v.shape=(2, 4, 4, 6) and k.shape=(2, 5, 4, 3): must agree in [B, T, H], here "
            "(2, 5, 4)",
        ),
        ({"alpha": GATE[:1]}, "alpha.shape=(1, 5, 4) and k.shape=(2, 5, 4, 3): must agree"),
        ({"beta": GATE[..., :1]}, "beta.shape=(2, 5, 1) and k.shape=(2, 5, 4, 3): must agree"),
        ({"q": QK[..., :0], "k": QK[..., :0]}, "k.shape=(2, 5, 4, 0): every axis needs at least 1"),
        ({"v": V[..., :0]}, "v.shape=(2, 5, 4, 0): every axis needs at least 1"),
        ({"k": QK.astype(int)}, "k.dtype=int32: must be a floating dtype"),
        ({"alpha": GATE.astype(bool)}, "alpha.dtype=bool: must be a floating dtype"),
        ({"beta": 0.5}, "beta is a float: must be an array [B, T, H]"),
    ],
)
def test_arrays_fit_together(changed, message):
    with raises(message):
        gated_delta_rule(**(GOOD | changed))


def test_a_sequence_has_tokens():
    with raises("k.shape=(2, 0, 4, 3): every axis needs at least 1"):
        gated_delta_rule(*(x[:, :0] for x in GOOD.values()))


@pytest.mark.parametrize(
    ("segment_ids", "message"),
    [
        (jnp.ones((2, 4), int), "segment_ids.shape=(2, 4): must be [B, T], here (2, 5)"),
        (jnp.ones(5, int), "segment_ids.shape=(5,): must be [B, T], here (2, 5)"),
        (jnp.ones((2, 5)), "segment_ids.dtype=float32: must be an integer dtype"),
    ],
)
def test_segment_ids_are_integers_for_every_token(segment_ids, message):
    with raises(message):
        gated_delta_rule(**GOOD, segment_ids=segment_ids)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (jnp.ones((2, 4, 3, 6)), "must be a GatedDeltaState; start from GatedDeltaState.zeros"),
        (
            GatedDeltaState.zeros(2, 4, 6, 3),
            " is for [B, H, Dk, Dv] = (2, 4, 6, 3), the inputs have (2, 4, 3, 6)",
        ),
        (GatedDeltaState.zeros(1, 4, 3, 6), "(1, 4, 3, 6), the inputs have (2, 4, 3, 6)"),
    ],
)
def test_states_belong_to_the_inputs(state, message):
    with raises(message):
        gated_delta_rule(**GOOD, initial_state=state)
    with raises(message):
        gated_delta_rule_step(state, *(x[:, 0] for x in GOOD.values()))


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (0, QK, "q_t.shape=(2, 5, 4, 3): must have 3 axes, [B, H, Dk]"),
        (1, QK[:, 0, :2], "q_t.shape=(2, 4, 3) and k_t.shape=(2, 2, 3): must be equal"),
        (2, V[:1, 0], "v_t.shape=(1, 4, 6) and k_t.shape=(2, 4, 3): must agree in [B, H]"),
        (3, GATE[:, 0, 0], "alpha_t.shape=(2,): must have 2 axes, [B, H]"),
        (4, GATE[:, 0, :1], "beta_t.shape=(2, 1) and k_t.shape=(2, 4, 3): must agree"),
    ],
)
def test_a_step_takes_one_token(index, wrong, message):
    arguments = [x[:, 0] for x in GOOD.values()]
    arguments[index] = wrong
    with raises(message):
        gated_delta_rule_step(GatedDeltaState.zeros(2, 4, 3, 6), *arguments)


def test_implementations_are_known_and_never_replaced(monkeypatch):
    with raises("implementation='cuda': unknown; must be None or one of"):
        gated_delta_rule(**GOOD, implementation="cuda")
    with raises("implementation='mosaic_tpu': not available on"):
        gated_delta_rule(**GOOD, implementation="mosaic_tpu")
    monkeypatch.setattr("swr_jax.ops.gated_delta.candidates", lambda name: (name,))
    with pytest.raises(NotImplementedError, match="the kernels use Hopper's products of matrices"):
        gated_delta_rule(**GOOD, implementation="mosaic_gpu")


def test_errors_come_while_tracing():
    with raises("q.shape=(2, 5, 4, 2) and k.shape=(2, 5, 4, 3): must be equal"):
        jax.eval_shape(gated_delta_rule, QK[..., :2], QK, V, GATE, GATE)
