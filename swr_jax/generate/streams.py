"""Token streams side by side: reading prompts in pieces, decoding, from the model's state alone.

Notation: B streams, C tokens of the largest piece, V size of the vocabulary. A state's arrays are
[periods, B, ...]; what they hold of one stream depends on nothing of the others.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct

from swr_jax.generate.sampling import SamplingArrays, sample

# What is left of a prompt after its whole chunks is read in pieces, each size this many times
# smaller than the one before, down to single tokens: few compiled sizes serve any length.
_FINER = 8
# The smallest chunk.
SHORTEST_CHUNK = 16
# The shortest stream that full attention makes room for; longer ones take powers of two.
_SHORTEST_CACHE = 256

Progress = Callable[[int], object]


def ignore(_: int) -> None:
    """Progress that nobody watches."""


class Streams(struct.PyTreeNode):
    """Where B streams stand: after what they have read, before the next token is chosen."""

    logits: jax.Array  # [B, V] float32, of the next token
    state: Any  # the model's
    drawn: jax.Array  # [B] int32, tokens drawn so far, which decide the next draw's key


def check_chunk(chunk_size: int) -> None:
    """Raise ValueError for a chunk size that pieces cannot be made of."""
    if chunk_size < SHORTEST_CHUNK or chunk_size & (chunk_size - 1):
        raise ValueError(
            f"chunk_size={chunk_size}; it must be a power of two of at least {SHORTEST_CHUNK}"
        )


def piece_sizes(chunk_size: int) -> tuple[int, ...]:
    """Sizes of the pieces that prompts are read in, descending to 1."""
    sizes = [chunk_size]
    while sizes[-1] > 1:
        sizes.append(max(sizes[-1] // _FINER, 1))
    return tuple(sizes)


def room(length: int) -> int:
    """Tokens that full attention should make room for, few sizes for all lengths."""
    return max(_SHORTEST_CACHE, 1 << (length - 1).bit_length())


def next_piece(left: int, chunk_size: int) -> int:
    """Tokens of the next piece of a prompt of which `left` >= 1 are unread."""
    return next(size for size in piece_sizes(chunk_size) if size <= left)


def new_streams(model: nnx.Module, batch: int, *, max_length: int) -> Streams:
    """Streams that have read nothing; read at least a token before decoding.

    Args:
        model: a language model.
        batch: number of streams B.
        max_length: tokens that a stream may reach; only full attention needs it.
    """
    return Streams(
        logits=jnp.zeros((batch, model.config.vocab_size), jnp.float32),
        state=model.init_state(batch, max_length=max_length),
        drawn=jnp.zeros(batch, jnp.int32),
    )


def read_prompts(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    streams: Streams,
    prompts: Sequence[Sequence[int]],
    *,
    chunk_size: int,
    progress: Progress = ignore,
) -> Streams:
    """Read each prompt into its stream, those of equal pieces side by side.

    Nothing is padded: a stream reads its own tokens only, in the pieces that it would be read in
    alone, so that edges of blocks and windows lie where they belong.

    Args:
        graphdef, params: the model, split.
        streams: donated.
        prompts: token ids of the first streams; the others, and empty ones, stay as they are.
        chunk_size: tokens C of the largest piece.
        progress: called with the number of tokens just read.
    """
    width = streams.drawn.shape[0]
    lengths = np.zeros(width, np.int64)
    lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
    position = np.zeros_like(lengths)
    for size in piece_sizes(chunk_size):
        while (active := lengths - position >= size).any():
            tokens = np.zeros((width, size), np.int32)
            for row in np.flatnonzero(active):
                tokens[row] = prompts[row][position[row] : position[row] + size]
            streams = read_piece(graphdef, params, streams, tokens, active)
            position += size * active
            progress(int(size * active.sum()))
    return streams


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="streams")
def read_piece(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    streams: Streams,
    tokens: jax.Array,
    active: jax.Array | None = None,
) -> Streams:
    """Read tokens [B, T] in the rows that are active [B] (None: all); others stay as they are."""
    model = nnx.merge(graphdef, params)
    hidden, state = model.hidden(tokens, state=streams.state)
    logits = model.logits(hidden[:, -1:])[:, 0]
    if active is not None:

        def choose(new: jax.Array, old: jax.Array) -> jax.Array:  # [periods, B, ...]
            return jnp.where(active.reshape(-1, *(1,) * (new.ndim - 2)), new, old)

        state = jax.tree.map(choose, state, streams.state)
        logits = jnp.where(active[:, None], logits, streams.logits)
    return streams.replace(logits=logits, state=state)


@functools.partial(jax.jit, static_argnames=("graphdef", "steps"), donate_argnames="streams")
def decode(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    streams: Streams,
    options: SamplingArrays,
    *,
    steps: int,
) -> tuple[jax.Array, Streams]:
    """Draw the next `steps` tokens [steps, B] of every stream, and read them."""
    model = nnx.merge(graphdef, params)

    def step(streams: Streams, _: None) -> tuple[Streams, jax.Array]:
        tokens = sample(streams.logits, options, streams.drawn)
        logits, state = model(tokens[:, None], state=streams.state)
        return Streams(logits=logits[:, 0], state=state, drawn=streams.drawn + 1), tokens

    streams, tokens = jax.lax.scan(step, streams, length=steps)
    return tokens, streams


@functools.partial(jax.jit, donate_argnames="streams")
def put(streams: Streams, one: Streams, row: jax.Array) -> Streams:
    """Replace a stream by `one`, a batch of one stream."""

    def replace(axis: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
        return lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new, row, axis)

    return Streams(
        logits=replace(0)(streams.logits, one.logits),
        state=jax.tree.map(replace(1), streams.state, one.state),
        drawn=replace(0)(streams.drawn, one.drawn),
    )
