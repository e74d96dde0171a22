"""The Hopper kernels in the interpreter, races detected and scratch poisoned, against float64."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from recurrence_cases import DECAYS, assert_rows_close, draw_decay

from pallas_kernels.swr.mosaic_gpu import block_two_pass
from pallas_kernels.swr.tuning import TuningConfig
from swr_jax.ops import reference as ref

FLOAT32 = 1e-6
SMALL = TuningConfig(heads=16, chunk=128, forward_slots=3, backward_slots=2)


@contextlib.contextmanager
def interpreted():
    """Simulate the GPU; uninitialised memory holds NaN, and a race raises."""
    parameters = plgpu.InterpretGPUParams(
        detect_races=True, uninitialized_memory="nan", on_race="raise"
    )
    with plgpu.force_gpu_interpret_mode(parameters):
        yield


def draw_case(length, heads, features, gated, lookback, *, gate_heads=None, batch=2, seed=0):
    """Arguments of `block_two_pass` by name, float32.

    Every head has its own kind of decay, and the last batch element is packed documents.
    """
    rng = np.random.default_rng([seed, length, heads, features])
    kinds = (DECAYS[head % len(DECAYS)] for head in range(heads))
    a = np.concatenate([draw_decay(kind, (batch, length, 1), rng) for kind in kinds], axis=2)
    documents = np.zeros((batch, length), np.int32)
    documents[-1] = np.cumsum(rng.uniform(size=length) < 0.1)
    arguments = {
        "a": ref.reset_decays(a, documents),
        "v": rng.standard_normal((batch, length, heads, features)),
    }
    if gated:
        shape = (batch, length, gate_heads or heads, features)
        arguments |= {"b": rng.standard_normal(shape), "c": rng.standard_normal(shape)}
    arguments["local"] = rng.standard_normal((batch, heads, features))
    if lookback == 1:
        arguments["previous"] = rng.standard_normal((batch, heads, features))
    return {name: x.astype(np.float32) for name, x in arguments.items()}


def run(arguments, x_bar, final_bar, *, block_size, lookback, config):
    """Output, final state and gradients by name, all in one compilation."""

    @jax.jit
    def evaluate(arguments, x_bar, final_bar):
        def call(arguments):
            gates = (arguments["b"], arguments["c"]) if "b" in arguments else None
            return block_two_pass(
                arguments["a"],
                arguments["v"],
                gates,
                arguments.get("local"),
                arguments.get("previous"),
                block_size=block_size,
                lookback=lookback,
                config=config,
            )

        (x, final), pull = jax.vjp(call, arguments)
        return x, final, pull((x_bar, None if final is None else final_bar))[0]

    with interpreted():
        return jax.tree.map(np.asarray, evaluate(arguments, x_bar, final_bar))


def expect(arguments, x_bar, final_bar, *, block_size, lookback):
    """The same from the dense operator in float64."""
    a, v = arguments["a"], arguments["v"]
    batch, _, heads, features = v.shape
    state = ref.zero_state(batch, heads, features, lookback)
    if "local" in arguments:
        state = state._replace(local=np.float64(arguments["local"]))
    if "previous" in arguments:
        state = state._replace(carriers=np.float64(arguments["previous"])[:, None])
    window = {"block_size": block_size, "lookback": lookback, "initial_state": state}
    final = None
    u, cotangent = v, x_bar
    if "b" in arguments:
        groups = heads // arguments["b"].shape[2]
        b, c = (np.repeat(np.float64(arguments[name]), groups, axis=2) for name in "bc")
        u, cotangent = b * v, x_bar * c
    x = ref.sliding_window_recurrence(a, u, **window)
    if lookback is None:
        # A loss on the final state is a loss on the last token's state.
        final = x[:, -1]
        cotangent = np.float64(cotangent).copy()
        cotangent[:, -1] += final_bar
    gradients = ref.sliding_window_gradients(a, u, cotangent, **window)
    wanted = {"a": gradients["a"], "v": gradients["u"], "local": gradients["local"]}
    if lookback == 1:
        wanted["previous"] = gradients["carriers"][:, 0]
    if "b" in arguments:
        shape = (*v.shape[:2], -1, groups, features)
        wanted["b"] = (gradients["u"] * v).reshape(shape).sum(3)
        wanted["c"] = (np.float64(x_bar) * x).reshape(shape).sum(3)
        wanted["v"] = gradients["u"] * b + x_bar
        x = x * c + v
    return x, final, {name: wanted[name] for name in arguments}


def by_head(x, axis):
    """One row for each head of each batch element, so that none hides behind a larger one."""
    x = np.moveaxis(np.asarray(x, np.float64), axis, 1)
    return x.reshape(-1, *x.shape[2:])


def check(arguments, *, block_size, lookback, config=SMALL, tolerance=FLOAT32):
    rng = np.random.default_rng(7)
    v = arguments["v"]
    x_bar = jnp.asarray(rng.standard_normal(v.shape), v.dtype)
    final_bar = rng.standard_normal(v[:, 0].shape).astype(np.float32)
    window = {"block_size": block_size, "lookback": lookback}
    x, final, gradients = run(arguments, x_bar, final_bar, config=config, **window)
    exact = {name: np.asarray(value, np.float64) for name, value in arguments.items()}
    x_bar = np.asarray(x_bar, np.float64)
    wanted_x, wanted_final, wanted = expect(exact, x_bar, final_bar, **window)
    assert x.dtype == v.dtype
    assert_rows_close(by_head(x, 2), by_head(wanted_x, 2), tolerance, "x")
    if lookback is None:
        assert_rows_close(by_head(final, 1), by_head(wanted_final, 1), FLOAT32, "final")
    else:
        assert final is None
    for name, gradient in gradients.items():
        assert gradient.dtype == arguments[name].dtype
        axis = 1 if name in ("local", "previous") else 2
        assert_rows_close(by_head(gradient, axis), by_head(wanted[name], axis), tolerance, name)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("length", "lookback", "block_size"),
    [
        (1, 1, 16),
        (16, 0, 16),
        (17, None, 16),
        (47, 1, 16),
        (150, 1, 64),
        (131, 0, 32),
        (140, None, 16),
    ],
)
def test_output_and_every_gradient(length, lookback, block_size, gated):
    arguments = draw_case(length, 7, 8, gated, lookback)
    check(arguments, block_size=block_size, lookback=lookback)
