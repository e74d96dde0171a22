"""Sections `training` and `large`: whole updates of a model and of Transformer++, side by side.

An update is the forward and backward pass of a language model, the global gradient norm, clipping
and AdamW, on one device: bfloat16 activations, float32 parameters and optimizer state, every block
computed again in the backward pass ("full" rematerialisation), a vocabulary of 32,000, tokens drawn
at random, no document boundaries, windows of 512. Models have the same width and depth, and
feed-forward networks that make their parameters as many; in hybrids every other mixer is attention.
Attention is what the project's operator picks on this device, and the record says which.

"flops" is what `swr_jax.train.flops` counts; what is computed again is not in it.
"product_fraction" is their rate over that of a large bfloat16 product of matrices on this device.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from swr_jax.benchmark import timing
from swr_jax.benchmark.device import platform, speed
from swr_jax.benchmark.models import equal_models
from swr_jax.benchmark.records import Session, first_line
from swr_jax.nn import LanguageModel, LanguageModelConfig
from swr_jax.ops.attention import implementation_of
from swr_jax.train.flops import flops_per_token

REFERENCES = ("transformer++",)


@dataclasses.dataclass(frozen=True)
class Model:
    """The shape of all models."""

    features: int
    depth: int
    num_heads: int
    vocab_size: int = 32_000

    def config(self, **options: object) -> LanguageModelConfig:
        """Return the configuration of one of them."""
        return LanguageModelConfig(
            **dataclasses.asdict(self),
            window=512,
            rope_base=500_000.0,
            dtype="bfloat16",
            **options,
        )


# By how many parameters they have, roughly; heads of 128 features.
MODELS = {"1.3B": Model(2048, 24, 16), "350M": Model(1024, 24, 8)}
TINY_MODELS = {"tiny": Model(16, 2, 2, vocab_size=32)}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is timed, in this order."""

    cases: tuple[tuple[str, int, str], ...]  # model's size, T, and who meets Transformer++
    tokens: int
    models: dict[str, Model]
    budget: timing.Budget


FULL = Sizes(
    cases=(
        ("1.3B", 4096, "phalanx_hybrid"),
        ("1.3B", 32768, "phalanx_hybrid"),
        ("350M", 4096, "phalanx_hybrid"),
        ("350M", 32768, "phalanx_hybrid"),
        ("1.3B", 16384, "phalanx_hybrid"),
        ("1.3B", 8192, "phalanx_hybrid"),
        ("350M", 16384, "phalanx_hybrid"),
        ("350M", 8192, "phalanx_hybrid"),
    ),
    tokens=32768,
    models=MODELS,
    budget=timing.Budget(seconds=5, min_rounds=4, max_rounds=15),
)
EVERY = dataclasses.replace(
    FULL,
    cases=tuple(
        itertools.product(
            MODELS, (4096, 32768, 8192, 16384), ("phalanx_hybrid", "swax", "swa_hybrid")
        )
    ),
)
TINY = Sizes(
    cases=(("tiny", 16, "phalanx_hybrid"),),
    tokens=32,
    models=TINY_MODELS,
    budget=timing.Budget(seconds=0, min_rounds=2, max_rounds=2),
)
EVERY_TINY = dataclasses.replace(TINY, cases=(*TINY.cases, ("tiny", 16, "swax")))


