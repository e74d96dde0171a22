"""The server answers the real `openai` client, on a port of this machine."""

import concurrent.futures
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from swr_jax.data import load_tokenizer
from swr_jax.generate import generate_text
from swr_jax.train.checkpoint import load_model

openai = pytest.importorskip("openai", reason="needs the extra 'clients'; see make test-serve")
pytest.importorskip("uvicorn", reason="needs the extra 'serve'; see make test-serve")

ROOT = Path(__file__).parents[2]
SLOTS, WAITING, LENGTH = 3, 3, 4096
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A run just long enough for documents not to end at once."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    text = folder.parent / "text.txt"
    text.write_text("All that is gold does not glitter.\n" * 4000)
    settings = {
        "steps": 40, "optimizer.warmup_steps": 2, "optimizer.learning_rate": 0.01,
        "data.source": text, "data.sequence_length": 64, "data.batch_size": 2,
        "data.validation_fraction": 0.1, "model.features": 32, "model.depth": 2,
        "model.num_heads": 2, "eval_every": 40, "eval_batches": 1, "checkpoint_every": 40,
        "sample_tokens": 0,
    }  # fmt: skip
    call = [sys.executable, ROOT / "experiments" / "pretrain.py", f"--workdir={folder}"]
    call += [f"--config={ROOT / 'experiments' / 'configs' / 'phalanx_tiny.py'}"]
    call += [f"--config.{name}={value}" for name, value in settings.items()]
    run = subprocess.run(call, env=environment(), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return folder


def environment() -> dict[str, str]:
    return {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}


class Running:
    """A server process and a client of it."""

    def __init__(self, checkpoint: Path, *options: str):
        self.process = subprocess.Popen(
            [
                *(sys.executable, ROOT / "experiments" / "serve.py", f"--checkpoint={checkpoint}"),
                *("--port=0", f"--slots={SLOTS}", f"--max_waiting={WAITING}"),
                *(f"--max_length={LENGTH}", "--chunk_size=64", *options),
            ],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        said = ""
        for line in self.process.stdout:
            said += line
            if address := re.search(r"tiny on (http://127\.0\.0\.1:(\d+)/v1)", line):
                break
        else:
            pytest.fail(f"the server said only {said!r}: {self.process.stderr.read()}")
        self.port = int(address[2])
        self.client = openai.OpenAI(base_url=address[1], api_key="none", max_retries=0)

    def complete(self, prompt="All that", **options):
        return self.client.completions.create(model="tiny", prompt=prompt, **options)

    def chat(self, messages=HELLO, **options):
        return self.client.chat.completions.create(model="tiny", messages=messages, **options)

    def health(self) -> dict:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", "/health")
        return json.loads(connection.getresponse().read())

    def until_idle(self) -> None:
        deadline = time.monotonic() + 60
        while (status := self.health()) != {"running": 0, "waiting": 0}:
            assert time.monotonic() < deadline, status
            time.sleep(0.02)

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Exit status and what was said of errors."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


@pytest.fixture(scope="module")
def server(checkpoint):
    running = Running(checkpoint)
    yield running
    code, errors = running.end()
    assert (code, errors) == (0, "")


@pytest.fixture(scope="module")
def text_of(checkpoint):
    """What the library says itself."""
    model, config, _ = load_model(checkpoint)
    tokenizer = load_tokenizer(config.data.tokenizer)

    def text(prompt: str, **options) -> str:
        return "".join(generate_text(model, tokenizer, prompt, **options))

    return text


def test_a_completion_is_what_the_library_says(server, text_of):
    reply = server.complete(max_tokens=40, temperature=0)
    assert reply.choices[0].text == text_of("All that", max_tokens=40, temperature=0)
    assert reply.choices[0].finish_reason == "length"
    usage = reply.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (9, 40, 49)
    assert (reply.object, reply.model) == ("text_completion", "tiny")
    # Draws too: the same seed, the same text.
    options = {"max_tokens": 30, "temperature": 0.9, "top_p": 0.8}
    reply = server.complete(seed=0, extra_body={"top_k": 40, "min_p": 0.01}, **options)
    assert reply.choices[0].text == text_of("All that", top_k=40, min_p=0.01, **options)


def test_a_stream_is_the_same_in_pieces(server):
    options = {"max_tokens": 60, "seed": 4, "n": 2, "temperature": 2.0}
    whole = server.complete(**options)
    stream = list(server.complete(stream=True, stream_options={"include_usage": True}, **options))
    texts, ends = ["", ""], [None, None]
    for chunk in stream[:-1]:
        (choice,) = chunk.choices
        assert ends[choice.index] is None
        texts[choice.index] += choice.text
        ends[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert texts[0] != texts[1]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert len(stream) > 5
    assert stream[-1].choices == []
    assert stream[-1].usage == whole.usage


def test_a_chat_goes_on_with_the_transcript(server, text_of):
    expected = text_of(
        "User: hello\nAssistant:", max_tokens=50, temperature=0, stop=["\nUser:"]
    ).lstrip(" ")
    whole = server.chat(max_completion_tokens=50, temperature=0)
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].message.role == "assistant"
    stream = list(server.chat(max_completion_tokens=50, temperature=0, stream=True))
    assert "".join(chunk.choices[0].delta.content for chunk in stream) == expected
    assert [chunk.choices[0].delta.role for chunk in stream[:2]] == ["assistant", None]
    assert stream[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_nothing_of_a_stop_string_is_shown(server):
    whole = server.complete(max_tokens=80, seed=1).choices[0].text
    stop = next(whole[n : n + 2] for n in range(9, len(whole)) if whole[n : n + 2].isascii())
    expected = whole[: whole.index(stop)]
    reply = server.complete(max_tokens=80, seed=1, stop=stop)
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == (expected, "stop")
    stream = server.complete(max_tokens=80, seed=1, stop=[stop], stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected


def test_clients_at_once_get_what_each_gets_alone(server):
    asked = [
        {"prompt": "x" * (7 * n + 1), "max_tokens": 10 + 9 * n, "seed": n, "temperature": 0.7 * n}
        for n in range(SLOTS + WAITING)
    ]
    alone = [server.complete(**each).choices[0].text for each in asked]
    with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
        together = pool.map(lambda each: server.complete(**each).choices[0].text, asked)
        assert list(together) == alone


def test_more_clients_than_there_is_room_for_are_told_to_come_back(server):
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        calls = [pool.submit(server.complete, max_tokens=2000, temperature=0) for _ in range(12)]
        errors = [error for call in calls if (error := call.exception())]
    assert errors
    assert {type(error) for error in errors} == {openai.RateLimitError}
    assert errors[0].code == "rate_limit_exceeded"
    assert errors[0].response.headers["retry-after"] == "1"
    assert len(errors) <= 12 - SLOTS - WAITING
    server.until_idle()


@pytest.mark.parametrize(
    ("kind", "options", "error", "param"),
    [
        ("complete", {"max_tokens": LENGTH}, openai.BadRequestError, "prompt"),
        ("complete", {"temperature": -1}, openai.BadRequestError, "temperature"),
        ("complete", {"extra_body": {"top_k": 1000}}, openai.BadRequestError, "top_k"),
        ("complete", {"prompt": [1, 70000]}, openai.BadRequestError, "prompt"),
        ("complete", {"n": SLOTS + WAITING + 1}, openai.BadRequestError, "n"),
        ("complete", {"logprobs": 2}, openai.BadRequestError, "logprobs"),
        ("chat", {"messages": []}, openai.BadRequestError, "messages"),
        ("complete", {"extra_body": {"model": "gpt"}}, openai.NotFoundError, "model"),
    ],
)
def test_bad_input_is_a_clients_error_by_name(server, kind, options, error, param):
    with pytest.raises(error) as caught:
        getattr(server, kind)(**options)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/completions", b"{", 400),
        ("POST", "/v1/completions", b"[" * 200_000, 400),
        ("POST", "/v1/completions", b"\xff", 400),
        ("POST", "/v1/completions", b'{"model": "tiny", "prompt": "\\ud800"}', 200),
        ("POST", "/v1/completions", b" " * (2**22 + 1), 413),
        ("GET", "/v1/completions", None, 405),
        ("GET", "/v1/nothing", None, 404),
        ("GET", "/v1/models/gpt", None, 404),
    ],
)
def test_what_is_no_request_is_refused_in_the_same_form(server, method, path, body, status):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request(method, path, body)
    reply = connection.getresponse()
    found = json.loads(reply.read())
    assert reply.status == status
    assert ("error" in found) == (status != 200)
    if status != 200:
        assert found["error"]["message"]


def test_the_model_is_listed(server):
    assert [model.id for model in server.client.models.list()] == ["tiny"]
    assert server.client.models.retrieve("tiny").owned_by == "swr_jax"


def test_a_client_that_goes_frees_its_slot(server):
    stream = server.complete(max_tokens=4000, temperature=0, stream=True)
    next(iter(stream))
    assert server.health()["running"] == 1
    stream.close()
    impatient = server.client.with_options(timeout=0.2)
    with pytest.raises(openai.APITimeoutError):
        impatient.completions.create(model="tiny", prompt=["a"] * 5, max_tokens=4000, temperature=0)
    server.until_idle()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_a_stream_end_and_the_server_exits_well(checkpoint, number):
    running = Running(checkpoint, "--grace=60")
    stream = iter(running.complete(max_tokens=300, temperature=0, stream=True))
    chunks = [next(stream)]
    running.process.send_signal(number)
    chunks += stream
    assert chunks[-1].choices[0].finish_reason == "length"
    code, errors = running.end()
    assert (code, errors) == (0, "")


def test_after_the_grace_a_stream_ends_with_an_error(checkpoint):
    running = Running(checkpoint, "--grace=0")
    stream = iter(running.complete(max_tokens=4000, temperature=0, stream=True))
    next(stream)
    running.process.send_signal(signal.SIGTERM)
    with pytest.raises(openai.APIError, match="shut down before the answer was complete"):
        list(stream)
    code, errors = running.end()
    assert (code, errors) == (0, "")


def test_a_missing_checkpoint_is_named(tmp_path):
    call = [sys.executable, ROOT / "experiments" / "serve.py", f"--checkpoint={tmp_path / 'no'}"]
    run = subprocess.run(call, env=environment(), capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert re.search(r"error: .*/no does not exist", run.stderr)
