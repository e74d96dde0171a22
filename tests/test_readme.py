"""The README says what is so: its example runs, and its figures are the committed results."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from absl import flags
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from swr_jax.nn import LanguageModel, LanguageModelConfig
from swr_jax.nn.convert import save_pretrained

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "experiments" / "results"


def run_example(word):
    """Run the example that has this word; return its names."""
    examples = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (example,) = [example for example in examples if word in example]
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    return names


def test_the_example_runs():
    names = run_example("y_packed")
    assert names["y_packed"].shape == names["x"].shape == (2, 1000, 512)


def test_the_example_of_swapped_mixers_runs():
    names = run_example("swap_mixers")
    assert names["student"].config.pattern == ("phalanx", "attention")


def test_the_example_of_pretrained_weights_runs(tmp_path, monkeypatch):
    """With a small model of random numbers in the place of the published one."""
    config = LanguageModelConfig(
        vocab_size=300,
        features=16,
        depth=2,
        pattern=("attention",),
        num_heads=2,
        qk_norm=True,
        param_dtype="bfloat16",
    )
    monkeypatch.chdir(tmp_path)
    save_pretrained(LanguageModel(config, rngs=nnx.Rngs(0)), "Qwen3-0.6B", model_type="qwen3")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save("Qwen3-0.6B/tokenizer.json")
    names = run_example("load_pretrained")
    assert names["logits"].shape == (1, 1 + len("The capital of France is"), 300)
    assert names["prompt"][0] == tokenizer.token_to_id("<|endoftext|>")
    for file in ("model.safetensors", "tokenizer.json"):
        assert Path("mine", file).read_bytes() == Path("Qwen3-0.6B", file).read_bytes()


@pytest.fixture(scope="module")
def results_index():
    """The script that writes figures and index."""
    folder = ROOT / "experiments"
    spec = importlib.util.spec_from_file_location("results_index", folder / "results_index.py")
    module = importlib.util.module_from_spec(spec)
    defined = set(flags.FLAGS)
    sys.path.insert(0, str(folder))
    spec.loader.exec_module(module)
    sys.path.remove(str(folder))
    yield module
    for name in set(flags.FLAGS) - defined:
        delattr(flags.FLAGS, name)


@pytest.mark.parametrize(
    "name",
    [
        *("kernels_gpu", "kernels_tpu", "tpu_baselines", "compare_mixers", "compare_ablations"),
        *("swap", "swax_recall", "compare_windows", "evaluate", "evaluate_full"),
        *("cpu_recurrence", "cpu_copy", "cpu_layers", "h100_targets", "mlstm_tpu_baselines"),
        "gated_delta_tpu_baselines",
    ],
)
def test_figures_are_those_of_the_committed_files(results_index, name):
    assert name in results_index.FIGURES
    (place,) = results_index.place(name).finditer(README)
    advice = "run python experiments/results_index.py"
    assert place[2] == results_index.FIGURES[name]().strip(), advice


def test_every_figure_has_its_place(results_index):
    assert sorted(re.findall("<!-- figures: (.*) -->", README)) == sorted(results_index.FIGURES)


def test_an_empty_place_takes_nothing_of_what_follows(results_index, monkeypatch):
    monkeypatch.setattr(results_index, "FIGURES", {"one": lambda: "1\n", "two": lambda: "2"})
    text = "<!-- figures: one -->\n<!-- end -->\nwords\n<!-- figures: two -->\nold\n<!-- end -->\n"
    filled = (
        "<!-- figures: one -->\n1\n<!-- end -->\nwords\n<!-- figures: two -->\n2\n<!-- end -->\n"
    )
    assert results_index.readme(text) == results_index.readme(filled) == filled


def test_the_index_lists_every_result_with_its_origin(results_index):
    index = (RESULTS / "README.md").read_text()
    assert index == results_index.index(), "run python experiments/results_index.py"
    rows = re.findall(r"^\| \[(.*?)\].*? \| (.*) \| (.*) \| (.*) \| (.*) \| (.*) \|$", index, re.M)
    assert {name for name, *_ in rows} == {
        path.relative_to(RESULTS).as_posix() for path in RESULTS.rglob("*.json")
    }
    for name, chip, jax, commit, date, command in rows:
        assert chip, name
        assert command, name
        assert re.fullmatch(r"0\.\d+\.\d+[.\d]*", jax), name
        assert re.fullmatch("[0-9a-f]{7}", commit), name
        assert re.match(r"20\d\d-\d\d-\d\d", date), name


def test_what_an_h100_should_do_is_written_down(results_index):
    record = json.loads((RESULTS / results_index.PREDICTIONS).read_text())
    assert record == results_index.h100(), "run python experiments/results_index.py"
    assert {row["mode"] for row in record["predictions"]} == {"forward", "forward+backward"}
    assert [target["required"] for target in record["targets"]] == [
        *(">= 0.85", ">= 0.8", ">= 20", ">= 1.8", ">= 3.3", ">= 1.1", ">= 1.4"),
        *(">= 1", ">= 1", ">= 1"),
    ]


def test_a_device_that_has_spoken_fills_the_columns(results_index, monkeypatch, tmp_path):
    (tmp_path / "h100").mkdir()
    for source in ("kernels_gpu",):
        (tmp_path / f"{source}.json").write_bytes((RESULTS / f"{source}.json").read_bytes())
    measurement = {
        "group": "plain",
        "tokens": 8192,
        "mode": "forward",
        "contestants": {"sliding_window_recurrence": {"milliseconds": {"median": 0.2}}},
    }
    what = "sliding_window_recurrence forward: share of copy bandwidth"
    record = {
        "section": "recurrence",
        "environment": {"device": "NVIDIA H100 80GB HBM3"},
        "measurements": [measurement],
        "targets": [{"what": what, "measured": 0.83}],
    }
    (tmp_path / "h100" / "device_recurrence.json").write_text(json.dumps(record))
    monkeypatch.setattr(results_index, "RESULTS", tmp_path)
    found = results_index.h100()
    seconds = [row["measured_seconds"] for row in found["predictions"]]
    assert [s for s in seconds if s is not None] == [pytest.approx(0.2e-3)]
    assert [t["measured"] for t in found["targets"]] == [0.83, *[None] * 9]
    assert f"| {what} | 0.85 | 0.83 |" in results_index.h100_targets()


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_no_kernel_breaks_its_budget(platform):
    for report in json.loads((RESULTS / f"kernels_{platform}.json").read_text())["reports"]:
        assert report["broken_budgets"] == [], (report["name"], report["chip"]["name"])


def test_pictures_and_files_that_it_names_exist():
    named = re.findall(r"(?:experiments|swr_jax)/[\w/.]+\.(?:png|json|py)", README)
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).exists()] == []
