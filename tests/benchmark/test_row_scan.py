"""The row-by-row scan that the TPU kernels are compared with computes what they compute."""

import jax
import numpy as np
from recurrence_cases import assert_rows_close, draw_decay
from simulation import simulated_tpu

from pallas_kernels.swr.lane_order import from_lane_order, to_lane_order
from swr_jax.benchmark.row_scan import TILE, row_scan
from swr_jax.ops import reference as ref


def test_output_and_gradients():
    rng = np.random.default_rng(0)
    a = draw_decay("uniform", (1, 2 * TILE, 128), rng).astype(np.float32)
    u, x_bar = rng.standard_normal((2, 1, 2 * TILE, 128, 2)).astype(np.float32)
    with simulated_tpu():
        x, pull = jax.vjp(row_scan, a, to_lane_order(u))
        da, du = pull(to_lane_order(x_bar))
    wanted = ref.sliding_window_gradients(a, u, x_bar, block_size=16, lookback=None)
    assert_rows_close(from_lane_order(x, 128), ref.linear_recurrence(a, u), 1e-6)
    assert_rows_close(da, wanted["a"], 1e-6)
    assert_rows_close(from_lane_order(du, 128), wanted["u"], 1e-6)
