"""The TPU kernels in the interpreter, races detected and scratch poisoned, against float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_two_pass_cases import BFLOAT16, FLOAT32, call, check, draw_call, evaluate
from recurrence_cases import DECAYS, assert_rows_close, draw_decay
from simulation import simulated_tpu

from pallas_kernels.swr.mosaic_tpu import block_two_pass, block_two_pass_heads_minor
from pallas_kernels.swr.tuning_tpu import TuningConfig
from swr_jax.ops import reference as ref

# Small tiles, so that short sequences have several.
SMALL = TuningConfig(tile=32, rows=16, features=16)


@pytest.fixture(autouse=True)
def one_core():
    with simulated_tpu():
        yield


@pytest.mark.parametrize(
    ("length", "lookback", "block_size", "gated"),
    [
        (1, 1, 16, True),
        (15, 0, 8, False),
        (17, None, 16, True),
        (37, 1, 8, False),  # several blocks in what a loop unrolls
        (37, 1, 8, True),
        (33, 0, 16, True),
        (43, None, 16, False),
        (67, 1, 64, True),  # a block longer than a tile, and a ragged end of three tokens
    ],
)
def test_output_and_every_gradient(length, lookback, block_size, gated):
    arguments = draw_call((2, length, 7, 5), lookback, gate_heads=7 if gated else None)
    check(block_two_pass, arguments, block_size=block_size, lookback=lookback, config=SMALL)


@pytest.mark.parametrize(
    ("shape", "gate_heads", "lookback"),
    [
        ((1, 20, 130, 3), None, 1),  # two groups of heads, the second one nearly empty
        ((2, 9, 100, 8), 50, None),  # a batch that does not fit the lanes; gates of two heads each
        ((2, 18, 3, 20), 1, 1),  # two groups of features, padded; one gate for all heads
    ],
)
def test_shapes_that_fill_no_register(shape, gate_heads, lookback):
    arguments = draw_call(shape, lookback, gate_heads=gate_heads)
    check(block_two_pass, arguments, block_size=8, lookback=lookback, config=SMALL)


@pytest.mark.parametrize(
    ("dtype", "lookback"), [(jnp.bfloat16, 1), (jnp.bfloat16, None), (jnp.float16, 1)]
)
def test_half_precision(dtype, lookback):
    arguments = draw_call((2, 19, 6, 9), lookback, gate_heads=3)
    rounded = {name: arguments[name].astype(dtype) for name in ("a", "v", "b", "c")}
    check(
        block_two_pass,
        arguments | rounded,
        block_size=16,
        lookback=lookback,
        config=SMALL,
        tolerance=BFLOAT16,
    )


def test_mixed_precision():
    arguments = draw_call((1, 9, 4, 8), 1, gate_heads=4)
    rounded = {name: arguments[name].astype(jnp.bfloat16) for name in ("v", "c")}
    check(
        block_two_pass,
        arguments | rounded,
        block_size=8,
        lookback=1,
        config=SMALL,
        tolerance=BFLOAT16,
    )


def test_no_initial_state_is_a_state_of_zeros():
    arguments = draw_call((2, 19, 3, 8), 1, states=False)
    check(block_two_pass, arguments, block_size=8, lookback=1, config=SMALL)


def test_heads_minor_is_the_same_in_another_order():
    arguments = draw_call((2, 21, 4, 8), 1, gate_heads=2)
    window = {"block_size": 8, "lookback": 1, "config": SMALL}
    expected, _ = call(block_two_pass, arguments, **window)
    turned = {
        name: x if name == "a" else np.ascontiguousarray(np.swapaxes(x, -1, -2))
        for name, x in arguments.items()
    }
    x, _ = call(block_two_pass_heads_minor, turned, **window)
    np.testing.assert_array_equal(np.swapaxes(x, -1, -2), expected)


def test_tuning_changes_no_bit_of_output_and_input_gradients():
    arguments = draw_call((2, 35, 5, 8), 1)
    x_bar = np.random.default_rng(1).standard_normal(arguments["v"].shape).astype(np.float32)
    configs = [SMALL, TuningConfig(tile=16, rows=16), TuningConfig()]
    run = functools.partial(
        evaluate, block_two_pass, arguments, x_bar, None, block_size=8, lookback=1
    )
    (x, _, gradients), *others = [run(config=config) for config in configs]
    for other_x, _, other_gradients in others:
        np.testing.assert_array_equal(other_x, x)
        for name, gradient in gradients.items():
            np.testing.assert_array_equal(other_gradients[name], gradient, err_msg=name)


def test_a_nan_travels_no_further_than_the_window():
    arguments = draw_call((1, 40, 3, 8), 1, states=False)
    arguments["v"][:, 3] = np.nan
    x, _ = call(block_two_pass, arguments, block_size=8, lookback=1, config=SMALL)
    finite = np.isfinite(np.asarray(x)).all(axis=(0, 2, 3))
    np.testing.assert_array_equal(finite, (np.arange(40) < 3) | (np.arange(40) >= 16))


def test_one_block_for_all_adds_its_initial_states():
    # With a single block, what is left of the carrier before it and its own state are one sum.
    arguments = draw_call((1, 13, 2, 8), 1)
    x, _ = call(block_two_pass, arguments, block_size=16, lookback=1, config=SMALL)
    initial = arguments["local"] + arguments["previous"]
    expected = ref.linear_recurrence(arguments["a"], arguments["v"], initial)
    assert_rows_close(x, expected, FLOAT32)


def test_two_cores_share_the_batch():
    arguments = draw_call((2, 18, 100, 8), 1)
    with simulated_tpu(cores=2):
        check(block_two_pass, arguments, block_size=8, lookback=1, config=SMALL)


def test_under_vmap():
    rng = np.random.default_rng(0)
    a = draw_decay("uniform", (3, 1, 18, 2), rng).astype(np.float32)
    v = rng.standard_normal((3, 1, 18, 2, 8)).astype(np.float32)

    def loss(a, v):
        x, _ = block_two_pass(a, v, None, None, None, block_size=8, lookback=1, config=SMALL)
        return jnp.sum(x**2), x

    value = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, x), gradients = jax.jit(jax.vmap(value))(a, v)
    for row in range(3):
        expected = ref.sliding_window_recurrence(a[row], v[row], block_size=8)
        wanted = ref.sliding_window_gradients(a[row], v[row], 2 * expected, block_size=8)
        assert_rows_close(x[row], expected, FLOAT32)
        assert_rows_close(gradients[0][row], wanted["a"], FLOAT32)
        assert_rows_close(gradients[1][row], wanted["u"], FLOAT32)


def _arrays(**changes):
    a = jnp.ones(changes.get("shape", (1, 4, 2)), changes.get("dtype", jnp.float32))
    v = jnp.ones((*a.shape, 8), a.dtype)
    return a, v, None, changes.get("local"), changes.get("previous")


@pytest.mark.parametrize(
    ("arrays", "window", "reason"),
    [
        (_arrays(dtype=jnp.float8_e4m3fn), {}, "a has dtype float8_e4m3fn"),
        (_arrays(), {"lookback": 2}, "lookback=2"),
        (_arrays(), {"block_size": 12}, "block_size=12"),
        (_arrays(shape=(1, 0, 2)), {}, r"v has shape \(1, 0, 8, 2\)"),
        (_arrays(previous=jnp.ones((1, 2, 8))), {"lookback": 0}, "previous is given"),
    ],
)
def test_what_is_out_of_reach_is_refused_with_the_reason(arrays, window, reason):
    with pytest.raises(NotImplementedError, match=reason):
        block_two_pass(*arrays, **({"block_size": 16, "lookback": 1} | window))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tile": 48}, "tile=48"),
        ({"tile": 8}, "tile=8"),
        ({"rows": 8}, "rows=8"),
        ({"tile": 16, "rows": 32}, "rows=32"),
        ({"features": 24}, "features=24"),
    ],
)
def test_a_tuning_out_of_range_is_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        TuningConfig(**options)


def test_forward_mode_is_refused():
    a, v, *_ = _arrays()
    function = functools.partial(
        block_two_pass, gates=None, local=None, previous=None, block_size=16, lookback=1
    )
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda a: function(a, v)[0], (a,), (a,))


@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("lookback", [0, 1, None])
@pytest.mark.parametrize(
    ("length", "block_size"),
    [
        *itertools.product([1, 15, 16, 17, 31, 32, 33, 61], [8, 16, 32]),
        (127, 64),
        (131, 128),
        (257, 128),
        (300, 16),
    ],
)
def test_every_length_and_block(length, block_size, lookback, gated):
    arguments = draw_call((2, length, 7, 9), lookback, gate_heads=7 if gated else None, seed=1)
    check(block_two_pass, arguments, block_size=block_size, lookback=lookback, config=SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [1, 2, 4, 256])
@pytest.mark.parametrize("lookback", [0, 1])
def test_unusual_blocks(block_size, lookback):
    arguments = draw_call((1, 290, 3, 8), lookback, gate_heads=3)
    check(block_two_pass, arguments, block_size=block_size, lookback=lookback, config=SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("lookback", [1, None])
@pytest.mark.parametrize(
    "shape", [(2, 75, 130, 17), (1, 33, 257, 1), (3, 40, 43, 64), (1, 300, 1, 128)]
)
def test_default_tuning(shape, lookback, dtype):
    arguments = draw_call(shape, lookback, gate_heads=1)
    rounded = {name: arguments[name].astype(dtype) for name in ("a", "v", "b", "c")}
    check(
        block_two_pass,
        arguments | rounded,
        block_size=16,
        lookback=lookback,
        tolerance=FLOAT32 if dtype == jnp.float32 else BFLOAT16,
    )


def test_every_kind_of_decay_is_drawn():
    # `draw_call` gives each head a kind of its own: seven heads have them all.
    assert len(DECAYS) <= 7
