"""Distillation: losses against NumPy, what is updated, stopping and resuming to the bit."""

import dataclasses
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from jax.sharding import Mesh
from training_cases import random_batch

from swr_jax.nn import LanguageModelConfig, PhalanxConfig
from swr_jax.train.checkpoint import load_model
from swr_jax.train.config import DistillConfig, MeshConfig, TrainConfig
from swr_jax.train.distill import Distillation, divergence, hidden_distance, logits_and_hidden
from swr_jax.train.loop import train
from swr_jax.train.metrics import read_metrics
from swr_jax.train.sharding import batch_sharding, make_mesh, put_batch
from swr_jax.train.state import abstract_model, abstract_params, init_state, make_blueprint
from swr_jax.train.step import gradient_and_sums
from swr_jax.train.teacher import new_layers, new_parameters


def relative(found, exact) -> float:
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-6), (jnp.bfloat16, 4e-3)])
def test_distance_of_hidden_states_and_its_gradient_are_those_of_float64_numpy(dtype, bound):
    rng = np.random.default_rng(0)
    weights = rng.choice([0.0, 0.5, 1.0], (2, 5))
    student, teacher = (
        {layer: jnp.asarray(scale * rng.normal(size=(2, 5, 8)), dtype) for layer in (0, 3)}
        for scale in (1.0, 2.0)
    )
    value, gradient = jax.value_and_grad(hidden_distance)(
        student, teacher, jnp.asarray(weights, jnp.float32)
    )
    total = 0.0
    for layer in (0, 3):
        ours, theirs = (np.asarray(x[layer], np.float64) for x in (student, teacher))
        slope = np.zeros_like(ours)
        for b in range(2):
            for t in range(5):
                size = sum(x * x for x in theirs[b, t])
                total += weights[b, t] * sum((ours[b, t] - theirs[b, t]) ** 2) / size / 2
                slope[b, t] = weights[b, t] * (ours[b, t] - theirs[b, t]) / size
        assert relative(np.asarray(gradient[layer], np.float64), slope) <= bound
    assert float(value) == pytest.approx(total, rel=1e-6)


def test_a_teacher_that_says_nothing_is_no_division_by_zero():
    zeros, ones = {0: jnp.zeros((1, 1, 4))}, {0: jnp.ones((1, 1, 4))}
    weights = jnp.zeros((1, 1))
    assert float(hidden_distance(ones, zeros, weights)) == 0


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergence_and_its_gradient_are_those_of_float64_numpy(temperature):
    rng = np.random.default_rng(1)
    weights = rng.choice([0.0, 0.5, 1.0], (2, 5))
    student, teacher = (5 * rng.normal(size=(2, 5, 11)) for _ in range(2))
    student, teacher = np.float32(student), np.float32(teacher)
    value, gradient = jax.value_and_grad(divergence)(
        student, teacher, jnp.asarray(weights, jnp.float32), temperature=temperature
    )

    def softmax(x):
        x = np.exp(np.asarray(x, np.float64) / temperature)
        return x / x.sum(-1, keepdims=True)

    ours, theirs = softmax(student), softmax(teacher)
    nats = (theirs * (np.log(theirs) - np.log(ours))).sum(-1)
    assert float(value) == pytest.approx(temperature**2 * (weights * nats).sum(), rel=1e-6)
    slope = temperature * weights[..., None] * (ours - theirs)
    assert relative(np.asarray(gradient, np.float64), slope) <= 1e-6


def model_config(pattern: tuple[str, ...], **changes) -> LanguageModelConfig:
    options = {
        "vocab_size": 264,
        "features": 16,
        "depth": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "window": 12,
        "mlp_features": 32,
        "phalanx": PhalanxConfig(head_dim=4, block_size=4),
    }
    return LanguageModelConfig(pattern=pattern, **(options | changes))


