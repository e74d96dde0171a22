"""A checkpoint damaged on the disk is found out, named, and passed over for the last good one."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from swr_jax.data import make_dataset
from swr_jax.train.checkpoint import Checkpointer, CorruptCheckpointError, load_model
from swr_jax.train.config import MeshConfig
from swr_jax.train.fingerprint import fingerprints
from swr_jax.train.loop import train
from swr_jax.train.sharding import make_mesh
from swr_jax.train.state import init_state, make_blueprint

# Of reads that fail orbax leaves the others behind, never awaited.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def bits(tree) -> list[np.ndarray]:
    def convert(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.array(jax.random.key_data(x) if is_key else x)

    return [convert(x) for x in jax.tree.leaves(tree)]


def equal(first, second) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(bits(first), bits(second), strict=True))


@pytest.fixture(scope="module")
def blueprint(config):
    return make_blueprint(config, make_mesh(MeshConfig()))


@pytest.fixture(scope="module")
def states(config, blueprint):
    """Two states that differ everywhere."""
    first = init_state(config, blueprint)
    second = jax.tree.map(
        lambda x: x + 1 if jnp.issubdtype(x.dtype, jnp.number) else jax.random.fold_in(x, 1), first
    )
    return {1: first, 2: jax.device_put(second, jax.tree.map(lambda x: x.sharding, first))}


@pytest.fixture(scope="module")
def two_checkpoints(config, states, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("two")
    batches = iter(make_dataset(config.data))
    with Checkpointer(workdir, keep=2) as checkpoints:
        for step, state in states.items():
            next(batches)
            checkpoints.save(step, state, batches, config)
    return workdir


def files_of(checkpoint: Path) -> list[Path]:
    """All files, relative to `checkpoint`."""
    found = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    return [path.relative_to(checkpoint) for path in found]


def array_files_of(checkpoint: Path) -> list[Path]:
    """Those that hold arrays. Some may be of no use: a busy writer leaves what it has replaced."""
    return [checkpoint / file for file in files_of(checkpoint) if file.parent.name == "d"]


def flip_a_bit(path: Path, rng) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    path.write_bytes(bytes(content))


def truncate(path: Path, rng) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.integers(len(content))] if content else b"")


def remove(path: Path, rng) -> None:
    path.unlink()


DAMAGES = (flip_a_bit, truncate, remove)


def restore_newest(workdir: Path, blueprint, config):
    with Checkpointer(workdir, keep=2) as checkpoints:
        batches = iter(make_dataset(config.data))
        return checkpoints.restore_newest(blueprint.abstract, batches, config)


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_last_good_one_is_used(two_checkpoints, blueprint, states, config, tmp_path, damage):
    workdir = tmp_path / "run"
    shutil.copytree(two_checkpoints, workdir)
    newest = workdir / "checkpoints" / "2"
    for file in array_files_of(newest):
        damage(file, np.random.default_rng(0))
    step, state, errors = restore_newest(workdir, blueprint, config)
    assert step == 1
    assert equal(state, states[1])
    assert [str(newest) in str(error) for error in errors] == [True]
    assert not newest.exists()
    assert newest.with_name("2.corrupt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_no_damage_to_any_file_goes_unseen(
    two_checkpoints, blueprint, states, config, tmp_path, damage
):
    """A good state comes back, bit for bit: its own or, with the damage named, the last one's."""
    rng = np.random.default_rng(0)
    found = 0
    files = files_of(two_checkpoints / "checkpoints" / "2")
    assert len(files) >= 10
    for number, file in enumerate(files):
        workdir = tmp_path / str(number)
        shutil.copytree(two_checkpoints, workdir)
        damage(workdir / "checkpoints" / "2" / file, rng)
        step, state, errors = restore_newest(workdir, blueprint, config)
        assert equal(state, states[step]), file
        # A checkpoint without this mark is one that was cut off while it was written.
        if not (damage is remove and file.name == "commit_success.txt"):
            assert len(errors) == (step == 1), file
        found += len(errors)
    assert found >= 3


def test_where_none_is_whole_nothing_is_begun_anew(two_checkpoints, blueprint, config, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(two_checkpoints, workdir)
    for step in (1, 2):
        for file in array_files_of(workdir / "checkpoints" / str(step)):
            truncate(file, np.random.default_rng(0))
    with pytest.raises(CorruptCheckpointError, match=r"none of .* is whole.*/2 .*/1 .*--workdir"):
        restore_newest(workdir, blueprint, config)
    with (
        pytest.warns(UserWarning, match="is not whole"),
        pytest.raises(CorruptCheckpointError, match=r"none of"),
    ):
        load_model(workdir)
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["1", "2"]


def test_a_model_is_loaded_from_the_last_good_one(two_checkpoints, states, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(two_checkpoints, workdir)
    newest = workdir / "checkpoints" / "2"
    for file in array_files_of(newest):
        flip_a_bit(file, np.random.default_rng(0))
    with pytest.warns(UserWarning, match=r"checkpoints/2 is not whole.*trying the one before"):
        model, _, step = load_model(workdir)
    assert step == 1
    np.testing.assert_array_equal(model.embedding[...], states[1].params["embedding"])


@pytest.mark.usefixtures("one_device")
def test_a_run_goes_on_past_a_damaged_checkpoint(config, tmp_path, capsys):
    """And ends as it would have, though it comes to the damaged step a second time."""
    straight, damaged = tmp_path / "straight", tmp_path / "damaged"
    train(config, straight)
    shutil.copytree(straight, damaged)
    newest = damaged / "checkpoints" / "40"
    for file in files_of(newest / "params"):
        flip_a_bit(newest / "params" / file, np.random.default_rng(0))
    capsys.readouterr()
    train(config, damaged)
    said = capsys.readouterr().out
    assert f"set aside as .corrupt: checkpoint {newest} is not whole" in said
    assert "resumed from the checkpoint of step 30" in said
    models = [load_model(workdir) for workdir in (straight, damaged)]
    assert [step for _, _, step in models] == [40, 40]
    assert equal(*(nnx.state(model) for model, _, _ in models))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "int8", "bool"])
def test_one_wrong_bit_anywhere_changes_the_fingerprint(dtype):
    rng = np.random.default_rng(0)
    array = rng.integers(0, 2, 91).astype(jnp.dtype(dtype))
    before = fingerprints(array)
    for element in range(array.size):
        other = array.copy()
        if dtype == "bool":
            other[element] ^= True
        else:
            byte = element * array.itemsize + rng.integers(array.itemsize)
            other.view(np.uint8)[byte] ^= np.uint8(1 << rng.integers(8))
        assert fingerprints(other) != before


def test_elements_that_changed_places_change_the_fingerprint():
    array = np.arange(60.0, dtype=np.float32).reshape(3, 4, 5)
    orders = [array, array[::-1], array[:, ::-1], array[..., ::-1], array.transpose(0, 2, 1)]
    assert len({str(fingerprints(np.ascontiguousarray(x))) for x in orders}) == len(orders)


def test_fingerprints_do_not_depend_on_the_mesh(states, config):
    meshes = (MeshConfig(), MeshConfig(data=1, fsdp=4, tensor=2), MeshConfig(data=2, tensor=4))
    plans = [make_blueprint(config, make_mesh(mesh)) for mesh in meshes]
    placed = [
        jax.device_put(states[1], jax.tree.map(lambda x: x.sharding, plan.abstract))
        for plan in plans
    ]
    assert len({str(fingerprints(state)) for state in placed}) == 1
    assert fingerprints(states[1]) != fingerprints(states[2])
