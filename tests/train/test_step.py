"""The update: its loss against NumPy, and what must not change it: micro-batches and meshes."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from training_cases import random_batch

from swr_jax.train.config import MeshConfig, TrainConfig
from swr_jax.train.sharding import batch_sharding, make_mesh, put_batch
from swr_jax.train.state import TrainState, init_state, make_blueprint
from swr_jax.train.step import gradient_and_sums, loss_sums, make_train_step


def single_device_mesh() -> Mesh:
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_loss_sums_are_those_of_float64_numpy(dtype):
    rng = np.random.default_rng(1)
    logits = jnp.asarray(5 * rng.normal(size=(3, 7, 11)), dtype)
    batch = {
        "targets": rng.integers(0, 11, (3, 7)).astype(np.int32),
        "loss_weights": rng.choice([0.0, 0.5, 1.0], (3, 7)).astype(np.float32),
        "target_bytes": rng.integers(0, 4, (3, 7)).astype(np.int32),
    }

    sums = loss_sums(logits, batch)

    exact = np.asarray(logits, np.float64)
    nats = log_z_squared = 0.0
    for b in range(3):
        for t in range(7):
            log_z = math.log(sum(math.exp(x) for x in exact[b, t]))
            weight = float(batch["loss_weights"][b, t])
            nats += weight * (log_z - exact[b, t, batch["targets"][b, t]])
            log_z_squared += weight * log_z**2
    assert float(sums["nats"]) == pytest.approx(nats, rel=1e-6)
    assert float(sums["log_z_squared"]) == pytest.approx(log_z_squared, rel=1e-6)
    assert float(sums["weight"]) == batch["loss_weights"].sum()
    assert int(sums["target_bytes"]) == batch["target_bytes"][batch["loss_weights"] > 0].sum()


def test_accumulated_gradient_is_that_of_the_whole_batch(config):
    mesh = single_device_mesh()
    blueprint = make_blueprint(config, mesh)
    params = init_state(config, blueprint).params
    batch = put_batch(random_batch(8, 32), batch_sharding(mesh))

    def run(accumulation: int):
        return jax.jit(
            lambda params: gradient_and_sums(
                blueprint,
                params,
                batch,
                mesh=mesh,
                accumulation=accumulation,
                z_loss=1e-3,
            )
        )(params)

    gradient, sums = run(1)
    other_gradient, other_sums = run(4)

    assert float(other_sums["nats"]) == pytest.approx(float(sums["nats"]), rel=1e-6)
    assert float(other_sums["weight"]) == float(sums["weight"])
    assert int(other_sums["target_bytes"]) == int(sums["target_bytes"])
    difference = jax.tree.map(lambda a, b: a - b, gradient, other_gradient)
    assert optax.tree.norm(difference) <= 1e-6 * optax.tree.norm(gradient)


def test_z_loss_is_in_the_gradient(config):
    small = dataclasses.replace(config.model, features=8, depth=1, pattern=("swa",))
    config = dataclasses.replace(config, model=small)
    mesh = single_device_mesh()
    blueprint = make_blueprint(config, mesh)
    params = init_state(config, blueprint).params
    batch = put_batch(random_batch(2, 8), batch_sharding(mesh))

    @jax.jit
    def gradient_and_mean(params, z_loss):
        gradient, sums = gradient_and_sums(blueprint, params, batch, mesh=mesh, z_loss=z_loss)
        return gradient, sums["log_z_squared"] / sums["weight"]

    part_of_z_loss = jax.tree.map(
        lambda a, b: a - b, gradient_and_mean(params, 1.0)[0], gradient_and_mean(params, 0.0)[0]
    )
    slope = float(optax.tree.norm(part_of_z_loss))

    def mean_at(distance: float) -> float:
        moved = jax.tree.map(lambda p, d: p + distance / slope * d, params, part_of_z_loss)
        return float(gradient_and_mean(moved, 0.0)[1])

    finite_difference = (mean_at(1e-3) - mean_at(-1e-3)) / 2e-3
    assert slope == pytest.approx(finite_difference, rel=1e-2)


def three_losses(config: TrainConfig, mesh: Mesh) -> tuple[list[float], TrainState, str]:
    """Losses of three updates, the state after them, and the compiled program."""
    blueprint = make_blueprint(config, mesh)
    batches = [put_batch(random_batch(8, 32, seed=seed), batch_sharding(mesh)) for seed in range(3)]
    train_step = make_train_step(blueprint, mesh, accumulation=config.accumulation)
    train_step = train_step.lower(blueprint.abstract, batches[0]).compile()
    state = init_state(config, blueprint)
    losses = []
    for batch in batches:
        state, metrics = train_step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses, state, train_step.as_text()


@pytest.fixture(scope="module")
def single_device_losses(config) -> list[float]:
    return three_losses(config, single_device_mesh())[0]


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 8},
        {"data": 1, "fsdp": 8},
        {"data": 2, "fsdp": 2, "tensor": 2, "accumulation": 2},
        {"data": 2, "tensor": 2, "sequence": 2},
    ],
    ids=lambda sizes: " ".join(f"{axis}{size}" for axis, size in sizes.items()),
)
def test_losses_do_not_depend_on_the_mesh(config, single_device_losses, sizes):
    sizes = dict(sizes)
    config = dataclasses.replace(config, accumulation=sizes.pop("accumulation", 1))
    losses, state, program = three_losses(config, make_mesh(MeshConfig(**sizes)))
    np.testing.assert_allclose(losses, single_device_losses, rtol=1e-5)
    assert losses[2] != losses[0]

    # What is split must really be split, the moments of Adam like their parameters.
    split = sizes.get("fsdp", 1) * sizes.get("tensor", 1)
    embedding = state.params["embedding"]
    assert embedding.addressable_shards[0].data.size == embedding.size // split
    moments = [s for s in jax.tree.leaves(state.opt_state) if s.shape == embedding.shape]
    assert len(moments) == 2
    assert all(moment.sharding == embedding.sharding for moment in moments)

    # No device ever holds more of the activations of the whole batch, [8, 32, ...] or, folded,
    # [256, ...], than an eighth: some features of all tokens, from which those of a parameter's
    # part get their gradient.
    shapes = re.findall(r"f32\[((?:8,32|256),[\d,]*)\]", program)
    eighth = 8 * 32 * config.model.features // 8
    assert [x for x in shapes if math.prod(map(int, x.split(","))) > eighth] == []
