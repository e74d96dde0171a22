"""Text from a trained model, piece by piece, in whole characters and without its stop strings."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import jax

from swr_jax.generate.stop import StopStrings
from swr_jax.generate.tokens import CHUNK_SIZE, generate_tokens
from swr_jax.nn.language_model import LanguageModel

if TYPE_CHECKING:
    from swr_jax.data.tokenizers import Tokenizer


def prompt_ids(tokenizer: "Tokenizer", prompt: str) -> list[int]:
    """Ids of a text as the beginning of a document."""
    return [tokenizer.bos_id, *tokenizer.encode(prompt).tolist()]


class Answer:
    """Turns the ids of one stream into the text to show, and knows when it has ended.

    Args:
        tokenizer: the model's.
        prompt: ids before the answer. They are not repeated, but what follows may complete their
            last character.
        max_tokens: tokens after which the answer has ended.
        stop: strings before which it ends.
    """

    def __init__(
        self,
        tokenizer: "Tokenizer",
        prompt: Sequence[int],
        *,
        max_tokens: int,
        stop: Sequence[str] = (),
    ):
        self._eos_id = tokenizer.eos_id
        self._decoder = tokenizer.stream_decoder()
        for token in prompt:
            self._decoder.push(token)
        self._stops = StopStrings(stop)
        self._max_tokens = max_tokens
        self.tokens = 0  # drawn so far, that which ended the answer included
        self.finish: str | None = None  # "stop" or "length" once it has ended

    def push(self, token: int) -> str:
        """Text that became certain with `token`; all that was held back if it is the last."""
        self.tokens += 1
        if token == self._eos_id:
            return self.end("stop")
        text = self._stops.push(self._decoder.push(token))
        if self._stops.found:
            self.finish = "stop"
        elif self.tokens == self._max_tokens:
            text += self.end("length")
        return text

    def end(self, finish: str = "length") -> str:
        """What was held back, there being no further token."""
        self.finish = finish
        text = self._stops.push(self._decoder.flush())
        if self._stops.found:
            self.finish = "stop"
            return text
        return text + self._stops.flush()


def generate_text(
    model: LanguageModel,
    tokenizer: "Tokenizer",
    prompt: str,
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    key: jax.Array | None = None,
    stop: Sequence[str] = (),
    chunk_size: int = CHUNK_SIZE,
) -> Iterator[str]:
    """Yields the text that continues `prompt`, piece by piece, in whole characters.

    The prompt is read as the beginning of a document. Ends at the model's end-of-document token,
    before a string of `stop` or after `max_tokens`, whichever comes first. Other arguments as for
    `generate_tokens`.
    """
    ids = prompt_ids(tokenizer, prompt)
    answer = Answer(tokenizer, ids, max_tokens=max_tokens, stop=stop)
    tokens = generate_tokens(
        model,
        ids,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        key=key,
        chunk_size=chunk_size,
    )
    for token in tokens:
        if piece := answer.push(token):
            yield piece
        if answer.finish:
            return
    if rest := answer.end():
        yield rest
