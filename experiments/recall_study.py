"""What `recall.py` runs: which models, on which rows, and which of their paths carry the recall."""

import dataclasses
import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from swr_jax.data import DataConfig
from swr_jax.eval.mqar import (
    MQARConfig,
    accuracy_by_distance,
    mqar_batch,
    mqar_training_batch,
)
from swr_jax.nn.blocks import GatedDeltaConfig, MLSTMConfig
from swr_jax.nn.language_model import LanguageModelConfig
from swr_jax.train.config import MeshConfig, OptimizerConfig, TrainConfig, WindowScheduleConfig
from swr_jax.train.sharding import batch_sharding, make_mesh, put_batch
from swr_jax.train.state import Blueprint, Params, init_state, make_blueprint
from swr_jax.train.step import make_train_step
from swr_jax.train.window_schedule import drawn_models, drawn_size

SHORT, LONG = 8, 64  # windows, as far apart as 128 and 1024
VOCABULARY, PAIRS = 64, 8
ROW, ROWS = 128, 4  # tokens per row, rows per update
LENGTHS = (8, 16, 32, 64, 128)  # of a training row's tasks: short ones teach the mechanism sooner
TEST_LENGTHS = (128, 256)  # the longest trained length, and twice it
EDGES = (1, SHORT, 16, 32, LONG, 128, 256)
# The models' own initial embedding, of standard deviation 0.02, is drowned in what untrained blocks
# add to it; of standard deviation 1 the task is learned in half as many updates, or at all.
EMBEDDING_SCALE = 50
_TEST_SEED = 1 << 31  # no training seed
SETTING = {
    "windows": [SHORT, LONG],
    "vocabulary": VOCABULARY,
    "pairs": PAIRS,
    "rows_per_update": ROWS,
    "row_tokens": ROW,
    "training_lengths": LENGTHS,
    "test_lengths": TEST_LENGTHS,
    "embedding_scale": EMBEDDING_SCALE,
    "chance": {"any value": 2 / VOCABULARY, "one of the row's values": 1 / PAIRS},
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model and the windows that it trains with; two of them are drawn from, half and half."""

    pattern: tuple[str, ...]
    windows: tuple[int, ...] = ()


def _hybrids(name: str, mixer: str) -> dict[str, Variant]:
    schedules = {
        f"window {SHORT}": (SHORT,),
        f"window {LONG}": (LONG,),
        f"stochastic {SHORT} or {LONG}": (SHORT, LONG),
    }
    return {f"{name}, {w}": Variant(("swa", mixer), sizes) for w, sizes in schedules.items()}


VARIANTS = {
    **_hybrids("SWAX", "mlstm"),
    **_hybrids("SWA + Gated DeltaNet", "gated_delta"),
    f"SWA alone, window {SHORT}": Variant(("swa",), (SHORT,)),
    f"SWA alone, window {LONG}": Variant(("swa",), (LONG,)),
    "mLSTM alone": Variant(("mlstm",)),
}


def task(length: int) -> MQARConfig:
    """Return the task of `length` tokens: as many pairs as fit, at most `PAIRS`."""
    return MQARConfig(
        vocab_size=VOCABULARY,
        sequence_length=length,
        pairs=min(length // 4, PAIRS),
        random_filler=False,
    )


def train_config(variant: Variant, *, seed: int, steps: int) -> TrainConfig:
    """Return the configuration of a run; its data are those of `training_batch`, not its own."""
    drawn = len(variant.windows) > 1
    return TrainConfig(
        model=LanguageModelConfig(
            vocab_size=VOCABULARY,
            features=32,
            depth=4,
            pattern=variant.pattern,
            num_heads=2,
            window=max(variant.windows, default=LONG),
            mlp_features=64,
            # Memories of equal size: two heads of 16 x 16.
            mlstm=MLSTMConfig(num_heads=2, qk_dim_factor=1.0, chunk_size=64),
            gated_delta=GatedDeltaConfig(num_heads=2, head_dim=16, expand_v=1.0, chunk_size=32),
        ),
        data=DataConfig(),
        optimizer=OptimizerConfig(
            learning_rate=3e-3, warmup_steps=30, beta2=0.98, weight_decay=0.01
        ),
        mesh=MeshConfig(data=1),
        window_schedule=WindowScheduleConfig(
            sizes=variant.windows if drawn else (), probabilities=(0.5, 0.5) if drawn else ()
        ),
        steps=steps,
        seed=seed,
    )


def training_batch(seed: int, step: int) -> dict[str, np.ndarray]:
    """Return the batch of one update, the same for all models: rows of tasks of drawn lengths."""
    lengths = np.random.default_rng((seed, step)).choice(LENGTHS, size=ROWS)
    return mqar_training_batch(
        [task(int(length)) for length in lengths], row_length=ROW, seed=(seed, step)
    )


def without(params: Params, pattern: tuple[str, ...], mixer: str) -> Params:
    """Return the parameters with what every `mixer` adds to the residual stream set to zero."""
    periods = dict(params["periods"])
    for number, name in enumerate(pattern):
        if name == mixer:
            block = periods[number]
            output = jax.tree.map(jnp.zeros_like, block["mixer"]["output"])
            periods[number] = block | {"mixer": block["mixer"] | {"output": output}}
    return params | {"periods": periods}


def make_answer(blueprint: Blueprint, config: TrainConfig, window: int) -> Callable:
    """Return a jitted function from parameters and rows to whether each query is answered."""
    model = dataclasses.replace(config.model, window=window)
    graphdef = blueprint.of_model(model).graphdef

    @jax.jit
    def answer(params: Params, rows: dict[str, jax.Array]) -> jax.Array:
        model = nnx.merge(graphdef, params)
        queries = rows["query_positions"][..., None]
        hidden = jnp.take_along_axis(model.hidden(rows["tokens"]), queries, axis=1)
        return jnp.argmax(model.logits(hidden), axis=-1) == rows["answers"]

    return answer


def score(answer: Callable, params: Params, length: int, *, rows: int, parts: int) -> dict:
    """Return the accuracy on test rows of `length` tokens, overall and by distance."""
    correct, distances = [], []
    for part in range(parts):
        batch = mqar_batch(task(length), batch_size=rows, seed=(_TEST_SEED, length, part))
        correct.append(np.asarray(answer(params, batch)))
        distances.append(batch["distances"])
    ranges = accuracy_by_distance(np.stack(correct), np.stack(distances), edges=EDGES)
    by_distance = [r | {"accuracy": round(r["accuracy"], 4)} for r in ranges if r["queries"]]
    return {"accuracy": round(float(np.mean(correct)), 4), "by_distance": by_distance}


def conditions(pattern: tuple[str, ...]) -> dict[str, tuple[int, str | None]]:
    """Return what a model is tested under: by name, the window and the mixer without effect."""
    named: dict[str, tuple[int, str | None]] = {
        f"window {window}": (window, None) for window in (SHORT, LONG)
    }
    if "swa" in pattern:
        named["window 2"] = (2, None)
        for mixer in set(pattern) - {"swa"}:
            named["no attention"] = (SHORT, "swa")
            named |= {f"window {w}, no recurrence": (w, mixer) for w in (SHORT, LONG)}
    return named


def run(name: str, *, seed: int, steps: int, test_parts: int = 16) -> dict:
    """Train one model, then test it whole and with a path removed."""
    variant = VARIANTS[name]
    config = train_config(variant, seed=seed, steps=steps)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    blueprint = make_blueprint(config, mesh)
    state = init_state(config, blueprint)
    state.params["embedding"] = state.params["embedding"] * EMBEDDING_SCALE
    updates = {
        size: make_train_step(blueprint.of_model(model), mesh)
        for size, model in drawn_models(config).items()
    }
    answers = {
        window: make_answer(blueprint, config, window)
        for window, _ in conditions(variant.pattern).values()
    }
    sharding = batch_sharding(mesh)
    began, curve, losses = time.process_time(), [], []
    for step in range(1, steps + 1):
        batch = put_batch(training_batch(seed, step), sharding)
        state, metrics = updates[drawn_size(config, step)](state, batch)
        losses.append(metrics["loss"])
        if step % max(steps // 10, 1) == 0 or step == steps:
            tested = score(answers[config.model.window], state.params, ROW, rows=32, parts=2)
            loss = round(float(np.mean(jax.device_get(losses))), 4)
            curve.append({"step": step, "training_loss": loss} | tested)
            losses.clear()

    tests = {}
    for condition, (window, removed) in conditions(variant.pattern).items():
        params = state.params
        if removed:
            params = without(params, variant.pattern, removed)
        lengths = TEST_LENGTHS[:1] if window == 2 or removed == "swa" else TEST_LENGTHS
        tests[condition] = {
            str(length): score(answers[window], params, length, rows=32, parts=test_parts)
            for length in lengths
        }
    return {
        "seed": seed,
        "parameters": blueprint.num_params,
        "cpu_seconds": round(time.process_time() - began, 1),
        "cores": len(os.sched_getaffinity(0)),
        "curve": curve,
        "tests": tests,
    }
