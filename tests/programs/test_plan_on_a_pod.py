"""A training step planned for a TPU slice that is not here, by its compiler."""

import pytest

from pallas_kernels.targets import CHIPS
from swr_jax.train.config import make_train_config
from swr_jax.train.plan import make_plan

pytestmark = pytest.mark.targets

ROWS, LENGTH, DEPTH = 8, 512, 4


def config(**mesh):
    model = {
        "vocab_size": 512,
        "features": 256,
        "depth": DEPTH,
        "pattern": ["phalanx", "attention"],
        "num_heads": 2,
        "dtype": "bfloat16",
        "remat": "full",
    }
    data = {"sequence_length": LENGTH, "batch_size": ROWS}
    return make_train_config({"model": model, "data": data, "mesh": {"data": 1} | mesh})


@pytest.fixture(scope="module")
def plan():
    return make_plan(config(fsdp=2, sequence=2), "v5e:2x2")


def test_memory_is_what_is_held_and_what_the_compiler_adds(plan):
    held = plan["held"]
    # float32, on two devices each but for the few that fsdp does not divide; two moments.
    assert held["parameters"] == pytest.approx(4 * plan["parameters"] / 2, rel=0.02)
    assert held["optimizer"] == pytest.approx(2 * held["parameters"], rel=0.01)
    assert held["batch"] == 6 * 4 * ROWS * LENGTH // 4
    assert plan["memory"] >= sum(held.values()) + plan["temporary"]
    assert plan["fits"]
    assert plan["memory_limit"] == CHIPS["v5e"].memory_bytes


def test_kernels_run_once_forward_and_once_more_backward_in_every_layer(plan):
    calls = {name: found["calls"] for name, found in plan["kernels"].items()}
    layers = DEPTH // 2
    assert calls == {
        "swr_gated_forward": 2 * layers,
        "swr_gated_backward": layers,
        "splash_mha_fwd_segmented_residuals": 2 * layers,
        "splash_mha_dkv_segmented_no_residuals": layers,
    }


def test_time_adds_up(plan):
    assert plan["unknown_loops"] == plan["unestimated_operations"] == 0
    kernels = sum(found["seconds"] for found in plan["kernels"].values())
    links = sum(found["seconds"] for found in plan["collectives"].values())
    assert plan["compute_seconds"] == pytest.approx(plan["xla_seconds"] + kernels)
    assert plan["seconds"] == pytest.approx(plan["compute_seconds"] + links)
    assert {"all-gather", "collective-permute"} <= set(plan["collectives"])
    # Rematerialisation repeats the forward pass: 8 instead of 6 for each parameter and token.
    model = plan["flops_per_token"] * plan["tokens_per_update"]
    assert 1.2 < plan["traced_flops"] / model < 1.5
    assert 0.01 < plan["mfu"] < 0.6


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match=r"topology='v5e'.*such as v5e:16x16"):
        make_plan(config(), "v5e")
    with pytest.raises(ValueError, match=r"does not fit 4 device\(s\)"):
        make_plan(config(fsdp=3), "v5e:2x2")
    with pytest.raises(ValueError, match=r"data\.batch_size=8 must be a multiple"):
        make_plan(config(data=-1), "v5e:4x4")
