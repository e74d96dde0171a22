"""Configurations: to dictionaries and back, and the errors of what does not fit."""

import dataclasses
import json

import jax
import pytest

from swr_jax.train.config import (
    MeshConfig,
    TrainConfig,
    WindowScheduleConfig,
    from_dict,
    make_train_config,
    to_dict,
)
from swr_jax.train.sharding import check_batch, make_mesh


def test_json_and_back_is_the_same_configuration(config):
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, dtype="bfloat16", num_kv_heads=1),
        window_schedule=WindowScheduleConfig(
            option="phalanx.block_size", sizes=[4, 16], probabilities=[0.75, 0.25]
        ),
    )
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_vocabulary_is_the_tokenizers_unless_set():
    model = {"features": 16, "depth": 2, "vocab_size": None}
    assert make_train_config({"model": model, "data": {}}).model.vocab_size == 259
    model = model | {"vocab_size": 300}
    assert make_train_config({"model": model, "data": {}}).model.vocab_size == 300


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stpes": 3}, r"config has no option 'stpes'; .*steps"),
        ({"model": {"features": 16, "depth": 2, "heads": 3}}, r"config.model has no .*'heads'"),
        ({"model": {"depth": 2}}, r"config.model.features is not set"),
        ({"steps": 0}, r"steps must be >= 1, got 0"),
        ({"steps": "many"}, r"config.steps must be int, got 'many'"),
        ({"steps": True}, r"config.steps must be int, got True"),
        ({"optimizer": {"learning_rate": -1.0}}, r"optimizer.learning_rate must be > 0, got -1.0"),
        ({"optimizer": {"clip_norm": 0.0}}, r"optimizer.clip_norm must be > 0"),
    ],
)
def test_errors_name_option_value_and_rule(change, message):
    values = {"model": {"features": 16, "depth": 2}, "data": {}}
    with pytest.raises(ValueError, match=message):
        make_train_config(values | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"option": "depth"}, r"option must be one of window, phalanx.block_size, got 'depth'"),
        ({"sizes": (0, 64)}, r"sizes must be different integers >= 1, .*, got \(0, 64\)"),
        ({"sizes": (64, 64)}, r"sizes must be different integers >= 1, .*, got \(64, 64\)"),
        ({"sizes": (4.5, 64)}, r"sizes must be different integers >= 1, .*, got \(4.5, 64\)"),
        ({"probabilities": (1.0,)}, r"probabilities must be as many as .*sizes=\(8, 64\), got"),
        ({"sizes": ()}, r"probabilities must be as many as .*sizes=\(\), got \(0.5, 0.5\)"),
        ({"probabilities": (0.5, 0.6)}, r"probabilities must be numbers >= 0 that sum to 1, got"),
        ({"probabilities": (-0.5, 1.5)}, r"probabilities must be numbers >= 0 that sum to 1, got"),
        ({"probabilities": ("a", "b")}, r"probabilities must be numbers >= 0 that sum to 1, got"),
        ({"anneal": "cosine"}, r"anneal must be switch or linear, got 'cosine'"),
        ({"anneal_fraction": 10.0}, r"anneal_fraction must be between 0 and 1, got 10.0"),
        ({"sizes": (8, 32)}, r"model.window must be 32, the longest of .*=\(8, 32\).*, got 64"),
        (
            {"option": "phalanx.block_size", "sizes": (8, 16)},
            r"model.pattern must be one with 'phalanx', the mixer of .*, got \('swa',\)",
        ),
    ],
)
def test_errors_of_a_window_schedule_name_option_value_and_rule(change, message):
    model = {"features": 16, "depth": 2, "pattern": ["swa"], "window": 64}
    schedule = {"sizes": [8, 64], "probabilities": [0.5, 0.5]}
    values = {"model": model, "data": {}, "window_schedule": schedule}
    assert make_train_config(values).window_schedule.sizes == (8, 64)
    with pytest.raises(ValueError, match=message):
        make_train_config(values | {"window_schedule": schedule | change})


def test_block_size_of_a_schedule_must_be_the_models():
    schedule = {"option": "phalanx.block_size", "sizes": [4, 32], "probabilities": [0.5, 0.5]}
    model = {"features": 16, "depth": 2, "pattern": ["phalanx"]}
    with pytest.raises(ValueError, match=r"model.phalanx.block_size must be 32, .*, got 16"):
        make_train_config({"model": model, "data": {}, "window_schedule": schedule})


def test_mesh_takes_what_is_left():
    assert make_mesh(MeshConfig(data=-1, tensor=2)).shape == {
        "data": jax.device_count() // 2,
        "fsdp": 1,
        "tensor": 2,
        "sequence": 1,
    }


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, r"mesh \(data=3, fsdp=1, tensor=1, sequence=1\) does not fit 8 device"),
        ({"data": -1, "tensor": 3}, r"does not fit 8 device"),
        ({"data": -1, "fsdp": -1}, r"at most one mesh axis may be -1, got data and fsdp"),
        ({"data": 0}, r"mesh.data must be >= 1 or -1, got 0"),
    ],
)
def test_mesh_that_does_not_fit_the_devices(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(MeshConfig(**sizes))


def test_batch_that_does_not_fit_the_mesh():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, sequence=2))
    check_batch(mesh, batch_size=8, sequence_length=6, accumulation=2)
    with pytest.raises(ValueError, match=r"data.batch_size=8 must be a multiple of .* = 12"):
        check_batch(mesh, batch_size=8, sequence_length=6, accumulation=3)
    with pytest.raises(ValueError, match=r"data.sequence_length=7 .* mesh.sequence=2"):
        check_batch(mesh, batch_size=8, sequence_length=7, accumulation=1)
