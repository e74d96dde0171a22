"""What clients of the OpenAI format may ask, checked field by field and turned into requests."""

import dataclasses
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from swr_jax.generate.engine import Request
from swr_jax.generate.sampling import Sampling
from swr_jax.generate.text import prompt_ids

if TYPE_CHECKING:
    from swr_jax.data.tokenizers import Tokenizer

_MAX_STOPS = 4
_MAX_CHOICES = 128
_COMPLETION_TOKENS = 16  # the format's own default
_SEEDS = 2**63
# Chats become a plain transcript, which any model of text can continue; it ends where the next
# speaker would begin.
ROLES = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}
_NEXT_SPEAKER = "\nUser:"


class ApiError(Exception):
    """A reply with an error, in the format's own words.

    Attributes:
        status: HTTP status.
        body: what the reply holds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
    ):
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclasses.dataclass(frozen=True)
class Job:
    """One HTTP request: several engine requests, whose answers go back together.

    Attributes:
        chat: whether the reply is that of a chat.
        requests: one per choice, in the order of the reply.
        prompt_tokens: of all prompts, each counted once.
        stream: whether the reply comes in pieces.
        include_usage: whether a stream ends with token counts.
    """

    chat: bool
    requests: tuple[Request, ...]
    prompt_tokens: int
    stream: bool
    include_usage: bool


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _number(value: Any) -> bool:
    return isinstance(value, float) or _integer(value)


def _stops(value: Any) -> bool:
    strings = [value] if isinstance(value, str) else value
    return (
        isinstance(strings, list)
        and len(strings) <= _MAX_STOPS
        and all(isinstance(s, str) and s for s in strings)
    )


# Fields that decide something: what they may be, and the same in words. None is "not given".
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_tokens": (_integer, "an integer"),
    "max_completion_tokens": (_integer, "an integer"),
    "temperature": (_number, "a number"),
    "top_p": (_number, "a number"),
    "top_k": (_integer, "an integer"),
    "min_p": (_number, "a number"),
    "seed": (_integer, "an integer"),
    "n": (lambda x: _integer(x) and 1 <= x <= _MAX_CHOICES, f"between 1 and {_MAX_CHOICES}"),
    "stop": (_stops, f"a string, or at most {_MAX_STOPS} strings, none of them empty"),
    "stream": (lambda x: isinstance(x, bool), "true or false"),
    "stream_options": (
        lambda x: (
            isinstance(x, dict)
            and set(x) <= {"include_usage", "include_obfuscation"}
            and all(isinstance(value, bool) for value in x.values())
        ),
        "an object with include_usage",
    ),
}
# Fields that only ask for what happens anyway, and the values with which they do.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "modalities": (["text"],),
}
_IGNORED = frozenset({"model", "user", "metadata", "service_tier", "parallel_tool_calls"})


def parse_completion(body: Any, tokenizer: "Tokenizer", max_length: int) -> Job:
    """Read the body of a completion; `max_length` bounds prompt and answer together.

    Raises:
        ApiError: 400, naming the field.
    """
    fields = _fields(body, {"prompt"})
    prompts = _prompts(body.get("prompt"), tokenizer)
    max_tokens = fields.get("max_tokens", _COMPLETION_TOKENS)
    return _job(fields, prompts, max_tokens, (), max_length, chat=False)


def parse_chat(body: Any, tokenizer: "Tokenizer", max_length: int) -> Job:
    """Read the body of a chat; the answer may be as long as there is room, if it does not say.

    Raises:
        ApiError: 400, naming the field.
    """
    fields = _fields(body, {"messages"})
    prompt = prompt_ids(tokenizer, transcript(body.get("messages")))
    max_tokens = fields.get("max_completion_tokens", fields.get("max_tokens"))
    if max_tokens is None:
        max_tokens = max(1, max_length - len(prompt))
    return _job(fields, [prompt], max_tokens, (_NEXT_SPEAKER,), max_length, chat=True)


def transcript(messages: Any) -> str:
    """Write a conversation as text, a line "Role: content" each, open for the assistant.

    Raises:
        ApiError: 400 for messages of another form.
    """
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a list of at least one message", param="messages")
    lines = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            raise ApiError(
                400, f"{where}.role={role!r}: must be one of {', '.join(ROLES)}", param=where
            )
        lines.append(f"{ROLES[role]}: {_content(message.get('content'), where)}")
    return "\n".join([*lines, "Assistant:"])


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    texts = [
        part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        for part in parts
    ]
    if not all(isinstance(text, str) for text in texts):
        raise ApiError(
            400, f"{where}.content must be a string or parts of type 'text'", param=where
        )
    return "".join(texts)


def _fields(body: Any, own: set[str]) -> dict[str, Any]:
    """What is given of `_FIELDS`, checked; whatever else is given must be harmless."""
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        if name in _FIELDS:
            is_right, rule = _FIELDS[name]
            if not is_right(value):
                raise ApiError(400, f"{name}={_shown(value)}: must be {rule}", param=name)
        elif name in _NEUTRAL:
            if value not in _NEUTRAL[name] or isinstance(value, bool) != isinstance(
                next(iter(_NEUTRAL[name]), None), bool
            ):
                raise ApiError(
                    400,
                    f"{name}={_shown(value)}: is not supported here",
                    param=name,
                    code="unsupported_parameter",
                )
        elif name not in own | _IGNORED:
            raise ApiError(
                400,
                f"Unrecognized request argument supplied: {_shown(name)}",
                param=name[:64],
                code="unknown_parameter",
            )
    if "stream_options" in given and not given.get("stream"):
        raise ApiError(400, "stream_options needs stream=true", param="stream_options")
    return {name: value for name, value in given.items() if name in _FIELDS}


def _prompts(prompt: Any, tokenizer: "Tokenizer") -> list[list[int]]:
    """Ids of one prompt or several, of texts or of token ids."""
    several = prompt if isinstance(prompt, list) else [prompt]
    if isinstance(prompt, list) and prompt and all(map(_integer, prompt)):
        several = [prompt]
    found = []
    for each in several:
        if isinstance(each, str):
            found.append(prompt_ids(tokenizer, each))
        elif isinstance(each, list) and each and all(map(_integer, each)):
            found.append(each)
        else:
            break
    if not found or len(found) < len(several):
        raise ApiError(
            400,
            "prompt must be a string, a list of strings, a list of token ids, or a list of such "
            "lists; none of them empty",
            param="prompt",
        )
    return found


def _job(
    fields: Mapping[str, Any],
    prompts: Sequence[list[int]],
    max_tokens: int,
    stops: tuple[str, ...],
    max_length: int,
    *,
    chat: bool,
) -> Job:
    if max_tokens < 1:
        raise ApiError(400, f"max_tokens={max_tokens}: must be at least 1", param="max_tokens")
    for prompt in prompts:
        if len(prompt) + max_tokens > max_length:
            raise ApiError(
                400,
                f"This model's maximum context length is {max_length} tokens. However, you "
                f"requested {len(prompt) + max_tokens} tokens ({len(prompt)} in the prompt, "
                f"{max_tokens} for the answer). Please reduce one of them.",
                param="messages" if chat else "prompt",
                code="context_length_exceeded",
            )
    stop = fields.get("stop", [])
    stops += (stop,) if isinstance(stop, str) else tuple(stop)
    # No seed: an answer that nobody can foresee.
    seed = fields["seed"] % _SEEDS if "seed" in fields else secrets.randbits(63)
    options = {
        name: fields[name] for name in ("temperature", "top_p", "top_k", "min_p") if name in fields
    }
    choices = fields.get("n", 1)
    try:
        requests = tuple(
            Request(
                prompt=tuple(prompt),
                max_tokens=max_tokens,
                # Every choice has a seed of its own, and the first that which was asked for.
                sampling=Sampling(**options, seed=(seed + choice) % _SEEDS),
                stop=stops,
            )
            for prompt in prompts
            for choice in range(choices)
        )
    except ValueError as error:
        raise ApiError(400, str(error), param=str(error).partition("=")[0]) from error
    return Job(
        chat=chat,
        requests=requests,
        prompt_tokens=sum(map(len, prompts)),
        stream=fields.get("stream", False),
        include_usage=fields.get("stream_options", {}).get("include_usage", False),
    )


def _shown(value: Any) -> str:
    """A value as an error may repeat it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
