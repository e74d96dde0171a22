"""Suite `train`: models of equal size, updates that are the trainer's, nothing timed unchecked."""

import dataclasses
import json

import jax
import pytest

from swr_jax.benchmark import models, plots, timing, trainer, updates
from swr_jax.benchmark.oracle import OracleError
from swr_jax.benchmark.records import Session


def test_models_have_equal_size():
    for sizes in (updates.FULL, updates.TINY):
        counts = [models.parameters(config) for config in updates.make_configs(sizes).values()]
        assert max(counts) < 1.02 * min(counts)


def test_each_call_goes_on_from_the_last():
    config = updates.make_configs(updates.TINY)["phalanx_hybrid"]
    update = updates.Update(config, 2, 32)
    losses = [float(jax.device_get(update()["loss"])) for _ in range(30)]
    assert losses[-1] < losses[0] - 0.05


def test_a_model_whose_gradient_differs_is_not_timed(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("timed although a check is red")

    norms = iter([1.0, 1.01])

    class Wrong:
        def __init__(self, *_):
            self.norm = next(norms)

        def __call__(self):
            return {"loss": 5.0, "grad_norm": self.norm}

    monkeypatch.setattr(updates, "Update", Wrong)
    monkeypatch.setattr(timing, "measure", refuse)
    with pytest.raises(OracleError, match=r"phalanx_hybrid: grad_norm of an update is 1.0, 1.01"):
        list(updates.run(updates.TINY, Session({"measurements": []})))


@pytest.mark.slow
def test_what_is_measured_is_written_and_drawn(tmp_path):
    before = Session({"measurements": [{"case": "T 32"}]})
    assert [m["case"] for m in updates.run(updates.TINY, before)] == ["T 64"]  # goes on
    once = timing.Budget(seconds=0, min_rounds=1, max_rounds=1)
    sizes = dataclasses.replace(updates.TINY, budget=once)
    rows = list(updates.run(sizes, Session({"measurements": []})))
    assert [(m["tokens"], m["rows"]) for m in rows] == [(32, 2), (64, 1)]
    for m in rows:
        assert set(m["contestants"]) == set(models.PATTERNS)
        for found in m["contestants"].values():
            rate = found["tokens_per_second"]["median"]
            seconds = found["milliseconds"]["median"] / 1e3
            assert rate == pytest.approx(64 / seconds)
    record = {
        "suite": "train",
        "section": "models",
        "measurements": json.loads(json.dumps(rows)),
        "protocol": {"shapes": "small"},
        "environment": {"device": "cpu", "cores": 1, "jax": "0", "commit": "0"},
    }
    picture = plots.draw(record, tmp_path / "picture.png")
    assert picture.stat().st_size > 10_000


def test_targets_are_judged_where_they_were_measured():
    def measurement(tokens, speedup):
        found = {"speedup": {"transformer++": {"median": speedup}}}
        return {"tokens": tokens, "contestants": {"phalanx_hybrid": found}}

    judged = updates.targets([measurement(2048, 0.5), measurement(4096, 1.2)])
    assert [(t["required"], t["measured"], t["met"]) for t in judged] == [(">= 1.1", 1.2, True)]
    (judged,) = updates.targets([measurement(32768, 1.3)])
    assert not judged["met"]


@pytest.mark.slow
def test_the_loop_is_compared_with_its_updates(one_device):
    (found,) = trainer.run(trainer.TINY, Session({"measurements": []}))
    seconds = {name: spread["median"] for name, spread in found["seconds"].items()}
    overhead = found["overhead"]["median"]
    assert overhead == pytest.approx(seconds["loop"] / seconds["update"] - 1)
    assert overhead > found["reports"]["median"] + found["checkpoints"]["median"] > 0


def test_three_per_cent_of_overhead_are_allowed():
    def judged(overhead):
        spread = dict.fromkeys(("median", "lower", "upper"), overhead)
        (target,) = trainer.targets([{"overhead": spread}])
        return target["met"]

    assert judged(0.029)
    assert not judged(0.03)
