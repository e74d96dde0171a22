"""What clients may ask: every field is understood, or refused by name in the format's own words."""

import json

import pytest

from swr_jax.data import ByteTokenizer
from swr_jax.generate import Request, Sampling
from swr_jax.serve.protocol import ApiError, parse_chat, parse_completion, transcript

TOKENIZER, MAX_LENGTH = ByteTokenizer(), 200
HELLO = [{"role": "user", "content": "hello"}]


def completion(**body):
    return parse_completion({"model": "m", "prompt": "ab", **body}, TOKENIZER, MAX_LENGTH)


def chat(**body):
    return parse_chat({"model": "m", "messages": HELLO, **body}, TOKENIZER, MAX_LENGTH)


def test_a_completion_is_the_beginning_of_a_document():
    job = completion(
        max_tokens=7, temperature=0, top_p=0.5, top_k=3, min_p=0.1, seed=5, stop="x", stream=True,
        stream_options={"include_usage": True}, user="me", presence_penalty=0, logit_bias={},
        best_of=1, echo=False, suffix=None,
    )  # fmt: skip
    sampling = Sampling(temperature=0, top_p=0.5, top_k=3, min_p=0.1, seed=5)
    expected = Request(prompt=(256, 97, 98), max_tokens=7, sampling=sampling, stop=("x",))
    assert job.requests == (expected,)
    assert (job.chat, job.stream, job.include_usage, job.prompt_tokens) == (False, True, True, 3)


def test_defaults_are_the_formats():
    (request,) = completion().requests
    assert request.max_tokens == 16
    assert (request.sampling.temperature, request.sampling.top_p) == (1.0, 1.0)
    seeds = {completion().requests[0].sampling.seed for _ in range(8)}
    assert len(seeds) == 8
    assert completion(seed=-1).requests[0].sampling.seed == 2**63 - 1
    (request,) = chat().requests
    assert len(request.prompt) + request.max_tokens == MAX_LENGTH


def test_several_prompts_and_choices_come_in_order_with_seeds_of_their_own():
    job = completion(prompt=["a", "bc"], n=2, seed=3)
    assert [r.prompt for r in job.requests] == [(256, 97)] * 2 + [(256, 98, 99)] * 2
    assert [r.sampling.seed for r in job.requests] == [3, 4, 3, 4]
    assert job.prompt_tokens == 5
    # Token ids are taken as they are.
    assert completion(prompt=[1, 2]).requests[0].prompt == (1, 2)
    assert [r.prompt for r in completion(prompt=[[1], [2, 3]]).requests] == [(1,), (2, 3)]


def test_a_chat_is_a_transcript_open_for_the_assistant():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    text = "System: Be brief.\nUser: ab\nAssistant: c\nUser: d\nAssistant:"
    assert transcript(messages) == text
    (request,) = chat(messages=messages, stop=["!"], max_completion_tokens=9).requests
    assert request.prompt == (256, *text.encode())
    assert request.stop == ("\nUser:", "!")
    assert request.max_tokens == 9


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"prompt": None}, "prompt", "must be a string, a list"),
        ({"prompt": []}, "prompt", "none of them empty"),
        ({"prompt": ["a", 1]}, "prompt", "must be a string"),
        ({"prompt": {"a": 1}}, "prompt", "must be a string"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens=0: must be at least 1"),
        ({"max_tokens": "7"}, "max_tokens", "max_tokens='7': must be an integer"),
        ({"max_tokens": True}, "max_tokens", "must be an integer"),
        ({"max_tokens": 198}, "prompt", r"maximum context length is 200 .* 201 tokens \(3 in"),
        ({"max_tokens": 10**18}, "prompt", "maximum context length"),
        ({"max_tokens": 10**4000}, "max_tokens", "must be an integer"),
        ({"temperature": 10**400}, "temperature", "must be a number"),
        ({"prompt": [10**30]}, "prompt", "must be a string"),
        ({"temperature": "hot"}, "temperature", "must be a number"),
        ({"temperature": -1}, "temperature", "temperature=-1; it must be at least 0"),
        ({"temperature": float("nan")}, "temperature", "temperature=nan"),
        ({"top_p": 0}, "top_p", "top_p=0; it must be above 0"),
        ({"top_k": -1}, "top_k", "top_k=-1; it must be at least 1"),
        ({"min_p": 2}, "min_p", "min_p=2"),
        ({"seed": 1.5}, "seed", "seed=1.5: must be an integer"),
        ({"n": 0}, "n", "n=0: must be between 1 and 128"),
        ({"stop": [""]}, "stop", "none of them empty"),
        ({"stop": list("abcde")}, "stop", "at most 4 strings"),
        ({"stream": 1}, "stream", "must be true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream=true"),
        ({"logprobs": 3}, "logprobs", "logprobs=3: is not supported"),
        ({"logprobs": 0}, "logprobs", "logprobs=0: is not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "is not supported"),
        ({"echo": True}, "echo", "is not supported"),
        ({"frobnicate": 1}, "frobnicate", "Unrecognized request argument supplied: 'frobnicate'"),
        ({"messages": HELLO}, "messages", "Unrecognized request argument"),
    ],
)
def test_bad_fields_are_named(body, param, message):
    with pytest.raises(ApiError, match=message) as caught:
        completion(**body)
    error = caught.value.body["error"]
    assert caught.value.status == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert len(json.dumps(caught.value.body)) < 1000


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": []}, "messages must be a list of at least one"),
        ({"messages": "hi"}, "messages must be a list"),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"messages\[0\].role='tool': must be"),
        ({"messages": [{"role": ["user"]}]}, r"messages\[0\].role="),
        ({"messages": ["x"]}, r"messages\[0\].role=None"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].content must be a string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            r"messages\[0\].content must be a string or parts of type 'text'",
        ),
        ({"tools": [{"type": "function"}]}, "tools=.*is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format=.*is not supported"),
        ({"max_completion_tokens": 0}, "must be at least 1"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "maximum context length"),
    ],
)
def test_bad_chats_are_refused(body, message):
    with pytest.raises(ApiError, match=message):
        chat(**body)


def test_a_body_must_be_an_object():
    with pytest.raises(ApiError, match="must be a JSON object"):
        parse_completion(["prompt"], TOKENIZER, MAX_LENGTH)
