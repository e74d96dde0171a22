"""Nothing that is loaded can run code: checkpoints and data are plain numbers and JSON."""

import ast
import dataclasses
import json
import pickle
import sys
from pathlib import Path

import pytest

from swr_jax.data import make_dataset
from swr_jax.data.prepare import Preparation
from swr_jax.train.checkpoint import Checkpointer, load_model
from swr_jax.train.config import MeshConfig
from swr_jax.train.sharding import make_mesh
from swr_jax.train.state import init_state, make_blueprint

ROOT = Path(__file__).parents[2]
SOURCES = [
    path
    for folder in ("swr_jax", "pallas_kernels", "experiments")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
# Modules whose readers run what the file says.
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
CALLS = {"eval", "exec", "compile", "__import__"}


def offences(source: str) -> list[str]:
    """What a file does that would run code out of data."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.partition(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module] if node.module.partition(".")[0] in MODULES else []
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "id", None)
            found += [name] if name in CALLS else []
            for keyword in node.keywords:
                if keyword.arg == "allow_pickle" and getattr(keyword.value, "value", None):
                    found.append("allow_pickle")
            called = getattr(node.func, "attr", None)
            if called == "load" and getattr(getattr(node.func, "value", None), "id", None) in (
                "torch",
                "pickle",
            ):
                found.append("load")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib.numpy_pickle import load",
        "np.load(path, allow_pickle=True)",
        "torch.load(path)",
        "eval(text)",
    ],
)
def test_the_search_finds_what_it_searches_for(source):
    assert offences(source)


def test_no_source_file_has_a_reader_that_runs_code():
    assert len(SOURCES) > 100
    assert {str(p.relative_to(ROOT)): f for p in SOURCES if (f := offences(p.read_text()))} == {}


@pytest.fixture
def unpickled(monkeypatch):
    """What was looked up by name in a pickle while the test ran."""
    found = []
    watching = [True]

    def hook(event, arguments):
        if watching[0] and event == "pickle.find_class":
            found.append(arguments)

    sys.addaudithook(hook)  # there is no taking it away again
    yield found
    watching[0] = False


def test_the_watch_sees_a_pickle(unpickled):
    pickle.loads(pickle.dumps(Path("x")))
    assert unpickled


def test_checkpoints_and_data_are_read_without_a_pickle(config, tmp_path, unpickled):
    tokens = tmp_path / "tokens"
    with Preparation(config.data.source, tokens) as preparation:
        preparation.run(workers=1)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=str(tokens)))
    blueprint = make_blueprint(config, make_mesh(MeshConfig()))
    state = init_state(config, blueprint)
    batches = iter(make_dataset(config.data))
    next(batches)
    with Checkpointer(tmp_path / "run", keep=1) as checkpoints:
        checkpoints.save(1, state, batches, config)
    unpickled.clear()  # processes that prepare data may talk to each other as they like
    with Checkpointer(tmp_path / "run", keep=1) as checkpoints:
        checkpoints.restore_newest(blueprint.abstract, batches, config)
        next(batches)
    load_model(tmp_path / "run")
    assert unpickled == []


def test_a_pickle_in_a_checkpoint_is_not_opened(config, tmp_path, unpickled):
    """Under every name that a checkpoint has: nothing of it runs, whatever else becomes of it."""

    class Bomb:
        def __reduce__(self):
            return (Path(tmp_path / "exploded").touch, ())

    blueprint = make_blueprint(config, make_mesh(MeshConfig()))
    batches = iter(make_dataset(config.data))
    with Checkpointer(tmp_path / "run", keep=1) as checkpoints:
        checkpoints.save(1, init_state(config, blueprint), batches, config)
    for path in (tmp_path / "run" / "checkpoints" / "1").rglob("*"):
        if path.is_file() and path.name != "commit_success.txt":
            path.write_bytes(pickle.dumps(Bomb()))
    with pytest.warns(UserWarning, match="not whole"), pytest.raises(ValueError, match="not whole"):
        load_model(tmp_path / "run")
    assert not (tmp_path / "exploded").exists()
    assert unpickled == []


def test_a_configuration_in_a_checkpoint_is_data(config, tmp_path):
    """Only the file that the user names with --config is Python."""
    blueprint = make_blueprint(config, make_mesh(MeshConfig()))
    batches = iter(make_dataset(config.data))
    with Checkpointer(tmp_path / "run", keep=1) as checkpoints:
        checkpoints.save(1, init_state(config, blueprint), batches, config)
    stored = (tmp_path / "run" / "checkpoints" / "1" / "config" / "metadata").read_text()
    assert json.loads(stored)["config"]["model"]["features"] == config.model.features
