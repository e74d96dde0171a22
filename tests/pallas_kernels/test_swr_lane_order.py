"""The TPU kernels on arrays in lane order, in the interpreter, against float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from block_two_pass_cases import BFLOAT16, FLOAT32, call, check, draw_call
from simulation import simulated_tpu

from pallas_kernels.swr.lane_order import from_lane_order, to_lane_order
from pallas_kernels.swr.mosaic_tpu import block_two_pass, block_two_pass_lane_order
from pallas_kernels.swr.tuning_tpu import TuningConfig

# Small tiles, so that short sequences have several.
SMALL = TuningConfig(tile=32, rows=16, features=16)


@pytest.fixture(autouse=True)
def one_core():
    with simulated_tpu():
        yield


def in_lane_order(a, v, gates, local, previous, **options):
    """`block_two_pass` by the kernels that read lane order."""

    def minor(x):
        return None if x is None else jnp.swapaxes(x, -1, -2)

    gates = None if gates is None else tuple(map(to_lane_order, gates))
    x, final = block_two_pass_lane_order(
        a, to_lane_order(v), gates, minor(local), minor(previous), **options
    )
    return from_lane_order(x, a.shape[2]), minor(final)


def test_columns_are_groups_of_heads_then_features_then_heads():
    x = np.arange(2 * 256 * 3).reshape(2, 256, 3)
    columns = np.asarray(to_lane_order(jnp.asarray(x)))
    assert columns.shape == (2, 768)
    group, feature, lane = 1, 2, 5
    assert columns[0, (group * 3 + feature) * 128 + lane] == x[0, group * 128 + lane, feature]
    np.testing.assert_array_equal(from_lane_order(columns, 256), x)


CASES = [
    ((1, 37, 128, 16), 1, 8, True),
    ((1, 35, 128, 16), None, 16, False),
    pytest.param((1, 67, 256, 16), 1, 64, True, marks=pytest.mark.slow),
    pytest.param((2, 20, 128, 48), 0, 16, False, marks=pytest.mark.slow),  # groups of features
    pytest.param((1, 1, 128, 16), 1, 16, True, marks=pytest.mark.slow),
    pytest.param((1, 33, 128, 32), None, 16, True, marks=pytest.mark.slow),
    pytest.param((1, 16, 128, 16), 0, 4, True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("shape", "lookback", "block_size", "gated"), CASES)
def test_output_and_every_gradient(shape, lookback, block_size, gated):
    arguments = draw_call(shape, lookback, gate_heads=shape[2] if gated else None)
    check(in_lane_order, arguments, block_size=block_size, lookback=lookback, config=SMALL)


def test_half_precision():
    arguments = draw_call((1, 18, 128, 16), 1, gate_heads=128)
    rounded = {name: arguments[name].astype(jnp.bfloat16) for name in ("v", "b", "c")}
    check(in_lane_order, arguments | rounded, block_size=16, lookback=1, tolerance=BFLOAT16)


@pytest.mark.slow
@pytest.mark.parametrize("lookback", [1, None])
def test_default_tuning(lookback):
    arguments = draw_call((1, 300, 128, 16), lookback, gate_heads=128)
    check(in_lane_order, arguments, block_size=16, lookback=lookback, tolerance=FLOAT32)


def test_both_layouts_give_the_same_bits():
    arguments = draw_call((1, 21, 128, 16), 1, gate_heads=128)
    window = {"block_size": 8, "lookback": 1, "config": SMALL}
    x, _ = call(in_lane_order, arguments, **window)
    expected, _ = call(block_two_pass, arguments, **window)
    np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize(
    ("heads", "features", "dtype", "gate_features", "reason"),
    [
        (64, 16, jnp.float32, 16, "64 heads"),
        (128, 8, jnp.float32, 8, "8 features"),
        (128, 16, jnp.float16, 16, "float16"),
        (128, 16, jnp.float32, 8, r"gates of shape \(1, 4, 1024\)"),
    ],
)
def test_what_is_out_of_reach_is_refused_with_the_reason(
    heads, features, dtype, gate_features, reason
):
    a = jnp.ones((1, 4, heads), dtype)
    v = jnp.ones((1, 4, heads * features), dtype)
    gate = jnp.ones((1, 4, heads * gate_features), dtype)
    with pytest.raises(NotImplementedError, match=reason):
        block_two_pass_lane_order(a, v, (gate, gate), None, None, block_size=16, lookback=1)
