"""The evaluation command: a checkpoint's tables, JSON and pictures; it goes on where it stopped."""

import dataclasses
import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import flags

from swr_jax.data import DataConfig, load_tokenizer, make_dataset, open_corpus
from swr_jax.eval import plots, records, report, suite
from swr_jax.eval.intervals import wilson
from swr_jax.eval.streaming import ignore
from swr_jax.nn.language_model import LanguageModelConfig
from swr_jax.train.checkpoint import Checkpointer
from swr_jax.train.config import MeshConfig, TrainConfig
from swr_jax.train.sharding import make_mesh
from swr_jax.train.state import init_state, make_blueprint

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
LENGTH = 4096
SENTENCE = "The quick brown fox number {} jumps over the lazy dog. "


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A folder as training leaves it, with a model that has learnt nothing, and its text."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text").mkdir()
    for number in range(30):
        text = "".join(SENTENCE.format(n) for n in range(number, number + 20))
        (folder / "text" / f"{number:02}.txt").write_text(text)
    config = TrainConfig(
        model=LanguageModelConfig(
            vocab_size=259, features=16, depth=2, pattern=("phalanx", "attention"), num_heads=2
        ),
        data=DataConfig(
            source=str(folder / "text"),
            sequence_length=64,
            batch_size=2,
            validation_fraction=0.2,
            shuffle_tokens=4096,
        ),
    )
    state = init_state(config, make_blueprint(config, make_mesh(MeshConfig(data=1, fsdp=8))))
    with Checkpointer(folder, keep=1) as checkpoints:
        checkpoints.save(1, state, iter(make_dataset(config.data)), config)
    return folder


@pytest.fixture
def evaluate(run_folder, tmp_path):
    """Runs the command with arguments of its own; returns the record that it leaves."""
    defined = set(flags.FLAGS)
    spec = importlib.util.spec_from_file_location("evaluate", EXPERIMENTS / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments: str, name: str = "evaluation") -> dict:
        flags.FLAGS.unparse_flags()
        for flag in set(flags.FLAGS) - defined:
            flags.FLAGS[flag].unparse()
        common = [f"--checkpoint={run_folder}", f"--out={tmp_path}", f"--name={name}"]
        common += [f"--prose={run_folder / 'text'}", "--depths=2", "--samples=1"]
        common += ["--text_tokens=4096", "--chunk_size=64", "--batch_size=2"]
        flags.FLAGS(["evaluate.py", *common, *arguments])
        module.main(["evaluate.py"])
        return json.loads((tmp_path / f"{name}.json").read_text())

    yield run
    for flag in set(flags.FLAGS) - defined:
        delattr(flags.FLAGS, flag)


def test_the_command_goes_on_where_it_stopped(evaluate, tmp_path, monkeypatch, capsys):
    tasks = ("--tasks=perplexity,passkey,mqar", "--lengths=512")
    first = evaluate(*tasks)
    assert list(first["cases"]) == ["perplexity/512", "passkey/512", "mqar/512"]
    bits = first["cases"]["perplexity/512"]["all"]["bits_per_byte"]
    assert bits == pytest.approx(8, abs=0.3)  # it has learnt nothing: log2 of 259 tokens
    assert first["cases"]["mqar/512"]["trials"] == 2 * 32
    assert first["model"]["trained_length"] == 64
    printed = capsys.readouterr().out
    assert "| passkey | 0.00 (0.00 to 0.66) |" in printed
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {"evaluation_perplexity.png", "evaluation_tasks.png"}

    # Cut off after one case: only what is missing is done.
    kept = {name: first["cases"][name] for name in ("perplexity/512", "mqar/512")}
    (tmp_path / "evaluation.json").write_text(json.dumps({**first, "cases": kept}))
    done = []

    def answers(self, samples, tokens, progress) -> list[str]:
        done.append(tokens)
        return ["12"] * len(samples)

    monkeypatch.setattr(suite.Suite, "_answers", answers)
    again = evaluate(*tasks)
    assert len(done) == 1
    assert sorted(again["cases"]) == sorted(first["cases"])
    assert again["cases"]["perplexity/512"] == first["cases"]["perplexity/512"]
    assert evaluate(*tasks)["cases"] == again["cases"]
    assert len(done) == 1
    evaluate("--tasks=passkey", "--lengths=512", "--seed=1")  # other samples: done anew
    assert len(done) == 2

    with pytest.raises(SystemExit, match=r"results of another model.*--fresh"):
        evaluate(*tasks, "--attention_window=32")


def test_what_cannot_be_set_is_left_out_with_a_reason(evaluate, capsys):
    with pytest.raises(SystemExit, match=r"left out: perplexity/65536: the text has"):
        evaluate("--tasks=perplexity", "--lengths=65536", name="long")
    with pytest.raises(SystemExit, match="tasks has 'chess'"):
        evaluate("--tasks=chess")
    with pytest.raises(
        SystemExit, match="there must be some lengths, and each must be at least 16"
    ):
        evaluate("--lengths=8")


class Knower:
    """In the place of a model: continues a prompt by the sentences of the text that fit."""

    batch_size = 2

    def __init__(self, find):
        self.find = find

    def generate(self, prompts, *, max_tokens, is_over, progress):
        answers = []
        for prompt in prompts:
            assert len(prompt) + max_tokens <= LENGTH
            progress(len(prompt))
            answers.append([*self.find(bytes(prompt[1:]).decode()).encode(), 257, 0])
        assert all(is_over(answer) for answer in answers)
        return answers


