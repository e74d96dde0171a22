"""Section `loop`: what the trainer costs beside its updates.

The small Phalanx hybrid on Python's own library, from text to checkpoints, as `make train` runs it:
metrics every 10 updates, a checkpoint every 100. In every round `swr_jax.train.loop.train` runs
once in a new folder, and then the same compiled update runs by itself, from its own last state, on
one batch that is there already. Compilation and evaluation are left out of both.

"overhead" is the run's time over that of its updates by themselves, less 1: waiting for data,
placing them, reading numbers back, reporting, and what checkpoints hold up. "reports" and
"checkpoints" are the shares that the loop itself has timed; what they leave of the overhead is the
input pipeline and what writing in the background takes from the processor.
"""

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from swr_jax.benchmark import timing
from swr_jax.benchmark.records import Session
from swr_jax.benchmark.updates import Update
from swr_jax.data import DataConfig, load_tokenizer
from swr_jax.nn.language_model import LanguageModelConfig
from swr_jax.train.config import OptimizerConfig, TrainConfig
from swr_jax.train.loop import train

LIMIT = 0.03


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is timed."""

    steps: int
    rounds: int
    features: int
    rows: int
    length: int


FULL = Sizes(steps=100, rounds=3, features=128, rows=16, length=256)
TINY = Sizes(steps=6, rounds=1, features=16, rows=2, length=32)


def make_config(sizes: Sizes) -> TrainConfig:
    """The run that is timed."""
    return TrainConfig(
        model=LanguageModelConfig(
            vocab_size=load_tokenizer("bytes").vocab_size,
            features=sizes.features,
            depth=4,
            num_heads=4,
        ),
        data=DataConfig(source="python", batch_size=sizes.rows, sequence_length=sizes.length),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=30),
        steps=sizes.steps,
        log_every=10,
        eval_every=sizes.steps,
        eval_batches=1,
        checkpoint_every=100,
        sample_tokens=0,
    )


def run(sizes: Sizes, session: Session) -> Iterator[dict]:
    """Time the loop and its updates by turns.

    Yields:
        "case", "steps", "rounds", "seconds" per step of "loop" and "update", and "overhead",
        "reports" and "checkpoints" relative to the updates: medians and quartiles over rounds.
    """
    case = f"T {sizes.length}, {sizes.rows} rows"
    if session.is_done(case):
        return
    config = make_config(sizes)
    update = Update(config.model, sizes.rows, sizes.length)
    samples: dict[str, list[float]] = {"loop": [], "update": [], "reports": [], "checkpoints": []}
    jax.block_until_ready(update())
    for _ in range(sizes.rounds):
        with tempfile.TemporaryDirectory() as folder:
            summary = train(config, Path(folder) / "run")
        tokens = sizes.rows * sizes.length
        between = {part: summary.seconds[part] / sizes.steps for part in ("reports", "checkpoints")}
        samples["loop"].append(tokens / summary.tokens_per_second + sum(between.values()))
        for part, seconds in between.items():
            samples[part].append(seconds)
        began = time.perf_counter()
        for _ in range(sizes.steps):
            metrics = update()
        jax.block_until_ready(metrics)
        samples["update"].append((time.perf_counter() - began) / sizes.steps)
    found = {name: np.array(seconds) for name, seconds in samples.items()}

    def spread(values: np.ndarray) -> dict:
        return dataclasses.asdict(timing.spread(values))

    yield {
        "case": case,
        "steps": sizes.steps,
        "rounds": sizes.rounds,
        "seconds": {name: spread(found[name]) for name in ("loop", "update")},
        "overhead": spread(found["loop"] / found["update"] - 1),
        "reports": spread(found["reports"] / found["update"]),
        "checkpoints": spread(found["checkpoints"] / found["update"]),
    }


def targets(measurements: list[dict]) -> list[dict]:
    """Judge the overhead."""
    (found,) = measurements
    overhead = found["overhead"]
    return [
        {
            "what": "input pipeline, logging and checkpoints, over the time of the updates",
            "required": f"< {LIMIT}",
            "measured": overhead["median"],
            "quartiles": [overhead["lower"], overhead["upper"]],
            "met": overhead["median"] < LIMIT,
        }
    ]
