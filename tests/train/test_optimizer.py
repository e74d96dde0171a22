"""What weight decay applies to, and the course of the learning rate."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from swr_jax.nn.language_model import LanguageModel
from swr_jax.train.config import MeshConfig, OptimizerConfig
from swr_jax.train.optimizer import decay_mask, learning_rate_schedule
from swr_jax.train.sharding import logical_axes, make_mesh, param_shardings
from swr_jax.train.state import make_blueprint


def paths(tree) -> dict[str, object]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(entry.key) for entry in path): leaf for path, leaf in leaves}


def test_only_matrices_that_are_no_gates_decay(config):
    blueprint = make_blueprint(config, make_mesh(MeshConfig()))
    params = jax.tree.map(lambda x: jnp.full(x.shape, 2.0, x.dtype), blueprint.abstract.params)
    no_gradient = jax.tree.map(jnp.zeros_like, params)
    updates, _ = blueprint.optimizer.update(no_gradient, blueprint.optimizer.init(params), params)

    decayed = {path for path, update in paths(updates).items() if np.any(update)}
    feed_forward = {f"mlp/{name}/kernel" for name in ("gate", "up", "down")}
    phalanx = {f"mixer/{name}/kernel" for name in ("value", "output")}
    attention = {f"mixer/{name}/kernel" for name in ("query", "key", "value", "output")}
    assert decayed == {
        "embedding",
        *(f"periods/0/{name}" for name in phalanx | feed_forward),
        *(f"periods/1/{name}" for name in attention | feed_forward),
    }
    # And what is left alone does include every kind of it.
    assert set(paths(updates)) - decayed >= {
        "norm/scale",
        "periods/0/mixer_norm/scale",
        "periods/0/mixer/decay/kernel",
        "periods/0/mixer/decay/bias",
        "periods/0/mixer/pre_gate/kernel",
        "periods/0/mixer/post_gate/bias",
    }


def test_of_a_decoders_options_no_norm_and_no_bias_decays(config):
    options = {"post_norms": True, "qk_norm": True, "norm_offset": 1.0}
    biases = {"qkv_bias": True, "output_bias": True, "mlp_bias": True}
    model = dataclasses.replace(config.model, pattern=("swa", "attention"), **options, **biases)
    model = nnx.eval_shape(lambda: LanguageModel(model, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(model))
    axes = logical_axes(nnx.state(model))
    assert (
        len(jax.tree.leaves(param_shardings(params, axes, make_mesh(MeshConfig())))) == 2 * 20 + 2
    )
    decayed = {name for name, decays in paths(decay_mask(axes)).items() if decays}
    kernels = ("mixer/query", "mixer/key", "mixer/value", "mixer/output")
    kernels += ("mlp/gate", "mlp/up", "mlp/down")
    assert decayed == {"embedding"} | {
        f"periods/{block}/{name}/kernel" for block in (0, 1) for name in kernels
    }


def test_no_gate_of_a_matrix_memory_decays(config):
    model = dataclasses.replace(config.model, pattern=("mlstm", "gated_delta"))
    model = nnx.eval_shape(lambda: LanguageModel(model, rngs=nnx.Rngs(0)))
    mask = paths(decay_mask(logical_axes(nnx.state(model))))
    mixers = {name: decays for name, decays in mask.items() if "/mixer/" in name}
    convolutions = {f"periods/1/mixer/{name}_conv/kernel" for name in ("query", "key", "value")}
    assert {name for name, decays in mixers.items() if decays} == convolutions | {
        f"periods/{block}/mixer/{name}/kernel"
        for block in (0, 1)
        for name in ("query", "key", "value", "output")
    }
    assert set(mixers) >= {
        "periods/0/mixer/input_gate/kernel",
        "periods/0/mixer/forget_gate/kernel",
        "periods/0/mixer/output_gate/kernel",
        "periods/0/mixer/head_norm/scale",
        "periods/1/mixer/decay/kernel",
        "periods/1/mixer/log_rate",
        "periods/1/mixer/write_gate/kernel",
        "periods/1/mixer/output_gate/kernel",
    }


def test_decay_is_learning_rate_times_weight_decay(config):
    blueprint = make_blueprint(config, make_mesh(MeshConfig()))
    params = jax.tree.map(lambda x: jnp.full(x.shape, 2.0, x.dtype), blueprint.abstract.params)
    no_gradient = jax.tree.map(jnp.zeros_like, params)
    updates, _ = blueprint.optimizer.update(no_gradient, blueprint.optimizer.init(params), params)
    first_learning_rate = config.optimizer.learning_rate / (config.optimizer.warmup_steps + 1)
    np.testing.assert_allclose(
        updates["embedding"], -2.0 * first_learning_rate * config.optimizer.weight_decay, rtol=1e-6
    )


def test_learning_rate_warms_up_and_follows_a_cosine():
    config = OptimizerConfig(learning_rate=0.5, warmup_steps=4, final_fraction=0.2)
    schedule = learning_rate_schedule(config, steps=20)
    for step in range(20):
        if step <= 4:
            expected = 0.5 * (1 + 4 * step / 4) / 5
        else:
            progress = (step - 4) / (20 - 4)
            expected = 0.5 * (0.2 + 0.8 * (1 + math.cos(math.pi * progress)) / 2)
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-6)


def test_warm_up_longer_than_the_run_still_ends_at_the_peak():
    config = OptimizerConfig(learning_rate=0.5, warmup_steps=100)
    assert float(learning_rate_schedule(config, steps=10)(9)) == pytest.approx(0.5)


def test_long_gradients_are_clipped_to_clip_norm(config):
    """Adam forgets the gradient's scale, so the first moment tells what reached it."""
    blueprint = make_blueprint(config, make_mesh(MeshConfig()))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), blueprint.abstract.params)
    gradient = jax.tree.map(lambda x: x + 7.0, params)
    _, opt_state = blueprint.optimizer.update(gradient, blueprint.optimizer.init(params), params)
    count = sum(x.size for x in jax.tree.leaves(params))
    expected = (1 - config.optimizer.beta1) * config.optimizer.clip_norm / math.sqrt(count)
    moments = [leaf for path, leaf in paths_with_attributes(opt_state) if ".mu" in path]
    assert len(moments) == len(jax.tree.leaves(params))
    for moment in moments:
        np.testing.assert_allclose(moment, expected, rtol=1e-5)


def paths_with_attributes(tree) -> list[tuple[str, jax.Array]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]
