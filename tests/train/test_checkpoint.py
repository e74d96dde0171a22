"""Checkpoints hold what was there when they were begun, whole, and go onto any mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from swr_jax.data import DataConfig, make_dataset
from swr_jax.train import checkpoint
from swr_jax.train.checkpoint import Checkpointer, load_model
from swr_jax.train.config import MeshConfig, TrainConfig, to_dict
from swr_jax.train.sharding import make_mesh
from swr_jax.train.state import Blueprint, TrainState, init_state, make_blueprint


def as_numpy(tree) -> list[np.ndarray]:
    def convert(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.array(jax.random.key_data(x) if is_key else x)

    return [convert(x) for x in jax.tree.leaves(tree)]


def assert_equal(tree, expected: list[np.ndarray]) -> None:
    for a, b in zip(as_numpy(tree), expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def blueprint(config: TrainConfig) -> Blueprint:
    return make_blueprint(config, make_mesh(MeshConfig(data=1, fsdp=4, tensor=2)))


@pytest.fixture(scope="module")
def state(config: TrainConfig, blueprint: Blueprint) -> TrainState:
    return init_state(config, blueprint)


def test_what_is_saved_is_not_touched_by_the_updates_that_follow(config, tmp_path):
    """Updates write over donated arrays while the checkpoint is still being written."""
    wide = dataclasses.replace(config, model=dataclasses.replace(config.model, features=256))
    blueprint = make_blueprint(wide, make_mesh(MeshConfig()))
    state = init_state(wide, blueprint)

    def grow(x):
        return x * 1.5 + 1 if jnp.issubdtype(x.dtype, jnp.floating) else x

    shardings = jax.tree.map(lambda x: x.sharding, blueprint.abstract)
    update = jax.jit(
        lambda state: jax.tree.map(grow, state), donate_argnums=0, out_shardings=shardings
    )
    state = update(state)
    batches = iter(make_dataset(config.data))
    expected = {}
    with Checkpointer(tmp_path, keep=3) as checkpoints:
        for step in (1, 2, 3):
            expected[step] = as_numpy(state)
            checkpoints.save(step, state, batches, wide)
            for _ in range(5):
                state = update(state)
        checkpoints.wait()
        for step in (1, 2, 3):
            restored = checkpoints.restore(step, blueprint.abstract, batches, wide)
            assert_equal(restored, expected[step])


def test_a_checkpoint_goes_onto_another_mesh(config, state, tmp_path):
    restored_on = make_blueprint(config, make_mesh(MeshConfig(data=4, fsdp=2)))
    batches = iter(make_dataset(config.data))
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, batches, config)
        checkpoints.wait()
        restored = checkpoints.restore(1, restored_on.abstract, batches, config)
    assert_equal(restored, as_numpy(state))
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(
        lambda x: x.sharding, restored_on.abstract
    )
    model, loaded_config, step = load_model(tmp_path)
    assert_equal(nnx.to_pure_dict(nnx.state(model)), as_numpy(state.params))
    assert (loaded_config, step) == (config, 1)


def test_the_data_go_on_where_they_were(config, blueprint, state, tmp_path):
    batches = iter(make_dataset(config.data))
    for _ in range(7):
        next(batches)
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        checkpoints.save(7, state, batches, config)
        expected = [next(batches) for _ in range(20)]
        checkpoints.wait()
        fresh = iter(make_dataset(config.data))
        checkpoints.restore(7, blueprint.abstract, fresh, config)
    for batch in expected:
        again = next(fresh)
        assert all(np.array_equal(batch[name], again[name]) for name in batch)


def test_a_checkpoint_cut_off_while_written_is_passed_over(config, state, tmp_path):
    batches = iter(make_dataset(config.data))
    with Checkpointer(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, state, batches, config)
    cut_off = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    cut_off.mkdir()
    (cut_off / "params").mkdir()
    assert load_model(tmp_path)[2] == 1
    with Checkpointer(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step() == 1


def test_loading_from_nowhere_says_what_to_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent does not exist: .*--workdir"):
        load_model(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"holds no finished checkpoint: .*--workdir"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("model", {"features": 32}, r"model.features was 16, is now 32"),
        ("data", {"sequence_length": 64}, r"data.sequence_length was 32, is now 64"),
    ],
)
def test_another_configuration_is_refused_with_what_changed(
    config, blueprint, state, tmp_path, part, change, message
):
    other = dataclasses.replace(
        config, **{part: dataclasses.replace(getattr(config, part), **change)}
    )
    batches = iter(make_dataset(config.data))
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, batches, config)
        checkpoints.wait()
        with pytest.raises(ValueError, match=message + r".*new --workdir"):
            checkpoints.restore(1, blueprint.abstract, batches, other)


def test_what_changes_no_result_may_change(config, blueprint, state, tmp_path):
    other = dataclasses.replace(
        config,
        steps=99,
        model=dataclasses.replace(config.model, remat="full"),
        data=dataclasses.replace(config.data, read_threads=1),
    )
    batches = iter(make_dataset(config.data))
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, batches, config)
        checkpoints.wait()
        assert_equal(checkpoints.restore(1, blueprint.abstract, batches, other), as_numpy(state))


def test_options_that_came_later_had_their_default(config, blueprint, state, tmp_path, monkeypatch):
    """A checkpoint of an older version lacks them, and is continued all the same."""

    def older(config: TrainConfig) -> dict:
        saved = to_dict(config)
        del saved["model"]["mlstm"], saved["data"]["shuffle_tokens"]
        return saved

    batches = iter(make_dataset(config.data))
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "to_dict", older)
            checkpoints.save(1, state, batches, config)
            checkpoints.wait()
        default = dataclasses.replace(
            config, data=dataclasses.replace(config.data, shuffle_tokens=DataConfig.shuffle_tokens)
        )
        restored = checkpoints.restore(1, blueprint.abstract, batches, default)
        assert_equal(restored, as_numpy(state))
