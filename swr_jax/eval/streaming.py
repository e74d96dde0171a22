"""Long token streams through a language model in chunks, with carried state.

Notation: B streams side by side, C tokens per chunk, V size of the vocabulary. A chunk costs the
same memory wherever it stands in its stream: C · V logits per stream, and the model's state. That
state does not grow but for full attention, whose cache holds every token; `bounded_attention` gives
such a model a window instead.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from swr_jax.generate.sampling import GREEDY, SamplingArrays
from swr_jax.generate.streams import (
    SHORTEST_CHUNK,
    Progress,
    check_chunk,
    decode,
    ignore,
    new_streams,
    read_prompts,
    room,
)
from swr_jax.nn.language_model import LanguageModel

# Tokens decoded between two looks at whether all answers have ended.
_DECODED = 16


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a model said of one row of n + 1 tokens.

    Attributes:
        log_probs: float32 [n], natural logarithm of the probability of each token but the first,
            given all before it.
        predicted: int32 [n], the likeliest token in its place.
    """

    log_probs: np.ndarray
    predicted: np.ndarray


class Streamer:
    """Scores and continues token streams of any length in memory that one chunk decides.

    Logits, log-probabilities and the choice of the likeliest token are float32.

    Args:
        model: a language model, on one device.
        chunk_size: tokens C read at once; a power of two of at least 16.
        batch_size: streams B side by side.

    Raises:
        ValueError: sizes out of range.
    """

    def __init__(self, model: LanguageModel, *, chunk_size: int = 512, batch_size: int = 8):
        check_chunk(chunk_size)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}; it must be at least 1")
        self.model = model
        self.chunk_size = chunk_size
        self.batch_size = batch_size
        self._graphdef, self._params = nnx.split(model)
        self._programs: dict[tuple[int, int, int], jax.stages.Compiled] = {}

    def score(
        self,
        rows: Sequence[Sequence[int]],
        *,
        progress: Progress = ignore,
    ) -> list[Scores]:
        """Score each token of each row but the first, rows of similar length side by side.

        Args:
            rows: token ids, at least two in each.
            progress: called with the number of tokens just scored.

        Raises:
            ValueError: a row with fewer than two tokens.
        """
        for number, row in enumerate(rows):
            if len(row) < 2:
                raise ValueError(
                    f"row {number} has {len(row)} tokens; scoring needs at least 2: begin rows "
                    "with the tokenizer's bos_id"
                )
        results: list[Scores | None] = [None] * len(rows)
        order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))
        width = min(self.batch_size, len(rows))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            found = self._score_batch([rows[n] for n in batch], width, progress)
            for number, scores in zip(batch, found, strict=True):
                results[number] = scores
        return results

    def _score_batch(self, rows: list[Sequence[int]], width: int, progress) -> list[Scores]:
        lengths = [len(row) - 1 for row in rows]
        sizes = self._sizes(max(lengths))
        padded = np.zeros((width, sum(sizes) + 1), np.int32)
        for tokens, row in zip(padded, rows, strict=False):
            tokens[: len(row)] = row
        state = self._init_state(width, sum(sizes))
        programs = {size: self._score_program(width, size, sum(sizes)) for size in set(sizes)}
        log_probs, predicted, start = [], [], 0
        for size in sizes:
            tokens, targets = (padded[:, start + i : start + i + size] for i in (0, 1))
            state, *found = programs[size](self._params, state, tokens, targets)
            log_probs.append(np.asarray(found[0]))
            predicted.append(np.asarray(found[1]))
            progress(sum(min(max(length - start, 0), size) for length in lengths))
            start += size
        log_probs, predicted = (np.concatenate(x, axis=1) for x in (log_probs, predicted))
        return [Scores(log_probs[i, :n], predicted[i, :n]) for i, n in enumerate(lengths)]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        is_over: Callable[[list[int]], bool] | None = None,
        progress: Progress = ignore,
    ) -> list[list[int]]:
        """Continue each prompt with its likeliest tokens, one after the other.

        Args:
            prompts: token ids, at least one in each.
            max_tokens: number of tokens to add.
            is_over: whether an answer needs no further token; asked every 16 tokens, so answers
                may run on a little.
            progress: called with the number of tokens just read or written.

        Raises:
            ValueError: an empty prompt, or max_tokens below 1.
        """
        if any(len(prompt) == 0 for prompt in prompts):
            raise ValueError("a prompt is empty: begin it with the tokenizer's bos_id")
        if max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens}; it must be at least 1")
        results: list[list[int]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
        width = min(self.batch_size, len(prompts))
        for start in range(0, len(order), self.batch_size):
            batch = [prompts[n] for n in order[start : start + self.batch_size]]
            found = self._generate_batch(batch, width, max_tokens, is_over, progress)
            for number, ids in zip(order[start:], found, strict=False):
                results[number] = ids
        return results

    def _generate_batch(self, prompts, width, max_tokens, is_over, progress) -> list[list[int]]:
        chunks = -(-max_tokens // _DECODED)
        longest = max(map(len, prompts)) + chunks * _DECODED
        model = (self._graphdef, self._params)
        streams = new_streams(self.model, width, max_length=room(longest))
        streams = read_prompts(
            *model, streams, prompts, chunk_size=self.chunk_size, progress=progress
        )
        greedy = SamplingArrays.of([GREEDY] * width)
        answers: list[list[int]] = [[] for _ in prompts]
        for _ in range(chunks):
            tokens, streams = decode(*model, streams, greedy, steps=_DECODED)
            for answer, ids in zip(answers, np.asarray(tokens).T.tolist(), strict=False):
                answer.extend(ids)
            if is_over is not None and all(map(is_over, answers)):
                break
        return [answer[:max_tokens] for answer in answers]

    def _sizes(self, length: int) -> list[int]:
        """Chunks that cover `length` tokens: whole ones, and a power of two for the rest."""
        sizes = [self.chunk_size] * (length // self.chunk_size)
        if rest := length % self.chunk_size:
            sizes.append(max(SHORTEST_CHUNK, 1 << (rest - 1).bit_length()))
        return sizes

    def _init_state(self, width: int, length: int) -> Any:
        return self.model.init_state(width, max_length=room(length))

    def _score_program(self, width: int, size: int, length: int) -> jax.stages.Compiled:
        """Compile `_score_step` for chunks of `size` tokens, unless that has been done."""
        state = jax.eval_shape(lambda: self._init_state(width, length))
        # Streams of other lengths need another program only if their state has another shape.
        key = (width, size, _bytes(state))
        if key not in self._programs:
            tokens = jax.ShapeDtypeStruct((width, size), jnp.int32)
            self._programs[key] = _score_step.lower(
                self._graphdef, self._params, state, tokens, tokens
            ).compile()
        return self._programs[key]

    def memory(self, width: int, length: int) -> dict[str, int]:
        """Bytes that scoring `width` streams of `length` tokens needs beside the parameters.

        Returns:
            `state`, what is carried from chunk to chunk, and `temporary`, the most that the
            compiled step holds at a time besides its arguments and results.
        """
        program = self._score_program(width, self._sizes(length)[0], length)
        state = jax.eval_shape(lambda: self._init_state(width, length))
        return {
            "state": _bytes(state),
            "temporary": program.memory_analysis().temp_size_in_bytes,
        }


def _bytes(state: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="state")
def _score_step(
    graphdef: nnx.GraphDef, params: nnx.State, state: Any, tokens: jax.Array, targets: jax.Array
) -> tuple[Any, jax.Array, jax.Array]:
    """Read tokens [B, C]; log-probabilities of targets [B, C], and the likeliest tokens."""
    logits, state = nnx.merge(graphdef, params)(tokens, state=state)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    log_probs = chosen - jax.nn.logsumexp(logits, axis=-1)
    return state, log_probs, jnp.argmax(logits, axis=-1).astype(jnp.int32)


def bounded_attention(model: LanguageModel, window: int) -> LanguageModel:
    """Let the full attention of a model see the last `window` tokens only.

    The parameters are shared. What the model carries from chunk to chunk no longer grows, and no
    query meets a key farther away than the window.

    Raises:
        ValueError: a window below 1, or the model has windows of another size, or of other
            positions than its full attention.
    """
    config = model.config
    if "swa" in config.pattern and config.window != window:
        raise ValueError(
            f"window={window}; the model's own windowed attention has {config.window}, and all of "
            "its windows are alike: it must be that"
        )
    if {"swa", "attention"} <= {*config.pattern} and config.rope_local_base is not None:
        raise ValueError(
            f"rope_local_base={config.rope_local_base}; the model's windowed attention has other "
            "positions than its full attention, which cannot be bounded then"
        )
    pattern = tuple("swa" if name == "attention" else name for name in config.pattern)
    options = {} if "swa" in config.pattern else {"rope_local_base": None}
    bounded = dataclasses.replace(config, pattern=pattern, window=window, **options)
    abstract = nnx.eval_shape(lambda: LanguageModel(bounded, rngs=nnx.Rngs(0)))
    return nnx.merge(nnx.split(abstract)[0], nnx.state(model))
