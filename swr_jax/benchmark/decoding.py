"""Section `decode`: tokens a second and memory of one stream against the length of its context.

Models of equal width and depth; parameters, states and caches float32. A context is not read token
by token: its first `prompt` tokens are read in chunks, as `swr_jax.generate` does, and caches of
full attention, which have room for the whole context, are then filled up by repeating what these
tokens left in them; the time of a step does not depend on what a cache holds. States of the other
mixers have one size, whatever they have read, and are those after the prompt. Each call is the
step that generation runs, one token with the likeliest one chosen, from the state that the last
call left; only the place in attention's caches is put back, so that every call decodes the first
token after the context.
"state_bytes" is what is carried from token to token, "parameter_bytes" what a step reads besides,
"temporary_bytes" what it holds meanwhile. Before anything is timed, greedy answers of all models
are compared with the argmax of a full forward pass.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from swr_jax.benchmark import timing
from swr_jax.benchmark.models import PATTERNS as TRAINED
from swr_jax.benchmark.oracle import OracleError
from swr_jax.generate import GREEDY, generate_batch
from swr_jax.generate.sampling import SamplingArrays
from swr_jax.generate.streams import Streams, decode, new_streams, read_prompts
from swr_jax.nn.attention import AttentionState
from swr_jax.nn.language_model import LanguageModel, LanguageModelConfig, num_parameters

PATTERNS = {name: TRAINED[name] for name in ("transformer++", "swa_hybrid", "swax")}
PATTERNS["phalanx"] = ("phalanx",)
REFERENCES = ("transformer++",)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is timed."""

    contexts: tuple[int, ...]
    prompt: int  # a divisor of every context
    features: int
    depth: int
    num_heads: int
    window: int
    budget: timing.Budget


FULL = Sizes(
    contexts=tuple(2**n for n in range(10, 18)),
    prompt=1024,
    features=256,
    depth=4,
    num_heads=4,
    window=512,
    budget=timing.Budget(seconds=15, min_rounds=15, max_rounds=201),
)
TINY = Sizes(
    contexts=(64, 128),
    prompt=32,
    features=32,
    depth=2,
    num_heads=2,
    window=16,
    budget=timing.Budget(seconds=0, min_rounds=2, max_rounds=2),
)


def make_models(sizes: Sizes) -> dict[str, LanguageModel]:
    """The models by name, of random parameters and a vocabulary of bytes."""
    return {
        name: LanguageModel(
            LanguageModelConfig(
                vocab_size=259,
                features=sizes.features,
                depth=sizes.depth,
                pattern=pattern,
                num_heads=sizes.num_heads,
                window=sizes.window,
            ),
            rngs=nnx.Rngs(0),
        )
        for name, pattern in PATTERNS.items()
    }


def run(sizes: Sizes, models: dict[str, LanguageModel] | None = None) -> Iterator[dict]:
    """Check all models, then time them by turns at every context.

    Yields:
        "case", "tokens" (the context), "allocator", "parameters", "state_bytes" and
        "parameter_bytes" by name, and what `timing.summarise` returns, each contestant with its
        "tokens_per_second".

    Raises:
        OracleError: a greedy answer is not the argmax of the full forward pass.
    """
    models = make_models(sizes) if models is None else models
    for name, model in models.items():
        check(name, model, sizes.window + 5)
    # Whoever generates keeps what was freed after a step for the next.
    allocator = "kept" if timing.keep_freed_memory() else "default"
    for context in sizes.contexts:
        yield {
            "case": f"context {context}",
            "tokens": context,
            "allocator": allocator,
            **_time(models, context, sizes),
        }