TEACHER = model_config(("swa", "attention"))
STUDENT = model_config(("phalanx", "attention"))


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("layers", [(0, 2), (1,), (0, 1, 2, 3)])
def test_recorded_outputs_are_those_of_the_blocks_one_by_one(layers, remat):
    definition, state = abstract_model(dataclasses.replace(STUDENT, remat=remat))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), state)
    batch = random_batch(2, 16)
    options = {name: batch[name] for name in ("positions", "segment_ids")}

    @jax.jit
    def recorded(state):
        return logits_and_hidden(nnx.merge(definition, state), layers, batch["tokens"], **options)

    @jax.jit
    def one_by_one(state):
        model = nnx.merge(definition, state)
        x, found = jnp.take(model.embedding[...], batch["tokens"], axis=0), {}
        for layer in range(4):
            one, stacked = nnx.split(model.periods[layer % 2])
            block = nnx.merge(one, jax.tree.map(lambda p, n=layer // 2: p[n], stacked))
            x, _ = block(x, **options, state=None)
            found[layer] = x
        return model(batch["tokens"], **options), found

    logits, outputs = recorded(state)
    exact_logits, exact = one_by_one(state)
    assert set(outputs) == set(layers)
    for layer in layers:
        assert relative(outputs[layer], exact[layer]) <= 1e-6
    assert relative(logits, exact_logits) <= 1e-6


def gradient_on(mesh: Mesh, config: TrainConfig, *, train="new", accumulation=1, **weights):
    """Gradient and sums at parameters that do not depend on the mesh."""
    config = dataclasses.replace(config, model=STUDENT)
    new = new_parameters(STUDENT, (0, 2)) if train == "new" else None
    blueprint = make_blueprint(config, mesh, new=new)
    distillation = Distillation(
        config=DistillConfig(**weights),
        layers=new_layers(TEACHER, STUDENT),
        graphdef=abstract_model(TEACHER)[0],
        abstract=abstract_params(TEACHER, mesh),
    )
    params = init_state(config, blueprint).params
    of_teacher = dataclasses.replace(config, model=TEACHER, seed=5)
    teacher = init_state(of_teacher, make_blueprint(of_teacher, mesh)).params
    batch = put_batch(random_batch(8, 32), batch_sharding(mesh))
    run = jax.jit(
        lambda params, teacher, batch: gradient_and_sums(
            blueprint,
            params,
            batch,
            mesh=mesh,
            accumulation=accumulation,
            distillation=distillation,
            teacher=teacher,
        )
    )
    gradient, sums = run(params, teacher, batch)
    gradient = traverse_util.flatten_dict(jax.device_get(gradient))
    return gradient, {name: float(value) for name, value in sums.items()}


def one_device() -> Mesh:
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


WEIGHTS = {"hidden": 2.0, "logits": 0.5, "cross_entropy": 0.25, "temperature": 2.0}


@pytest.fixture(scope="module")
def distilled(config):
    """Gradient of the new parameters, and sums, on one device."""
    return gradient_on(one_device(), config, **WEIGHTS)


def test_the_gradient_is_the_part_of_the_whole_that_is_trained(config, distilled):
    gradient, sums = distilled
    whole, other_sums = gradient_on(one_device(), config, train="all", **WEIGHTS)
    assert set(gradient) == {path for path in whole if path[:3] == ("periods", 0, "mixer")}
    for path, value in gradient.items():
        assert relative(value, whole[path]) <= 1e-5, path
    assert sums == pytest.approx(other_sums, rel=1e-6)


def test_losses_add_up_by_their_weights(config, distilled):
    parts = [
        gradient_on(one_device(), config, **(WEIGHTS | dict.fromkeys(others, 0.0)))
        for others in (
            ("logits", "cross_entropy"),
            ("hidden", "cross_entropy"),
            ("hidden", "logits"),
        )
    ]
    gradient, sums = distilled
    for path, value in gradient.items():
        assert relative(value, sum(part[path] for part, _ in parts)) <= 1e-5, path
    assert ["hidden_loss" in found for _, found in parts] == [True, False, False]
    assert ["logits_loss" in found for _, found in parts] == [False, True, False]
    assert sums["hidden_loss"] > 0
    assert sums["logits_loss"] > 0


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 2, "fsdp": 2, "tensor": 2, "accumulation": 2},
        pytest.param({"data": 2, "tensor": 2, "sequence": 2}, marks=pytest.mark.slow),
        pytest.param({"data": 1, "fsdp": 8}, marks=pytest.mark.slow),
    ],
    ids=lambda sizes: " ".join(f"{axis}{size}" for axis, size in sizes.items()),
)
def test_neither_mesh_nor_micro_batches_change_it(config, distilled, sizes):
    sizes = dict(sizes)
    accumulation = sizes.pop("accumulation", 1)
    mesh = make_mesh(MeshConfig(**sizes))
    gradient, sums = gradient_on(mesh, config, accumulation=accumulation, **WEIGHTS)
    exact, exact_sums = distilled
    # The logits' divergence is a small difference of large numbers.
    assert sums == pytest.approx(exact_sums, rel=1e-5, abs=2e-5)
    for path, value in gradient.items():
        assert relative(value, exact[path]) <= 1e-5, path