def run(sizes: Sizes, session: Session) -> Iterator[dict]:
    """Time updates of two models by turns, where their states fit into memory together.

    Yields:
        "case", "model", "tokens" (T), "batch", "attention" (its implementation), "parameters" and
        "flops" (of an update) by name, and what `contest.hold` returns.
    """
    for name, length, rival in sizes.cases:
        case = f"{name} {rival}, T {length}"
        if session.is_done(case):
            continue
        if session.is_over():
            yield session.left_out(case)
            continue
        shape = (max(1, sizes.tokens // length), length)
        model = sizes.models[name]
        try:
            found = _time(model, shape, rival, sizes.budget)
        except jax.errors.JaxRuntimeError as error:
            yield session.left_out(case, first_line(error))
            continue
        if rate := speed.best(session.others.get("speed"), "product", "bfloat16"):
            for contestant, timed in found["contestants"].items():
                ms = timed["milliseconds"]
                achieved = {"median": ms["median"], "lower": ms["upper"], "upper": ms["lower"]}
                timed["product_fraction"] = {
                    key: found["flops"][contestant] / (value / 1e3) / rate
                    for key, value in achieved.items()
                }
        heads = (*shape, model.num_heads, model.features // model.num_heads)
        yield {
            "case": case,
            "model": name,
            "tokens": length,
            "batch": shape[0],
            "attention": implementation_of(jax.ShapeDtypeStruct(heads, jnp.bfloat16)),
            **found,
        }


class Update:
    """A model's update as a call that keeps its state: each continues from the last one's.

    Args:
        config: the model.
    """

    def __init__(self, config: LanguageModelConfig) -> None:
        self._graphdef, abstract = nnx.split(
            nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))), nnx.Param
        )
        self._optimizer = optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(3e-4, b2=0.95, weight_decay=0.1)
        )
        self.parameters = sum(x.size for x in jax.tree.leaves(abstract))
        self._config = config
        self.abstract = jax.eval_shape(self._start)

    def _start(self) -> tuple:
        model = LanguageModel(self._config, rngs=nnx.Rngs(0))
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        return params, self._optimizer.init(params)

    def start(self) -> None:
        """Allocate the state."""
        self._state = jax.jit(self._start)()

    def update(self, state: tuple, tokens: jax.Array) -> tuple[tuple, jax.Array]:
        """Return the state after learning from tokens [B, T + 1], and the loss before it."""
        params, memory = state

        def loss(params) -> jax.Array:
            logits = nnx.merge(self._graphdef, params)(tokens[:, :-1])
            targets = tokens[:, 1:]
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))

        value, gradient = jax.value_and_grad(loss)(params)
        step, memory = self._optimizer.update(gradient, memory, params)
        return (optax.apply_updates(params, step), memory), value

    def lower(self, tokens: jax.ShapeDtypeStruct) -> jax.stages.Lowered:
        """Lower the update, which takes its state's place."""
        return jax.jit(self.update, donate_argnums=0).lower(self.abstract, tokens)

    def caller(self, program: jax.stages.Compiled, batches: list[jax.Array]) -> timing.Rotation:
        """Return the call to time."""

        def advance(tokens: jax.Array) -> jax.Array:
            self._state, loss = program(self._state, tokens)
            return loss

        return timing.Rotation(advance, [(tokens,) for tokens in batches])


def _time(model: Model, shape: tuple[int, int], rival: str, budget: timing.Budget) -> dict:
    batch, length = shape
    every = equal_models(model.config(remat="full"))
    configs = {name: every[name] for name in (rival, *REFERENCES)}
    updates = {name: Update(config) for name, config in configs.items()}
    tokens = jax.ShapeDtypeStruct((batch, length + 1), jnp.int32)
    programs = timing.compile_all(
        {name: functools.partial(update.lower, tokens) for name, update in updates.items()}
    )
    left_out = {
        name: f"does not compile: {first_line(program)}"
        for name, program in programs.items()
        if isinstance(program, Exception)
    }
    programs = {name: program for name, program in programs.items() if name not in left_out}
    free = platform.free_bytes()
    states = {
        name: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(update.abstract))
        for name, update in updates.items()
    }
    for name in list(programs):
        # All states are there while one update works; who comes first stays.
        needed = sum(states[n] for n in programs) + timing.temporary_bytes(programs[name])
        if free is not None and needed > free:
            left_out[name] = f"needs {(needed - free) / 2**30:.1f} GiB more memory than is free"
    if left_out:
        # A model by itself has nothing to be compared with.
        return {"rounds": 0, "contestants": {}, "left_out": left_out}
    batches = [
        jax.random.randint(jax.random.key(i), tokens.shape, 0, model.vocab_size) for i in range(2)
    ]
    calls = {}
    for name, program in programs.items():
        updates[name].start()
        calls[name] = updates[name].caller(program, batches)
    pipelined = dict.fromkeys(calls, 2) if platform.is_pipelined() else None
    samples = timing.measure(calls, budget, in_flight=pipelined)
    temporaries = {name: timing.temporary_bytes(program) for name, program in programs.items()}
    parameters = {name: updates[name].parameters for name in calls}
    return {
        "parameters": parameters,
        "flops": {
            name: batch * length * flops_per_token(configs[name], num_params=count, length=length)
            for name, count in parameters.items()
        },
        **timing.summarise(samples, temporaries, {name: name for name in REFERENCES}),
        "left_out": left_out,
    }
