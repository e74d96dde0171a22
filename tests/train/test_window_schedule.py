"""Stochastic windows: what is drawn and when, and that an update at a draw is that model's."""

import dataclasses
import json
import logging
import signal
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from swr_jax.data import make_dataset, open_corpus
from swr_jax.nn.language_model import LanguageModel, LanguageModelConfig
from swr_jax.train.checkpoint import load_model
from swr_jax.train.config import MeshConfig, TrainConfig, WindowScheduleConfig
from swr_jax.train.evaluation import validation_batches
from swr_jax.train.loop import Summary, train
from swr_jax.train.sharding import batch_sharding, make_mesh, put_batch
from swr_jax.train.state import init_state, make_blueprint
from swr_jax.train.step import make_train_step
from swr_jax.train.window_schedule import drawn_models, drawn_size, size_probabilities


def scheduled(config: TrainConfig, *, steps: int = 24, **schedule) -> TrainConfig:
    """A single block of windowed attention; its window is the longest of the sizes."""
    window = max(schedule["sizes"])
    model = dataclasses.replace(config.model, features=8, depth=1, pattern=("swa",), window=window)
    return dataclasses.replace(
        config, model=model, steps=steps, window_schedule=WindowScheduleConfig(**schedule)
    )


def draws(config: TrainConfig) -> list[int]:
    return [drawn_size(config, step) for step in range(1, config.steps + 1)]


def chi_square(counts: Counter, expected: dict) -> float:
    assert counts.keys() <= expected.keys()
    return sum((counts[key] - n) ** 2 / n for key, n in expected.items())


def test_without_sizes_nothing_is_drawn(config):
    assert drawn_size(config, 1) is None
    assert drawn_models(config) == {None: config.model}


@pytest.mark.parametrize("seed", [0, 1, -7])
def test_sizes_are_as_frequent_as_their_probabilities_and_independent(config, seed):
    shares = {16: 0.2, 2: 0.5, 4: 0.3}
    config = scheduled(
        config,
        steps=20_000,
        sizes=tuple(shares),
        probabilities=tuple(shares.values()),
        anneal_fraction=0.0,
    )
    sizes = draws(dataclasses.replace(config, seed=seed))
    # The bounds are passed by one seed in 10,000 (2 and 8 degrees of freedom).
    assert chi_square(Counter(sizes), {s: 20_000 * p for s, p in shares.items()}) < 18.4
    pairs = {(a, b): 10_000 * p * q for a, p in shares.items() for b, q in shares.items()}
    assert chi_square(Counter(zip(sizes[::2], sizes[1::2], strict=True)), pairs) < 31.8


def test_a_draw_depends_on_seed_and_step_alone(config):
    config = scheduled(config, steps=200, sizes=(4, 16), probabilities=(0.5, 0.5))
    data = dataclasses.replace(config.data, seed=5, batch_size=16)
    model = dataclasses.replace(config.model, features=32)
    # What has been drawn already must stay when a resumed run is given more steps.
    other = dataclasses.replace(config, data=data, model=model, steps=1000)
    assert draws(other)[:180] == draws(config)[:180]
    assert draws(dataclasses.replace(config, seed=1))[:180] != draws(config)[:180]


def test_draws_are_those_of_earlier_versions(config):
    """Runs resume across versions of this library and of others: SHA-256 of "window 0 1", ..."""
    config = scheduled(config, steps=100, sizes=(4, 16), probabilities=(0.75, 0.25))
    assert draws(config)[:16] == [16, 4, 4, 4, 16, 4, 4, 4, 4, 4, 16, 4, 4, 4, 16, 4]


@pytest.mark.parametrize(
    ("steps", "fraction", "short"),
    [(30, 0.1, 27), (25, 0.1, 22), (3, 0.1, 2), (30, 0.0, 30), (30, 1.0, 0)],
)
def test_the_switch_comes_at_its_step(config, steps, fraction, short):
    config = scheduled(
        config, steps=steps, sizes=(16, 4), probabilities=(0.0, 1.0), anneal_fraction=fraction
    )
    assert draws(config) == [4] * short + [16] * (steps - short)


def test_gradual_annealing_is_linear_up_to_certainty(config):
    config = scheduled(
        config,
        steps=100,
        sizes=(2, 16, 4),
        probabilities=(0.6, 0.2, 0.2),
        anneal="linear",
        anneal_fraction=0.5,
    )
    longest = {1: 0.2, 50: 0.2, 51: 0.216, 75: 0.6, 99: 0.984, 100: 1.0}
    for step, expected in longest.items():
        shortest, drawn, middle = size_probabilities(config, step)
        assert drawn == pytest.approx(expected)
        assert shortest + drawn + middle == pytest.approx(1)
        assert shortest == pytest.approx(3 * middle)  # the others keep their proportion

    for step in (75, 100):
        of_seeds = [drawn_size(dataclasses.replace(config, seed=s), step) for s in range(4000)]
        share = of_seeds.count(16) / len(of_seeds)
        assert share == pytest.approx(longest[step], abs=4 * (0.6 * 0.4 / 4000) ** 0.5)
    assert set(of_seeds) == {16}