@pytest.fixture(scope="module")
def teacher_run(config: TrainConfig, tmp_path_factory) -> tuple[TrainConfig, Path]:
    """A short run of the teacher; its configuration and folder."""
    model = dataclasses.replace(TEACHER, features=8, depth=2)
    config = dataclasses.replace(config, model=model, steps=3, eval_batches=1)
    folder = tmp_path_factory.mktemp("teacher")
    train(config, folder)
    return config, folder


@pytest.fixture(scope="module")
def student_config(teacher_run) -> TrainConfig:
    config, folder = teacher_run
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, pattern=STUDENT.pattern),
        steps=12,
        seed=3,
        distill=DistillConfig(teacher=str(folder)),
    )


@pytest.fixture(scope="module")
def student_run(student_config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    train(student_config, folder)
    return folder


def parameters(folder: Path) -> dict[tuple, np.ndarray]:
    state = nnx.to_pure_dict(nnx.state(load_model(folder)[0], nnx.Param))
    return jax.device_get(traverse_util.flatten_dict(state))


def test_only_the_new_mixers_move_and_they_learn(student_run, teacher_run, student_config):
    before, after = parameters(teacher_run[1]), parameters(student_run)
    new = {path for path in after if path[:3] == ("periods", 0, "mixer")}
    assert len(new) == 8
    for path in set(after) - new:
        np.testing.assert_array_equal(after[path], before[path], err_msg=str(path))
    mesh = make_mesh(MeshConfig())
    blueprint = make_blueprint(student_config, mesh, new=new_parameters(student_config.model, (0,)))
    moments = [x for x in jax.tree.leaves(blueprint.abstract.opt_state) if x.ndim]
    assert len(moments) == 2 * len(new)  # and nothing else has any

    lines = [line for line in read_metrics(student_run) if line["split"] == "train"]
    assert len(lines) == 12
    steps = [x["step"] for x in read_metrics(student_run) if x["split"] == "validation"]
    assert steps == [0, 12]  # 0: what the swap alone has done
    for name in ("hidden_loss", "logits_loss"):
        assert lines[-1][name] < 0.9 * lines[0][name]


def test_stopped_and_resumed_it_is_the_same_run_to_the_bit(
    student_run, student_config, tmp_path, tamper_with_training_batches
):
    def stop_at_5(number, batch):
        if number == 5:
            signal.raise_signal(signal.SIGTERM)
        return batch

    tamper_with_training_batches(stop_at_5)
    assert train(student_config, tmp_path).step == 5
    tamper_with_training_batches(lambda _, batch: batch)
    train(student_config, tmp_path)
    exact = parameters(student_run)
    for path, value in parameters(tmp_path).items():
        np.testing.assert_array_equal(value, exact[path], err_msg=str(path))
    names = ("loss", "hidden_loss", "logits_loss")
    histories = [
        [[line[name] for name in names] for line in read_metrics(folder) if "hidden_loss" in line]
        for folder in (tmp_path, student_run)
    ]
    assert histories[0] == histories[1]

    weights = dataclasses.replace(student_config.distill, hidden=2.0)
    with pytest.raises(ValueError, match=r"distill.hidden was 10.0, is now 2.0"):
        train(dataclasses.replace(student_config, distill=weights), tmp_path)


def test_a_teacher_that_has_gone_on_is_refused(student_config, tmp_path):
    distill = dataclasses.replace(student_config.distill, teacher_step=2)
    with pytest.raises(ValueError, match=r"distill.teacher_step=2, but .* is of step 3"):
        train(dataclasses.replace(student_config, distill=distill), tmp_path)


def test_what_is_the_teachers_moves_slower(config):
    new = new_parameters(STUDENT, (0, 2))

    def update(rate: float) -> dict[tuple, np.ndarray]:
        distill = DistillConfig(train="all", kept_rate=rate)
        changed = dataclasses.replace(config, model=STUDENT, distill=distill)
        blueprint = make_blueprint(changed, one_device(), new=new)
        state = init_state(changed, blueprint)
        gradient = jax.tree.map(
            lambda x: jnp.sin(jnp.arange(x.size)).reshape(x.shape), state.params
        )
        moved, _ = blueprint.optimizer.update(gradient, state.opt_state, state.params)
        return jax.device_get(traverse_util.flatten_dict(moved))

    whole, part = update(1.0), update(0.25)
    assert set(new) < set(whole)
    for path, value in whole.items():
        assert np.abs(value).max() > 0
        np.testing.assert_allclose(part[path], value * (1 if path in new else 0.25), rtol=1e-6)


@pytest.mark.slow
def test_without_a_teachers_word_all_parameters_can_be_fine_tuned(student_config, tmp_path):
    distill = dataclasses.replace(student_config.distill, train="all", hidden=0.0, logits=0.0)
    train(dataclasses.replace(student_config, distill=distill, steps=2), tmp_path)
    before, after = parameters(Path(distill.teacher)), parameters(tmp_path)
    for path in set(before) & set(after):
        if before[path].shape == after[path].shape:
            assert not np.array_equal(before[path], after[path]), path


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        (TEACHER, TEACHER, "the teacher's, so there is nothing new"),
        (TEACHER, model_config(("phalanx", "attention"), features=32), r"model.features=32 \(the"),
        (TEACHER, model_config(("swa", "phalanx"), window=8), "model.window=8"),
        (STUDENT, model_config(("phalanx", "mlstm"), phalanx=PhalanxConfig()), "model.phalanx="),
        (STUDENT, TEACHER, "has 'swa' in layer 0, where the teacher has 'phalanx'"),
    ],
)
def test_students_that_no_teacher_fits_are_refused(teacher, student, message):
    with pytest.raises(ValueError, match=message):
        new_layers(teacher, student)


