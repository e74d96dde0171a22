"""A checkpoint goes from 8 devices to 4, to 1 and to 8 again, on any mesh, without losing a bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swr_jax.data import make_dataset
from swr_jax.train.checkpoint import Checkpointer
from swr_jax.train.config import MeshConfig
from swr_jax.train.sharding import batch_sharding, make_mesh, put_batch
from swr_jax.train.state import init_state, make_blueprint
from swr_jax.train.step import make_train_step

WAY = (
    (8, MeshConfig(data=1, fsdp=4, tensor=2)),
    (4, MeshConfig(data=2, tensor=2)),
    (1, MeshConfig()),
    (8, MeshConfig(data=2, fsdp=2, sequence=2)),
    (8, MeshConfig(data=1, fsdp=8)),
)


def bits(tree) -> list[np.ndarray]:
    def convert(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.array(jax.random.key_data(x) if is_key else x)

    return [convert(x) for x in jax.tree.leaves(tree)]


def test_no_bit_changes_on_the_way(config, tmp_path):
    batches = iter(make_dataset(config.data))
    state, expected = None, None
    for step, (count, sizes) in enumerate(WAY, start=1):
        mesh = make_mesh(sizes, jax.devices()[:count])
        blueprint = make_blueprint(config, mesh)
        with Checkpointer(tmp_path, keep=1) as checkpoints:
            if state is None:
                update = make_train_step(blueprint, mesh)
                batch = put_batch(next(batches), batch_sharding(mesh))
                # Moments that are not all zero.
                state, _ = update(init_state(config, blueprint), batch)
                expected = bits(state)
            else:
                _, state, damaged = checkpoints.restore_newest(blueprint.abstract, batches, config)
                assert damaged == []
            for a, b in zip(bits(state), expected, strict=True):
                np.testing.assert_array_equal(a, b)
            shardings = jax.tree.map(lambda x: x.sharding, (state, blueprint.abstract))
            assert shardings[0] == shardings[1]
            checkpoints.save(step, state, batches, config)


def test_a_restored_array_that_is_a_copy_on_every_device_is_no_success(
    config, tmp_path, monkeypatch
):
    """Should a library ever hand out replicas instead of what was asked for."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    blueprint = make_blueprint(config, mesh)
    batches = iter(make_dataset(config.data))
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, init_state(config, blueprint), batches, config)
        checkpoints.wait()
        restore = checkpoints._manager.restore

        def replicating(*arguments, **options):
            restored = dict(restore(*arguments, **options))
            if "params" in restored:
                whole = jax.NamedSharding(mesh, jax.P())
                restored["params"] = jax.device_put(restored["params"], whole)
            return restored

        monkeypatch.setattr(checkpoints._manager, "restore", replicating)
        with pytest.raises(RuntimeError, match=r"was restored as .* instead of .*fsdp"):
            checkpoints.restore(1, blueprint.abstract, batches, config)
