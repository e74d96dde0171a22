"""The harness runs its own tasks on our models, offline: what it reports is what we compute."""

import json
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from swr_jax.data import ByteTokenizer
from swr_jax.eval.streaming import Streamer, ignore
from swr_jax.generate import generate_text
from swr_jax.nn.language_model import LanguageModel, LanguageModelConfig

pytest.importorskip("lm_eval", reason="needs the extra 'harness'; make test-harness installs it")

from swr_jax.eval import harness

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_text: {text}
doc_to_target: {target}
{rest}
"""
SCORED = {
    "multiple_choice": """
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "generate_until": """
generation_kwargs: {until: ["e"], max_gen_toks: 24, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
    "loglikelihood_rolling": """
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    config = LanguageModelConfig(
        vocab_size=259, features=16, depth=2, pattern=("phalanx", "attention"), num_heads=2
    )
    return LanguageModel(config, rngs=nnx.Rngs(5))


@pytest.fixture(scope="module")
def tested(model) -> harness.HarnessModel:
    return harness.HarnessModel(Streamer(model, chunk_size=32, batch_size=4), ByteTokenizer())


def all_logits(model: LanguageModel, ids: list[int]) -> np.ndarray:
    """Logits after every token, by one pass over all; what is padded changes nothing before it."""
    padded = jnp.asarray([ids + [0] * (128 - len(ids))])
    return np.asarray(jax.jit(model)(padded)[0, : len(ids)], np.float64)


def next_logits(model: LanguageModel, text: str) -> np.ndarray:
    return all_logits(model, [256, *text.encode()])[-1]


def log_probs(model: LanguageModel, text: str) -> np.ndarray:
    """Log-probability of every byte of a document."""
    ids = [256, *text.encode()]
    logits = all_logits(model, ids)
    normal = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return normal[np.arange(len(ids) - 1), ids[1:]]


def write_task(folder, kind: str, rows: list[dict], *, text: str, target: str) -> str:
    name = f"ours_{kind}"
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = TASK.format(name=name, data=data, kind=kind, text=text, target=target, rest=SCORED[kind])
    (folder / f"{name}.yaml").write_text(task)
    return name


def result(tested, folder, name: str) -> dict:
    (case,) = harness.cases(tested, [name], include_path=str(folder))
    return case.run(ignore)["metrics"]


def test_multiple_choice_takes_the_likeliest_choice(tested, model, tmp_path):
    rng = np.random.default_rng(0)
    words = ["window", "block", "carrier", "gate", "decay", "state"]
    rows, right = [], []
    for number in range(20):
        choices = rng.choice(words, 3, replace=False).tolist()
        question = f"Question {number}: what comes next?"
        rows.append({"question": question, "choices": choices, "label": int(rng.integers(3))})
        sums = []
        for choice in choices:
            whole = log_probs(model, f"{question} {choice}")
            sums.append(whole[len(question.encode()) :].sum())
        right.append(int(np.argmax(sums)) == rows[-1]["label"])
    name = write_task(
        tmp_path, "multiple_choice", rows, text='"{{question}}"', target='"{{label}}"'
    )
    found = result(tested, tmp_path, name)["acc"]
    assert found["value"] == pytest.approx(np.mean(right))
    low, high = found["interval"]
    error = np.std(right, ddof=1) / np.sqrt(len(right))
    assert high - low == pytest.approx(2 * 1.96 * error, rel=1e-3)


def test_answers_are_greedy_and_end_at_the_stop_string(tested, model, tmp_path):
    tokenizer = ByteTokenizer()
    rows = []
    for number in range(6):
        prompt = f"def f{number}(x): return"
        pieces = generate_text(model, tokenizer, prompt, max_tokens=24, temperature=0)
        answer = "".join(pieces).split("e")[0]
        rows.append({"prompt": prompt, "answer": answer if number else "something else"})
    name = write_task(tmp_path, "generate_until", rows, text='"{{prompt}}"', target='"{{answer}}"')
    assert result(tested, tmp_path, name)["exact_match"]["value"] == pytest.approx(5 / 6)


def test_whole_texts_are_documents_of_their_own(tested, model, tmp_path):
    rows = [{"page": "The recurrence forgets. " * n} for n in (1, 3, 5)]
    name = write_task(tmp_path, "loglikelihood_rolling", rows, text='""', target='"{{page}}"')
    bits = -sum(log_probs(model, row["page"]).sum() for row in rows) / np.log(2)
    total = sum(len(row["page"].encode()) for row in rows)
    found = result(tested, tmp_path, name)["bits_per_byte"]["value"]
    assert found == pytest.approx(bits / total, rel=1e-5)


class Request:
    def __init__(self, *args):
        self.args = args


def likeliest_byte(model: LanguageModel) -> tuple[str, str]:
    """A context and the byte that is likeliest to follow, one that is a character of its own."""
    for letter in string.printable:
        context = f"x {letter}."[: 3 if letter.strip() else 4]
        byte = int(np.argmax(next_logits(model, context)))
        if byte < 128:
            return context, chr(byte)
    raise AssertionError("this model says nothing in ASCII: choose another seed")


def test_a_continuation_is_greedy_if_every_byte_is_the_likeliest(tested, model):
    context, likeliest = likeliest_byte(model)
    other = "?" if likeliest != "?" else "!"
    requests = [Request(context, likeliest), Request(context, other), Request("", "x")]
    requests += [Request("x = ", "1"), Request(context, likeliest + other * 3)]
    found = tested.loglikelihood(requests)
    assert [found[n][1] for n in (0, 1, 4)] == [True, False, False]
    # Spaces that end a context count with the continuation, as for tokens that begin with one.
    for (context, continuation), (log_prob, _) in zip(
        (request.args for request in requests), found, strict=True
    ):
        start = len(context.rstrip())
        expected = log_probs(model, context + continuation)[start:].sum()
        assert log_prob == pytest.approx(expected, rel=1e-5)


def test_sampling_is_refused(tested):
    with pytest.raises(ValueError, match="ask for samples; answers here are greedy"):
        tested.generate_until([Request("x", {"do_sample": True, "temperature": 0.8})])