def suite_of(streamer, run_folder, **settings) -> suite.Suite:
    values = suite.Settings(
        prose=str(run_folder / "text"), lengths=(LENGTH,), samples=2, depths=3, **settings
    )
    corpus = open_corpus(DataConfig(source=str(run_folder / "text"), validation_fraction=0.2))
    return suite.Suite(
        streamer, load_tokenizer("bytes"), corpus=corpus, split="validation", settings=values
    )


def test_who_finds_every_needle_scores_one_and_who_finds_none_zero(run_folder):
    def find(prompt: str) -> str:
        query = prompt.rsplit(" for ", 1)[1].split(" mentioned")[0]
        keys = re.split(", and |, ", query)
        return ", ".join(re.search(rf"for {key} is: (\S+)\.", prompt)[1] for key in keys)

    cases = list(suite_of(Knower(find), run_folder, tasks=("needle",)).cases())
    assert [case.name for case in cases] == [
        f"needle/{name}/{LENGTH}" for name in suite.Settings().variants
    ]
    record = {"cases": {case.name: case.run(ignore) for case in cases}}
    shares = {case.name.split("/")[1]: record["cases"][case.name]["share"] for case in cases}
    # Of four values of one key, the first that is found is a quarter.
    assert shares == {name: 0.25 if name == "multivalue" else 1.0 for name in shares}
    lengths, depths, grid = plots.needle_grid(record, "single_3")
    assert (lengths, depths) == ([LENGTH], [0, 50, 100])
    assert grid.tolist() == [[1.0]] * 3

    blind = suite_of(Knower(lambda _: "no idea"), run_folder, tasks=("needle",)).cases()
    assert {case.run(ignore)["share"] for case in blind} == {0.0}


def test_babilong_is_scored_by_its_question(run_folder):
    named = suite_of(Knower(lambda _: "the kitchen."), run_folder, tasks=("babilong",))
    results = {case.name: case.run(ignore) for case in named.cases()}
    assert results[f"babilong/qa1/{LENGTH}"]["trials"] == 6
    shares = [results[f"babilong/{task}/{LENGTH}"]["share"] for task in ("qa1", "qa2")]
    assert all(share < 0.7 for share in shares)  # one place of six, now and then


def test_the_grid_counts_a_reference_at_its_own_depth():
    result = {
        "grid": [0, 50, 100],
        "hits": [[True, False, True, True], [False, True, True, True]],
        "depths": [[0.0, 45.0, 99.0, 80.0], [50.0, 0.0, 10.0, 20.0]],
    }
    record = {"cases": {"needle/multiquery/1024": result}}
    _, _, grid = plots.needle_grid(record, "multiquery")
    np.testing.assert_array_equal(grid, [[1.0], [0.0], [1.0]])


def test_tables_pool_what_belongs_together():
    shares = {"right": 3, "trials": 10}
    record = {
        "cases": {
            "needle/single_1/1024": shares,
            "needle/single_1/4096": {"right": 1, "trials": 10},
            "passkey/1024": shares,
            "harness/piqa": {"metrics": {"acc": {"value": 0.5, "interval": [0.4, 0.6]}}},
        }
    }
    table = report.table(record)
    low, high = wilson(3, 10)
    assert f"| needle single_1 | 0.30 ({low:.2f} to {high:.2f}) | 0.10 (" in table
    assert "| passkey | 0.30 (0.11 to 0.60) | - |" in table
    assert "| piqa | acc | 0.5000 (0.4000 to 0.6000) |" in table


def test_a_record_says_where_its_last_case_was_done(tmp_path):
    path, model = tmp_path / "x.json", {"digest": "1"}
    record = records.open_record(path, model=model, fresh=False)
    records.add_case(record, "a", {"settings": {"seed": 0}, "x": 1}, environment={"date": "then"})
    records.write_record(record, path)
    found = records.open_record(path, model=model, fresh=False)
    assert found == record
    assert found["environment"] == {"date": "then"}
    assert records.is_done(found, "a", {"seed": 0})
    assert not records.is_done(found, "a", {"seed": 1})
    assert records.open_record(path, model=model, fresh=True)["cases"] == {}
    with pytest.raises(records.RecordError, match="digest 1, this one has 2"):
        records.open_record(path, model={"digest": "2"}, fresh=False)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="variants has 'double'"):
        suite.Settings(variants=("double",))
    settings = suite.Settings(lengths=(512, 64), text_lengths=(1024,))
    assert settings.lengths_of("perplexity") == [1024]
    assert settings.lengths_of("needle") == [64, 512]
    for name in ("text_tokens", "samples"):
        with pytest.raises(ValueError, match=f"{name}=0; it must be at least 1"):
            dataclasses.replace(suite.Settings(), **{name: 0})


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_without_the_harness_its_tasks_say_what_to_install(evaluate):
    sys.modules.pop("swr_jax.eval.harness", None)
    with pytest.raises(SystemExit, match=r"pip install 'swr_jax\[harness\]'"):
        evaluate("--tasks=", "--harness=piqa")
