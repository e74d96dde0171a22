"""What clients of the OpenAI format get back: whole answers, and pieces of streams."""

import dataclasses
import secrets
import time
from collections.abc import Sequence
from typing import Any

from swr_jax.serve.protocol import Job


@dataclasses.dataclass
class Choice:
    """An answer as far as it has come."""

    text: str = ""
    tokens: int = 0
    finish: str | None = None


class Replies:
    """Shapes of the replies to one job.

    Args:
        job: what was asked.
        model: name of the model.
    """

    def __init__(self, job: Job, model: str):
        self._job = job
        self._model = model
        self._id = f"{'chatcmpl' if job.chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._created = int(time.time())

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The reply with all answers at once."""
        shown = []
        for index, choice in enumerate(choices):
            text: dict[str, Any] = {"text": choice.text}
            if self._job.chat:
                text = {"message": {"role": "assistant", "content": choice.text.lstrip(" ")}}
            shown.append(self._choice(index, text, choice.finish))
        kind = "chat.completion" if self._job.chat else "text_completion"
        return self._reply(kind, shown) | {"usage": self._usage(choices)}

    def piece(self, index: int, text: str, finish: str | None, *, first: bool) -> dict[str, Any]:
        """A piece of one answer."""
        added: dict[str, Any] = {"text": text}
        if self._job.chat:
            # The transcript's line begins with a space, which is no part of the message.
            text = text.lstrip(" ") if first else text
            added = {"delta": ({"role": "assistant"} if first else {}) | {"content": text}}
        return self._chunk([self._choice(index, added, finish)])

    def usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The piece that counts tokens, after all others."""
        return self._chunk([]) | {"usage": self._usage(choices)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._reply(
            "chat.completion.chunk" if self._job.chat else "text_completion", choices
        )

    def _reply(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _choice(self, index: int, text: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {"index": index, **text, "logprobs": None, "finish_reason": finish}

    def _usage(self, choices: Sequence[Choice]) -> dict[str, int]:
        completion = sum(choice.tokens for choice in choices)
        return {
            "prompt_tokens": self._job.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self._job.prompt_tokens + completion,
        }


def models(name: str, created: int) -> dict[str, Any]:
    """The list of the one model that is served."""
    return {"object": "list", "data": [model(name, created)]}


def model(name: str, created: int) -> dict[str, Any]:
    """The one model."""
    return {"id": name, "object": "model", "created": created, "owned_by": "swr_jax"}
