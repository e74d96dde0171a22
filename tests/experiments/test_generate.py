"""experiments/generate.py: text in one go, in turns, and from a saved state."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def run(script: str, *options: str, text: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "experiments" / script, *options],
        env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)},
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run of two updates."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    text = folder.parent / "text.txt"
    text.write_text("All that is gold does not glitter.\n" * 4000)
    settings = {
        "steps": 2, "data.source": text, "data.sequence_length": 64, "data.batch_size": 2,
        "data.validation_fraction": 0.1, "model.features": 32, "model.depth": 2,
        "model.num_heads": 2, "eval_every": 2, "eval_batches": 1, "checkpoint_every": 2,
        "sample_tokens": 0,
    }  # fmt: skip
    options = [f"--config.{name}={value}" for name, value in settings.items()]
    config = ROOT / "experiments" / "configs" / "phalanx_tiny.py"
    trained = run("pretrain.py", f"--workdir={folder}", f"--config={config}", *options)
    assert trained.returncode == 0, trained.stderr
    return folder


def generate(folder: Path, *options: str, text: str = "") -> str:
    done = run("generate.py", f"--checkpoint={folder}", "--max_tokens=20", *options, text=text)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_in_turns_it_answers_every_line(folder):
    turns = generate(
        folder, "--interactive", "--temperature=0", text="one\ntwo\n/new\none\n/quit\nx"
    )
    once = generate(folder, "--prompt=one\n", "--temperature=0")
    answer = once.removeprefix("one\n")
    assert turns.startswith(answer)
    assert turns.endswith(answer)
    assert len(turns) > 2 * len(answer)


def test_a_saved_text_goes_on(folder, tmp_path):
    state = f"--save={tmp_path / 'state.npz'}"
    generate(folder, "--prompt=All that", "--top_p=0.9", "--min_p=0.01", state)
    resume = (f"--resume={tmp_path / 'state.npz'}", "--prompt=and")
    assert generate(folder, *resume) == generate(folder, *resume)
    (tmp_path / "state.npz").write_bytes(b"no")
    refused = run("generate.py", f"--checkpoint={folder}", *resume)
    assert refused.returncode == 1
    assert "is no stream that was saved" in refused.stderr


def test_a_stop_string_ends_it(folder):
    whole = generate(folder, "--prompt=All", "--temperature=0").removeprefix("All")
    stop = whole[5:7]
    assert stop.strip()
    cut = generate(folder, "--prompt=All", "--temperature=0", f"--stop={stop}")
    assert cut == "All" + whole[: whole.index(stop)] + "\n"


def test_bad_options_are_one_line(folder):
    refused = run("generate.py", f"--checkpoint={folder}", "--prompt=a", "--top_p=2")
    assert refused.returncode == 1
    assert refused.stderr.strip().splitlines()[-1].startswith("error: top_p=2.0; it must be")
