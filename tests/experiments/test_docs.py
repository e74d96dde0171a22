"""Every block of code on the pages of experiments/docs runs; models and data are small ones."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from cluster_stand_ins import StandIns
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "experiments" / "docs"
# What the commands of the pages are given besides: the last value of an option counts.
SMALL = {
    "pretrain.py": (
        "--config.steps=4",
        "--config.log_every=1",
        "--config.eval_batches=1",
        "--config.data.batch_size=8",
        "--config.data.sequence_length=64",
        "--config.data.shuffle_tokens=4096",
        "--config.model.features=32",
        "--config.model.depth=2",
        "--config.model.num_heads=2",
        "--config.sample_tokens=4",
    ),
    "evaluate.py": ("--text_tokens=2000", "--chunk_size=64"),
}


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / f"{page}.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def run_python(page: str) -> None:
    found = blocks(page, "python")
    assert found
    names = {"__name__": page}
    for number, block in enumerate(found):
        # With a file of its own: flax reads the source of what it compiles.
        exec(compile(block, f"{page}.md, block {number}", "exec"), names)


def test_every_page_is_in_the_index_and_every_block_in_a_test():
    pages = {path.name for path in DOCS.glob("*.md")} - {"README.md"}
    assert set(re.findall(r"\((\w+\.md)\)", (DOCS / "README.md").read_text())) == pages
    assert pages == {
        *("use_phalanx.md", "train_on_a_pod.md", "evaluate_long_context.md", "write_a_kernel.md")
    }
    for path in DOCS.glob("*.md"):
        assert set(re.findall(r"^```(\w*)$", path.read_text(), flags=re.M)) <= {"", "python", "sh"}


@pytest.mark.parametrize("page", ["use_phalanx", "evaluate_long_context"])
def test_python_runs(page):
    run_python(page)


@pytest.mark.targets
def test_a_kernel_is_written_and_checked():
    run_python("write_a_kernel")


def test_a_kernel_is_checked_where_there_is_no_compiler_of_other_chips():
    """The part that needs none."""
    names = {}
    for block in blocks("write_a_kernel", "python")[:2]:
        exec(compile(block, "write_a_kernel.md", "exec"), names)
    assert names["error"] < 1e-6


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder as the pages take it for granted: the repository's files, text, a tokenizer."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("experiments", "Makefile", "swr_jax", "pallas_kernels", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    rows = [f"Page {i}. " + "The window of a block is what it sees. " * 12 for i in range(60)]
    (folder / "fineweb").mkdir()
    for number in range(2):
        table = pyarrow.table({"text": rows[number::2], "id": [str(i) for i in range(30)]})
        parquet.write_table(table, folder / "fineweb" / f"{number:03}.parquet")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(rows, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def stand_ins(tmp_path) -> StandIns:
    """`python` is this one, and what it is to run gets the small sizes besides."""
    found = StandIns(tmp_path / "commands")
    cases = "".join(
        f'  */{script}|{script}) set -- "$@" {" ".join(map(shlex.quote, options))};;\n'
        for script, options in SMALL.items()
    )
    found.add("python", f'case "$1" in\n{cases}esac\nexec {shlex.quote(sys.executable)} "$@"')
    return found


def run_shell(block: str, place: Path, stand_ins: StandIns) -> str:
    done = stand_ins.run("bash", "-euc", block, cwd=place, JAX_PLATFORMS="cpu")
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_the_way_to_a_pod(place, stand_ins, tmp_path):
    prepare, verify, plan, attempt, launch, evaluate = blocks("train_on_a_pod", "sh")
    assert "60 documents" in run_shell(prepare, place, stand_ins)
    run_shell(verify, place, stand_ins)
    assert "make plan ARGS=" in plan  # needs compilers: tested below
    said = run_shell(attempt, place, stand_ins)
    assert "done: 4 steps" in said
    assert "bits per byte" in run_shell(evaluate, place, stand_ins)

    bucket = tmp_path / "bucket"
    bucket.mkdir()
    for name in ("tokens", "tokenizer.json"):
        (bucket / name).symlink_to(place / name)
    stand_ins.add_tpu_pod(bucket, "my-bucket", tmp_path / "workers", tmp_path / "calls")
    small = " ".join(SMALL["pretrain.py"])
    launch = launch.replace("/mnt/bucket", str(bucket)).rstrip()
    environment = f"export MOUNT={bucket}\n"
    # The pod's scripts take what is committed here, so they run from the repository.
    said = run_shell(f"{environment}{launch} {small}", ROOT, stand_ins)
    assert "devices: 2 x cpu" in said
    assert (bucket / "runs" / "first" / "metrics.jsonl").exists()


@pytest.mark.targets
def test_the_plan_of_a_run(place):
    (plan,) = [block for block in blocks("train_on_a_pod", "sh") if "make plan" in block]
    (arguments,) = re.findall(r"ARGS='(.*)'", plan)
    small = (
        "--topology=v5e:2x2",
        "--config.model.depth=2",
        "--config.model.features=256",
        "--config.model.num_heads=2",
        "--config.data.sequence_length=1024",
        "--config.data.batch_size=4",
    )
    done = subprocess.run(
        [sys.executable, "experiments/plan.py", *arguments.split(), *small],
        cwd=place,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "v5e:2x2 (4 devices)" in done.stdout
    assert "tokens/s; 100 billion tokens in" in done.stdout


@pytest.mark.slow
def test_long_contexts_are_evaluated(place, stand_ins):
    train = "python experiments/pretrain.py --workdir=runs/phalanx_tiny "
    train += "--config=experiments/configs/phalanx_tiny.py"
    run_shell(train, place, stand_ins)
    for block in blocks("evaluate_long_context", "sh"):
        run_shell(block, place, stand_ins)
    pictures = {path.name for path in (place / "runs" / "phalanx_tiny").rglob("*.png")}
    assert {"evaluation_perplexity.png", "evaluation_needle.png"} <= pictures
