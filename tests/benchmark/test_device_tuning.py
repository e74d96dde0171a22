"""Section `tuning`: faster tilings stay, those that change results are refused, what is printed."""

import jax
import pytest

from pallas_kernels.swr import tuning as defaults
from pallas_kernels.swr.tuning import TuningConfig, default_config
from swr_jax.benchmark import timing
from swr_jax.benchmark.device import platform, tuning
from swr_jax.benchmark.records import Session

KERNEL = tuning.Kernel(gated=False, lookback=1)
GPU = platform.Backend("mosaic_gpu", simulated=True)


@pytest.fixture
def sizes(monkeypatch):
    """Stand-ins for kernels: the number of forward slots decides the time and the result."""

    def kernel_of(backend, kernel, config):
        factor = 1.5 if config.forward_slots == 5 else 1.0
        return lambda a, v: factor * v * a[..., None]

    def measure(calls, budget, *, in_flight=None):
        def seconds(name):
            slots = int(name.partition("forward_slots=")[2] or 4)
            return {2: 4.0, 3: 2.0, 4: 3.0, 6: 2.5}[slots]

        return {
            name: timing.Samples(seconds(name) * timing.np.ones(4), timing.np.zeros(4))
            for name in calls
        }

    monkeypatch.setattr(tuning, "kernel_of", kernel_of)
    monkeypatch.setattr(timing, "measure", measure)
    monkeypatch.setattr(platform, "backends", lambda: (GPU,))
    return tuning.Sizes(
        kernels=(KERNEL,),
        shape=(1, 20, 8, 16),
        values={"mosaic_gpu": {"forward_slots": (1, 2, 3, 5, 6)}},
        budget=timing.Budget(0, 1, 1),
        sweeps=1,
    )


def test_the_fastest_that_computes_the_same_stays(sizes):
    (step,) = tuning.run(sizes, Session({"measurements": []}))
    assert step["best"]["forward_slots"] == 3
    assert step["left_out"] == {
        "forward_slots=1": "forward_slots=1: must be at least 2",
        "forward_slots=5": "differs from default by 5.0e-01",
    }
    assert set(step["contestants"]) == {"default", *(f"forward_slots={n}" for n in (2, 3, 6))}


def test_a_later_run_starts_from_what_was_found(sizes):
    (step,) = tuning.run(sizes, Session({"measurements": []}))
    record = {"measurements": [step]}
    assert list(tuning.run(sizes, Session(record))) == []
    again = tuning.step(GPU, KERNEL, "forward_slots", sizes, Session(record))
    assert again["configs"]["current"] == step["best"]


def test_out_of_time_is_on_record(sizes):
    (item,) = tuning.run(sizes, Session({"measurements": []}, seconds=-1))
    assert item["case"] == "mosaic_gpu, plain/window16: forward_slots, sweep 1"
    assert "run the command again" in item["left_out"]


def test_the_table_can_be_pasted(sizes, monkeypatch):
    config = dict(heads=16, chunk=128, forward_slots=3, backward_slots=2, line=64)
    slower = {**config, "forward_slots": 4}
    step = {
        "backend": "mosaic_gpu",
        "kernel": KERNEL.name,
        "configs": {"default": slower},
        "best": config,
    }
    text = tuning.table({"measurements": [step]}, tuning.FULL)
    names = {"TuningConfig": TuningConfig}
    exec(text, names)
    ((key, found),) = names["MEASURED"].items()
    assert found == TuningConfig(**config)
    # And then it is the default of the kernel that it was measured for, on problems that fill
    # the chip.
    monkeypatch.setattr(defaults, "MEASURED", names["MEASURED"])
    halo, forward_bytes, backward_bytes = key
    stage = {"halo": halo, "forward_bytes": forward_bytes, "backward_bytes": backward_bytes}
    chip = {"multiprocessors": 132, "narrowest": 8}
    assert default_config(batch=8, time=8192, heads=128, **chip, **stage) == found
    assert default_config(batch=1, time=200, heads=128, **chip, **stage) != found
    assert default_config(batch=8, time=8192, heads=8, **chip, **stage) != found
    stage["forward_bytes"] += 2
    assert default_config(batch=8, time=8192, heads=128, **chip, **stage) != found
    shape = (8, 8192, 128, 16)
    a, v = jax.eval_shape(lambda: tuning.draw(KERNEL, shape)[0])
    problem = tuning.mosaic_gpu.default_problem(a, v, None, block_size=16, lookback=1)
    assert problem.config == found


def test_defaults_that_are_the_fastest_need_no_table():
    config = vars(TuningConfig())
    step = {
        "backend": "mosaic_gpu",
        "kernel": KERNEL.name,
        "configs": {"default": config},
        "best": config,
    }
    assert tuning.table({"measurements": [step]}) is None


def test_the_tpu_default_is_that_of_the_layer():
    step = {
        "backend": "mosaic_tpu",
        "kernel": "gated/window16",
        "configs": {"default": {"tile": 256, "rows": 32, "features": 32}},
        "best": {"tile": 512, "rows": 32, "features": 32},
    }
    *_, tile, rows, features = tuning.table({"measurements": [step]}).splitlines()
    assert (tile, rows, features) == (
        "    tile: int = 512",
        "    rows: int = 32",
        "    features: int = 32",
    )
