"""Text read and answered in turns, from one state that never reads anything twice."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from swr_jax.generate.sampling import DEFAULT, Sampling
from swr_jax.generate.saved import TokenStream
from swr_jax.generate.text import Answer
from swr_jax.nn.language_model import LanguageModel

if TYPE_CHECKING:
    from swr_jax.data.tokenizers import Tokenizer


class Conversation:
    """A document that somebody and a model write in turns.

    Args:
        model: a language model.
        tokenizer: its own.
        max_length: tokens that the document may reach, if the model has full attention.
        saved: a file that `save` wrote, to go on from.

    Raises:
        FileNotFoundError: there is no such file.
        SavedStreamError: the file is none of this model's.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: "Tokenizer",
        *,
        max_length: int = 4096,
        saved: str | Path | None = None,
    ):
        self._tokenizer = tokenizer
        self._last: list[int] = []
        if saved is None:
            self._stream = TokenStream(model, max_length=max_length)
        else:
            self._stream = TokenStream.load(saved, model)
            self._stream.reserve(max_length)

    @property
    def length(self) -> int:
        """Tokens of the document so far."""
        return self._stream.length

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens more, if the model has full attention."""
        self._stream.reserve(self.length + tokens)

    def read(self, text: str) -> None:
        """Add text to the document.

        Raises:
            ValueError: full attention has no room for it.
        """
        ids = self._tokenizer.encode(text).tolist()
        if self._stream.length == 0:
            ids = [self._tokenizer.bos_id, *ids]
        self._stream.read(ids)
        self._last = ids

    def answer(
        self,
        *,
        max_tokens: int,
        sampling: Sampling = DEFAULT,
        stop: Sequence[str] = (),
        is_over: Callable[[], bool] = lambda: False,
    ) -> Iterator[str]:
        """Let the model write on; yields whole characters.

        Args:
            max_tokens: most tokens.
            sampling: how they are drawn.
            stop: strings before which the answer is cut off; the document holds them.
            is_over: asked after each token whether it is enough.

        Raises:
            ValueError: full attention has no room for `max_tokens`, or numbers out of range.
        """
        answer = Answer(self._tokenizer, self._last, max_tokens=max_tokens, stop=stop)
        tokens = self._stream.generate(
            max_tokens=max_tokens, sampling=sampling, eos_id=self._tokenizer.eos_id
        )
        return self._pieces(answer, tokens, is_over)

    def _pieces(
        self, answer: Answer, tokens: Iterator[int], is_over: Callable[[], bool]
    ) -> Iterator[str]:
        for token in tokens:
            if piece := answer.push(token):
                yield piece
            if answer.finish:
                return
            if is_over():
                break
        if rest := answer.end():
            yield rest

    def save(self, path: str | Path) -> None:
        """Write the state to a file, from which a conversation with the same model can go on."""
        self._stream.save(path)