def test_options_of_new_mixers_and_memory_are_the_students_own():
    phalanx = PhalanxConfig(head_dim=8)
    student = dataclasses.replace(STUDENT, phalanx=phalanx, remat="full", dtype="bfloat16")
    assert new_layers(TEACHER, dataclasses.replace(student, window=3)) == (0, 2)
    pattern = ("phalanx", "attention", "swa", "attention")  # here a window is still looked through
    assert new_layers(TEACHER, dataclasses.replace(student, pattern=pattern)) == (0,)
    with pytest.raises(ValueError, match=r"model.window=3"):
        new_layers(TEACHER, dataclasses.replace(student, pattern=pattern, window=3))


def test_new_and_old_of_a_kind_must_not_be_stacked():
    teacher = model_config(("phalanx", "swa"))
    layers = new_layers(teacher, model_config(("phalanx",)))
    assert layers == (1, 3)
    with pytest.raises(ValueError, match=r"write it as \('phalanx', 'phalanx'\)"):
        new_parameters(model_config(("phalanx",)), layers)
    paths = new_parameters(model_config(("phalanx", "phalanx")), layers)
    assert {path[:3] for path in paths} == {("periods", 1, "mixer")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "some"}, "distill.train must be new or all, got 'some'"),
        ({"kept_rate": 0.0}, "distill.kept_rate must be above 0, at most 1, got 0.0"),
        ({"init": "best"}, "distill.init must be one of"),
        ({"hidden": -1.0}, "distill.hidden must be >= 0"),
        ({"temperature": 0.0}, "distill.temperature must be > 0"),
        ({"hidden": 0, "logits": 0, "cross_entropy": 0}, "at least one of them"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig(**options)