def mean_loss(model: LanguageModel, batch: dict[str, np.ndarray]) -> float:
    """Mean nats per target, in float64, of a model called by itself."""
    logits = model(batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"])
    logits = np.asarray(logits, np.float64)
    log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    picked = np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    weights = batch["loss_weights"]
    return float((weights * (log_z - picked)).sum() / weights.sum())


def model_with(config: LanguageModelConfig, params) -> LanguageModel:
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    nnx.update(model, nnx.restore_int_paths(params))
    return model


@pytest.mark.parametrize(
    ("option", "mixer"), [("window", "swa"), ("phalanx.block_size", "phalanx")]
)
def test_an_update_at_a_draw_is_that_of_a_model_built_with_it(config, option, mixer):
    model = dataclasses.replace(config.model, depth=1, pattern=(mixer,), window=16)
    schedule = WindowScheduleConfig(option=option, sizes=(2, 16), probabilities=(0.5, 0.5))
    drawing = dataclasses.replace(config, model=model, window_schedule=schedule)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    blueprint = make_blueprint(drawing, mesh)
    state = init_state(drawing, blueprint)
    batch = next(iter(make_dataset(drawing.data)))
    losses = {}
    for size, drawn in drawn_models(drawing).items():
        if option == "window":
            built = dataclasses.replace(model, window=size)
        else:
            phalanx = dataclasses.replace(model.phalanx, block_size=size)
            built = dataclasses.replace(model, phalanx=phalanx)
        assert drawn == built
        # Equal definitions, and no difference in the parameters: the same program.
        without_draws = make_blueprint(dataclasses.replace(config, model=built), mesh)
        assert blueprint.of_model(drawn) == dataclasses.replace(
            without_draws, optimizer=blueprint.optimizer, schedule=blueprint.schedule
        )
        expected = mean_loss(model_with(built, state.params), batch)
        train_step = make_train_step(blueprint.of_model(drawn), mesh)
        _, metrics = train_step(
            jax.tree.map(jnp.copy, state), put_batch(batch, batch_sharding(mesh))
        )
        losses[size] = float(metrics["loss"])
        assert losses[size] == pytest.approx(expected, rel=1e-6)
    assert abs(losses[2] - losses[16]) > 2e-5 * losses[16]
    assert blueprint.graphdef == blueprint.of_model(drawn_models(drawing)[16]).graphdef
    assert blueprint.graphdef != blueprint.of_model(drawn_models(drawing)[2]).graphdef


def lines(workdir: Path, split: str) -> list[dict]:
    read = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in read if line["split"] == split]


@pytest.fixture(scope="module")
def drawing(config: TrainConfig) -> TrainConfig:
    config = scheduled(config, sizes=(2, 16), probabilities=(0.5, 0.5), anneal_fraction=0.2)
    assert set(draws(config)[:12]) == set(draws(config)[12:19]) == {2, 16}
    return dataclasses.replace(config, eval_every=8)


@pytest.fixture(scope="module")
def finished_run(drawing, tmp_path_factory) -> tuple[Path, Summary, list[str]]:
    """A run, and what JAX said of its compilations."""
    workdir = tmp_path_factory.mktemp("run")
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("jax").addHandler(handler)
    try:
        with jax.log_compiles():
            summary = train(drawing, workdir)
    finally:
        logging.getLogger("jax").removeHandler(handler)
    return workdir, summary, said


def test_each_window_is_compiled_once(finished_run):
    *_, said = finished_run
    compiled = Counter(line.split()[4] for line in said if line.startswith("Finished XLA compil"))
    assert compiled["jit(train_step)"] == 2
    assert compiled["jit(eval_step)"] == 1


def test_every_update_reports_its_draw(drawing, finished_run):
    workdir, *_ = finished_run
    assert [line["window"] for line in lines(workdir, "train")] == draws(drawing)
    assert draws(drawing)[-5:] == [16] * 5
    assert all("window" not in line for line in lines(workdir, "validation"))


def test_evaluation_and_checkpoints_are_of_the_longest_window(drawing, finished_run):
    workdir, summary, _ = finished_run
    model, config, _ = load_model(workdir)
    assert model.config.window == config.model.window == 16

    batches = validation_batches(drawing.data, open_corpus(drawing.data), count=4)
    whole = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    assert summary.validation["loss"] == pytest.approx(mean_loss(model, whole), rel=1e-5)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    short = model_with(dataclasses.replace(config.model, window=2), params)
    assert abs(mean_loss(short, whole) - summary.validation["loss"]) > 1e-3


def test_stopped_and_resumed_it_draws_the_same_and_is_the_same_run_to_the_bit(
    drawing, finished_run, tmp_path, tamper_with_training_batches
):
    def stop_at_11(number, batch):
        if number == 11:
            signal.raise_signal(signal.SIGTERM)
        return batch

    tamper_with_training_batches(stop_at_11)
    assert train(drawing, tmp_path).step == 11
    tamper_with_training_batches(lambda _, batch: batch)
    assert train(drawing, tmp_path).step == 24

    straight, *_ = finished_run
    for split in ("train", "validation"):
        numbers = [
            [(x["step"], x["loss"], x.get("grad_norm"), x.get("window")) for x in lines(run, split)]
            for run in (tmp_path, straight)
        ]
        assert numbers[0] == numbers[1]
