"""Many requests at once by continuous batching: a fixed number of slots, one compiled step.

Every slot is a stream of the batch that is decoded. A request reads its prompt alone, one piece
between two decoding calls, so that running answers never wait longer than for a piece; then its
state is written into a free slot. Sampling options are arrays, one entry per slot: requests of any
options share the step. A slot that is free computes along, and what it computes is thrown away.

Nobody's text depends on who else is there: no stream reads another's state, and draws depend on the
request's seed and its own token numbers. (Sums over features may round differently in other places
of a batch; nothing else differs.)
"""

import collections
import dataclasses
import itertools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from swr_jax.generate.sampling import DEFAULT, GREEDY, Sampling, SamplingArrays, check_vocabulary
from swr_jax.generate.streams import (
    Streams,
    check_chunk,
    decode,
    new_streams,
    next_piece,
    piece_sizes,
    put,
    read_piece,
    room,
)
from swr_jax.generate.text import Answer
from swr_jax.generate.tokens import CHUNK_SIZE
from swr_jax.nn.language_model import LanguageModel

if TYPE_CHECKING:
    from swr_jax.data.tokenizers import Tokenizer


class EngineFull(Exception):
    """As many requests wait as may."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What somebody wants continued.

    Attributes:
        prompt: ids, at least one.
        max_tokens: most tokens of the answer, at least 1.
        sampling: how they are drawn.
        stop: strings before which the answer ends.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = DEFAULT
    stop: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Piece:
    """What became certain of an answer in one step.

    Attributes:
        request: the number that `Engine.submit` gave.
        text: whole characters; may be empty.
        tokens: tokens drawn for the answer so far.
        finish: None while it goes on, then "stop" or "length".
    """

    request: int
    text: str
    tokens: int
    finish: str | None


@dataclasses.dataclass
class _Running:
    """A request on its way: waiting, being read, or in a slot."""

    number: int
    request: Request
    answer: Answer


class Engine:
    """Serves requests side by side; not safe for several threads at once: one drives it.

    Args:
        model: a language model.
        tokenizer: its own.
        slots: answers that are generated side by side.
        max_length: most tokens of a request, prompt and answer together; what full attention has
            room for in every slot.
        max_waiting: requests that may wait for a slot.
        chunk_size: tokens of a prompt read at once; a power of two of at least 16.
        stride: tokens of every slot by one call of the compiled step.

    Raises:
        ValueError: sizes out of range.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: "Tokenizer",
        *,
        slots: int = 8,
        max_length: int = 4096,
        max_waiting: int = 64,
        chunk_size: int = CHUNK_SIZE,
        stride: int = 4,
    ):
        check_chunk(chunk_size)
        sizes = {"slots": slots, "max_length": max_length, "stride": stride}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}={value}; it must be at least 1")
        if max_waiting < 0:
            raise ValueError(f"max_waiting={max_waiting}; it must be at least 0")
        self.model, self.tokenizer = model, tokenizer
        self.slots, self.max_length, self.max_waiting = slots, max_length, max_waiting
        self._chunk_size, self._stride = chunk_size, stride
        self._graphdef, self._params = nnx.split(model)
        self._numbers = itertools.count()
        self._waiting: collections.deque[_Running] = collections.deque()
        self._reading: tuple[_Running, int, Streams] | None = None
        self._running: list[_Running | None] = [None] * slots
        # The last call of a step may draw a few tokens too many.
        self._room = room(max_length + stride)
        self._streams = new_streams(model, slots, max_length=self._room)
        self._options = SamplingArrays.of([GREEDY] * slots)

    @property
    def waiting(self) -> int:
        """Requests that no slot has been found for."""
        return len(self._waiting) + (self._reading is not None)

    @property
    def running(self) -> int:
        """Requests in slots."""
        return sum(running is not None for running in self._running)

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return self.waiting + self.running > 0

    def check(self, request: Request) -> None:
        """Raise ValueError for a request that this engine cannot serve."""
        if not request.prompt:
            raise ValueError("prompt is empty: start with the tokenizer's bos_id")
        vocab_size = self.model.config.vocab_size
        if not all(0 <= token < vocab_size for token in request.prompt):
            raise ValueError(f"prompt holds ids outside of the vocabulary's 0 to {vocab_size - 1}")
        if request.max_tokens < 1:
            raise ValueError(f"max_tokens={request.max_tokens}; it must be at least 1")
        if len(request.prompt) + request.max_tokens > self.max_length:
            raise ValueError(
                f"{len(request.prompt)} tokens of prompt and max_tokens={request.max_tokens} "
                f"exceed the {self.max_length} tokens that a request may have: shorten one of them"
            )
        check_vocabulary(request.sampling, vocab_size)

    def submit(self, request: Request) -> int:
        """Take a request; returns the number that its pieces will carry.

        Raises:
            EngineFull: too many wait already.
            ValueError: it cannot be served.
        """
        self.check(request)
        if self.waiting >= self.max_waiting + (self.slots - self.running):
            raise EngineFull(
                f"{self.running} requests are being answered and {self.waiting} wait; "
                "try again later"
            )
        answer = Answer(
            self.tokenizer, request.prompt, max_tokens=request.max_tokens, stop=request.stop
        )
        number = next(self._numbers)
        self._waiting.append(_Running(number, request, answer))
        return number

    def cancel(self, number: int) -> None:
        """Drop a request wherever it is; nothing happens if it has ended."""
        self._waiting = collections.deque(r for r in self._waiting if r.number != number)
        if self._reading is not None and self._reading[0].number == number:
            self._reading = None
        for slot, running in enumerate(self._running):
            if running is not None and running.number == number:
                self._free(slot)

    def _free(self, slot: int) -> None:
        self._running[slot] = None
        # What nobody reads needs no filters.
        self._options = _with_row(self._options, slot, GREEDY)

    def step(self) -> list[Piece]:
        """Read a piece of a waiting prompt, if a slot is free for it, and decode every slot."""
        self._read()
        if not self.running:
            return []
        tokens, self._streams = decode(
            self._graphdef, self._params, self._streams, self._options, steps=self._stride
        )
        tokens = np.asarray(tokens)
        pieces = []
        for slot, running in enumerate(self._running):
            if running is None:
                continue
            text = ""
            for token in tokens[:, slot].tolist():
                text += running.answer.push(token)
                if running.answer.finish:
                    self._free(slot)
                    break
            answer = running.answer
            pieces.append(Piece(running.number, text, answer.tokens, answer.finish))
        return pieces

    def _read(self) -> None:
        if self._reading is None:
            if not self._waiting or None not in self._running:
                return
            alone = new_streams(self.model, 1, max_length=self._room)
            self._reading = (self._waiting.popleft(), 0, alone)
        running, done, alone = self._reading
        prompt = running.request.prompt
        size = next_piece(len(prompt) - done, self._chunk_size)
        piece = jnp.asarray(prompt[done : done + size], jnp.int32)[None]
        alone = read_piece(self._graphdef, self._params, alone, piece)
        done += size
        self._reading = (running, done, alone)
        if done < len(prompt):
            return
        slot = self._running.index(None)
        self._streams = put(self._streams, alone, jnp.int32(slot))
        self._options = _with_row(self._options, slot, running.request.sampling)
        self._running[slot] = running
        self._reading = None

    def warm_up(self) -> None:
        """Compile everything that requests will need, so that the first does not wait for it."""
        alone = new_streams(self.model, 1, max_length=self._room)
        for size in piece_sizes(self._chunk_size):
            alone = read_piece(self._graphdef, self._params, alone, jnp.zeros((1, size), jnp.int32))
        # The slot is free: nobody reads what stands in it.
        self._streams = put(self._streams, alone, jnp.int32(0))
        tokens, self._streams = decode(
            self._graphdef, self._params, self._streams, self._options, steps=self._stride
        )
        jax.block_until_ready(tokens)


def _with_row(options: SamplingArrays, row: int, sampling: Sampling) -> SamplingArrays:
    """Options with another entry in one row; host arrays, which a step takes in by itself."""

    def replaced(all_rows: np.ndarray, one: np.ndarray) -> np.ndarray:
        changed = all_rows.copy()
        changed[row] = one[0]
        return changed

    return jax.tree.map(replaced, options, SamplingArrays.of([sampling]))
