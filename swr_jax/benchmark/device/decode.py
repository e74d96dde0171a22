"""Section `decode`: one token more for each of B streams, by models of equal size.

bfloat16 parameters and caches. A short prompt is read, then every step takes the likeliest next
token. Full attention's cache has room for the whole context and is read whole, whatever it holds,
so the context is the cache's size; other mixers keep a state of constant size. Steps continue each
other and are dispatched back to back. "read_bytes" are those of parameters and state, which a step
must read; "bandwidth" is what that makes a second.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from swr_jax.benchmark import timing
from swr_jax.benchmark.device import platform, training
from swr_jax.benchmark.models import PATTERNS as TRAINED
from swr_jax.benchmark.records import Session, first_line
from swr_jax.nn import LanguageModel, LanguageModelConfig

REFERENCES = ("transformer++",)
PATTERNS = {
    **{name: TRAINED[name] for name in ("phalanx_hybrid", "transformer++")},
    "phalanx_and_windows": ("phalanx", "swa"),
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is timed, in this order."""

    cases: tuple[tuple[str, int, int], ...]  # model, B, context
    models: dict[str, training.Model]
    prompt: int
    budget: timing.Budget


FULL = Sizes(
    cases=(("1.3B", 1, 8192), ("1.3B", 16, 8192), ("1.3B", 1, 131072)),
    models=training.MODELS,
    prompt=64,
    budget=timing.Budget(seconds=1.5, min_rounds=5, max_rounds=21),
)
TINY = Sizes(
    cases=(("tiny", 2, 64),),
    models=training.TINY_MODELS,
    prompt=4,
    budget=timing.Budget(seconds=0, min_rounds=2, max_rounds=2),
)


def run(sizes: Sizes, session: Session) -> Iterator[dict]:
    """Time steps of all models by turns.

    Yields:
        "case", "model", "batch", "tokens" (the context), "read_bytes" by name, and what
        `timing.summarise` returns, each contestant with its "bandwidth", bytes a second.
    """
    for name, batch, context in sizes.cases:
        case = f"{name}, B {batch}, context {context}"
        if session.is_done(case):
            continue
        if session.is_over():
            yield session.left_out(case)
            continue
        try:
            found = _time(sizes.models[name], batch, context, sizes)
        except jax.errors.JaxRuntimeError as error:
            yield session.left_out(case, first_line(error))
            continue
        yield {"case": case, "model": name, "batch": batch, "tokens": context, **found}


class Stream:
    """A model that decodes: a call computes the next token and keeps the state after it.

    Args:
        config: the model.
        prompt: [B, T] tokens to start from.
        context: tokens that full attention's cache has room for.
    """

    def __init__(self, config: LanguageModelConfig, prompt: jax.Array, context: int) -> None:
        self._prompt, self._context = prompt, context

        @jax.jit
        def parameters() -> nnx.State:
            return nnx.state(LanguageModel(config, rngs=nnx.Rngs(0)), nnx.Param)

        self._graphdef = nnx.graphdef(
            nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
        )
        self._parameters = parameters()

    def lower_read(self) -> jax.stages.Lowered:
        """Lower what reads the prompt."""
        return jax.jit(self._read).lower(self._parameters, self._prompt)

    def lower_step(self) -> jax.stages.Lowered:
        """Lower a step."""
        tokens, state = jax.eval_shape(self._read, self._parameters, self._prompt)
        return jax.jit(self._step, donate_argnums=2).lower(self._parameters, tokens, state)

    def start(self, read: jax.stages.Compiled, step: jax.stages.Compiled) -> None:
        """Read the prompt."""
        self._tokens, self._state = read(self._parameters, self._prompt)
        self._compiled = step

    def __call__(self) -> jax.Array:
        """Start the next step; returns the tokens that it will decide on."""
        self._tokens, self._state = self._compiled(self._parameters, self._tokens, self._state)
        return self._tokens

    @property
    def read_bytes(self) -> int:
        """Bytes of parameters and state."""
        return sum(x.nbytes for x in jax.tree.leaves((self._parameters, self._state)))

    def _read(self, parameters: nnx.State, prompt: jax.Array):
        model = nnx.merge(self._graphdef, parameters)
        state = model.init_state(prompt.shape[0], max_length=self._context)
        return _choose(*model(prompt, state=state))

    def _step(self, parameters: nnx.State, tokens: jax.Array, state):
        return _choose(*nnx.merge(self._graphdef, parameters)(tokens, state=state))


def _choose(logits: jax.Array, state) -> tuple[jax.Array, object]:
    return jnp.argmax(logits[:, -1:], axis=-1).astype(jnp.int32), state


def _time(model: training.Model, batch: int, context: int, sizes: Sizes) -> dict:
    prompt = jax.random.randint(jax.random.key(0), (batch, sizes.prompt), 0, model.vocab_size)
    streams = {
        name: Stream(model.config(pattern=pattern, param_dtype="bfloat16"), prompt, context)
        for name, pattern in PATTERNS.items()
    }
    compiled = timing.compile_all(
        {(name, "read"): stream.lower_read for name, stream in streams.items()}
        | {(name, "step"): stream.lower_step for name, stream in streams.items()}
    )
    for program in compiled.values():
        if isinstance(program, Exception):
            raise program
    for name, stream in streams.items():
        stream.start(compiled[name, "read"], compiled[name, "step"])
    # Steps depend on each other, so any number of them may be dispatched.
    in_flight = dict.fromkeys(streams, 64) if platform.is_pipelined() else None
    samples = timing.measure(streams, sizes.budget, in_flight=in_flight)
    temporaries = {name: timing.temporary_bytes(compiled[name, "step"]) for name in streams}
    summary = timing.summarise(samples, temporaries, {name: name for name in REFERENCES})
    read = {name: stream.read_bytes for name, stream in streams.items()}
    for name, contestant in summary["contestants"].items():
        ms = contestant["milliseconds"]
        rate = {"median": ms["median"], "lower": ms["upper"], "upper": ms["lower"]}
        contestant["bandwidth"] = {key: read[name] / (x / 1e3) for key, x in rate.items()}
    return {"read_bytes": read, "left_out": {}, **summary}
