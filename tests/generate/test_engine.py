"""Requests side by side get what each would get alone, whoever comes and goes meanwhile."""

import numpy as np
import pytest
from generation_models import likeliest, make_model, prompts

from swr_jax.data import ByteTokenizer
from swr_jax.generate import GREEDY, Engine, EngineFull, Request, Sampling, generate_text

PATTERNS = [
    ("phalanx", "attention"),
    pytest.param(("swa", "mlstm"), marks=pytest.mark.slow),
    pytest.param(("swa", "gated_delta"), marks=pytest.mark.slow),
]


class AllBytes(ByteTokenizer):
    """Shows the id of every token, so that texts can be compared with ids."""

    def __init__(self):
        super().__init__()
        self._pieces = [f"<{token}>".encode() for token in range(self.vocab_size)]
        self.eos_id = -1


def make_engine(*pattern: str, tokenizer=None, **options) -> Engine:
    options = {"slots": 2, "max_length": 128, "chunk_size": 16, "stride": 4} | options
    pattern = pattern or ("phalanx", "attention")
    return Engine(make_model(*pattern), tokenizer or AllBytes(), **options)


def ids(text: str) -> list[int]:
    return [int(token) for token in text[1:-1].split("><")] if text else []


def run(engine: Engine, arrivals: dict[int, list[Request]]) -> tuple[dict[int, str], dict]:
    """Texts and last pieces by request, requests arriving before the steps of these numbers."""
    texts, last, step = {}, {}, 0
    while engine.busy or any(when >= step for when in arrivals):
        for request in arrivals.get(step, ()):
            texts[engine.submit(request)] = ""
        for piece in engine.step():
            assert piece.request not in last or last[piece.request].finish is None
            texts[piece.request] += piece.text
            last[piece.request] = piece
        step += 1
    return texts, last


@pytest.mark.parametrize("pattern", PATTERNS)
def test_greedy_answers_are_the_argmax_of_the_full_forward_pass(pattern):
    asked, lengths = prompts(1, 59, 16, 33, 3), (9, 21, 1, 14, 6)
    requests = [
        Request(prompt=tuple(prompt), max_tokens=n, sampling=GREEDY)
        for prompt, n in zip(asked, lengths, strict=True)
    ]
    engine = make_engine(*pattern)
    texts, last = run(engine, {0: requests[:3], 2: requests[3:4], 7: requests[4:]})
    answers = [ids(texts[number]) for number in sorted(texts)]
    assert [len(answer) for answer in answers] == list(lengths)
    rows = list(zip(asked, answers, strict=True))
    assert answers == likeliest(make_model(*pattern), rows)
    assert {piece.finish for piece in last.values()} == {"length"}
    assert [last[n].tokens for n in sorted(last)] == list(lengths)
    assert not engine.busy


def test_samples_depend_on_no_neighbour():
    rng = np.random.default_rng(0)
    options = (
        Sampling(seed=1),
        Sampling(temperature=0.8, top_k=20, seed=2),
        Sampling(temperature=1.2, top_p=0.7, seed=3),
        Sampling(min_p=0.02, seed=1),
        GREEDY,
    )
    requests = [
        Request(prompt=tuple(prompt), max_tokens=int(rng.integers(5, 20)), sampling=sampling)
        for prompt, sampling in zip(prompts(4, 30, 17, 4, 9), options, strict=True)
    ]
    alone = [run(make_engine(), {0: [request]})[0][0] for request in requests]
    order = [3, 0, 4, 1, 2]
    for slots in (2, 3):
        arrivals = {2 * when: [requests[i]] for when, i in enumerate(order)}
        texts, _ = run(make_engine(slots=slots), arrivals)
        assert [texts[order.index(i)] for i in range(5)] == alone


def test_running_answers_go_on_while_a_long_prompt_is_read():
    short, long = prompts(1, 100)
    engine = make_engine()
    first = engine.submit(Request(prompt=tuple(short), max_tokens=60))
    engine.step()
    second = engine.submit(Request(prompt=tuple(long), max_tokens=4))
    drawn = []
    while True:
        found = {piece.request: piece for piece in engine.step()}
        if second in found:
            break
        drawn.append(found[first].tokens)
    # 100 tokens are 6 chunks of 16 and twice 2; with the last of these the second answer begins.
    assert len(drawn) == 7
    assert (np.diff(drawn) == 4).all()


def test_a_cancelled_request_makes_room_and_disturbs_nobody():
    asked = [
        Request(prompt=tuple(p), max_tokens=24, sampling=GREEDY) for p in prompts(4, 40, 11, 70)
    ]
    expected = run(make_engine(), {0: [asked[2]]})[0][0]
    engine = make_engine()
    numbers = [engine.submit(request) for request in asked]
    texts = dict.fromkeys(numbers, "")
    for step in range(60):
        for piece in engine.step():
            texts[piece.request] += piece.text
        if step == 1:
            assert (engine.running, engine.waiting) == (1, 3)
            engine.cancel(numbers[0])  # running
            engine.cancel(numbers[1])  # being read
            engine.cancel(numbers[3])  # waiting
            assert (engine.running, engine.waiting) == (0, 1)
    assert texts[numbers[2]] == expected
    assert not engine.busy
    engine.cancel(numbers[2])  # has ended: nothing happens


def test_text_is_that_of_generate_text_stop_strings_included():
    model, tokenizer = make_model("phalanx", "attention"), ByteTokenizer()
    prompt = [tokenizer.bos_id, *b"def main("]
    options = {"temperature": 0.9, "top_k": 50}
    whole = "".join(generate_text(model, tokenizer, "def main(", max_tokens=40, **options))
    stop = next(whole[n : n + 2] for n in range(12, len(whole)) if whole[n : n + 2].isprintable())
    engine = make_engine(tokenizer=tokenizer)
    request = Request(
        prompt=tuple(prompt), max_tokens=40, sampling=Sampling(**options), stop=(stop,)
    )
    texts, last = run(engine, {0: [request]})
    assert texts[0] == whole[: whole.index(stop)]
    assert last[0].finish == "stop"
    assert texts[0] == "".join(
        generate_text(model, tokenizer, "def main(", max_tokens=40, stop=[stop], **options)
    )


def test_what_cannot_be_served_is_refused():
    engine = make_engine(slots=1, max_waiting=1)
    request = Request(prompt=(1, 2), max_tokens=4)
    for changed, message in (
        ({"prompt": ()}, "prompt is empty"),
        ({"prompt": (1, 259)}, "outside of the vocabulary's 0 to 258"),
        ({"max_tokens": 0}, "max_tokens=0; it must be at least 1"),
        ({"max_tokens": 127}, "2 tokens of prompt and max_tokens=127 exceed the 128 tokens"),
        ({"sampling": Sampling(top_k=300)}, "top_k=300"),
        ({"stop": ("",)}, "stop holds an empty string"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.submit(Request(**(vars(request) | changed)))
    engine.submit(request)
    engine.submit(request)
    with pytest.raises(EngineFull, match="2 wait"):
        engine.submit(request)
    engine.step()
    with pytest.raises(ValueError, match="slots=0; it must be at least 1"):
        make_engine(slots=0)
    with pytest.raises(ValueError, match="chunk_size=10"):
        make_engine(chunk_size=10)