def check(name: str, model: LanguageModel, length: int) -> None:
    """Compare greedy answers to two prompts with the argmax of one full forward pass each.

    Raises:
        OracleError: they differ.
    """
    rng = np.random.default_rng(0)
    # Parameters are arguments: as constants, XLA's CPU compiler has got them wrong (YNN fusions).
    graphdef, params = nnx.split(model)
    forward = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens))
    prompts = [rng.integers(256, size=size).tolist() for size in (length, length // 3)]
    rows = generate_batch(model, prompts, max_tokens=16, sampling=GREEDY, chunk_size=64)
    for prompt, answer in zip(prompts, zip(*rows, strict=True), strict=True):
        logits = np.asarray(
            forward(params, jnp.asarray([[*prompt, *answer]]))[0, len(prompt) - 1 : -1]
        )
        if (wrong := np.flatnonzero(logits.argmax(axis=-1) != answer)).size:
            raise OracleError(
                f"{name}, {len(prompt)} tokens of prompt: token {wrong[0]} of the answer is not "
                "the argmax of the full forward pass"
            )


class Stream:
    """A stream at a context's end: a call decodes its next token.

    Args:
        model: a language model.
        context: tokens that it is to have behind it.
        sizes: how many of them are read.
    """

    def __init__(self, model: LanguageModel, context: int, sizes: Sizes) -> None:
        self._graphdef, self._params = nnx.split(model)
        streams = new_streams(model, 1, max_length=context + 1)
        prompt = np.random.default_rng(1).integers(256, size=sizes.prompt).tolist()
        streams = read_prompts(
            self._graphdef, self._params, streams, [prompt], chunk_size=min(sizes.prompt, 512)
        )
        filled = _map_caches(lambda x: _filled(x, sizes.prompt, context), streams.state)
        self._streams = streams.replace(state=filled)
        self._greedy = jax.tree.map(jnp.asarray, SamplingArrays.of([GREEDY]))
        self._step = (
            jax.jit(self._decode, donate_argnums=1)
            .lower(self._params, self._streams, self._greedy)
            .compile()
        )
        self.state_bytes = _bytes(self._streams.state)
        self.parameter_bytes = _bytes(self._params)
        self.temporary_bytes = timing.temporary_bytes(self._step)

    def __call__(self) -> jax.Array:
        """Decode a token."""
        tokens, self._streams = self._step(self._params, self._streams, self._greedy)
        return tokens

    def _decode(
        self, params: nnx.State, streams: Streams, options: SamplingArrays
    ) -> tuple[jax.Array, Streams]:
        tokens, after = decode(self._graphdef, params, streams, options, steps=1)
        back = _map_caches(
            lambda new, old: new.replace(position=old.position), after.state, streams.state
        )
        return tokens, after.replace(state=back)


def _map_caches(change: Callable, state: Any, *others: Any) -> Any:
    """Change the caches of attention in a model's state."""

    def is_cache(x: Any) -> bool:
        return isinstance(x, AttentionState)

    return jax.tree.map(
        lambda x, *rest: change(x, *rest) if is_cache(x) else x, state, *others, is_leaf=is_cache
    )


def _filled(cache: AttentionState, read: int, context: int) -> AttentionState:
    """A cache as after `context` tokens, if it has room for them."""
    slots = cache.keys.shape[2]  # [periods, B, slots, ...]
    if slots < context:
        return cache

    def repeated(x: jax.Array) -> jax.Array:
        tiled = jnp.concatenate([x[:, :, :read]] * (context // read), axis=2)
        return x.at[:, :, :context].set(tiled)

    return cache.replace(
        keys=repeated(cache.keys),
        values=repeated(cache.values),
        segment_ids=repeated(cache.segment_ids),
        position=jnp.full_like(cache.position, context),
    )


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _time(models: dict[str, LanguageModel], context: int, sizes: Sizes) -> dict:
    streams = {name: Stream(model, context, sizes) for name, model in models.items()}
    samples = timing.measure(streams, sizes.budget)
    temporaries = {name: stream.temporary_bytes for name, stream in streams.items()}
    summary = timing.summarise(samples, temporaries, {name: name for name in REFERENCES})
    for contestant in summary["contestants"].values():
        ms = contestant["milliseconds"]
        rate = {"median": ms["median"], "lower": ms["upper"], "upper": ms["lower"]}
        contestant["tokens_per_second"] = {key: 1e3 / x for key, x in rate.items()}
    return {
        "parameters": {name: num_parameters(model) for name, model in models.items()},
        "state_bytes": {name: stream.state_bytes for name, stream in streams.items()},
        "parameter_bytes": {name: stream.parameter_bytes for name, stream in streams.items()},
        **summary,
    }
