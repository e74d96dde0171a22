"""Section `models`: the trainer's own update of four language models of equal size.

An update is what `experiments/pretrain.py` runs: forward and backward pass, gradient norm,
clipping, AdamW; float32, byte-sized vocabulary, tokens drawn at random, no document boundaries, as
many tokens an update at every length. Width and depth are the same in all, and the feed-forward
network of each is as wide as makes its parameters as many as Transformer++ has. Before anything is
timed, every model's loss and gradient norm are compared with those of the same model with each
block computed again in the backward pass: another program that must give the same numbers.
"""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np

from swr_jax.benchmark import timing
from swr_jax.benchmark.models import equal_models, parameters
from swr_jax.benchmark.oracle import OracleError
from swr_jax.benchmark.records import Session
from swr_jax.data import DataConfig
from swr_jax.nn.blocks import MLSTMConfig
from swr_jax.nn.language_model import LanguageModelConfig
from swr_jax.train.config import MeshConfig, TrainConfig
from swr_jax.train.sharding import batch_sharding, make_mesh, put_batch
from swr_jax.train.state import init_state, make_blueprint
from swr_jax.train.step import make_train_step

REFERENCES = ("transformer++",)
_TOLERANCE = 1e-4  # of loss and gradient norm, relative


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is timed."""

    tokens: tuple[int, ...]  # of a row
    tokens_per_update: int
    features: int
    depth: int
    num_heads: int
    window: int
    checked: int  # tokens of a row that is checked
    budget: timing.Budget


FULL = Sizes(
    tokens=tuple(2**n for n in range(10, 15)),
    tokens_per_update=16_384,
    features=256,
    depth=4,
    num_heads=4,
    window=512,
    checked=1024,
    budget=timing.Budget(seconds=90, min_rounds=3, max_rounds=15),
)
TINY = Sizes(
    tokens=(32, 64),
    tokens_per_update=64,
    features=32,
    depth=2,
    num_heads=2,
    window=16,
    checked=32,
    budget=timing.Budget(seconds=0, min_rounds=2, max_rounds=2),
)


def make_configs(sizes: Sizes) -> dict[str, LanguageModelConfig]:
    """The models by name, all with nearly as many parameters as Transformer++."""
    return equal_models(
        LanguageModelConfig(
            vocab_size=259,
            features=sizes.features,
            depth=sizes.depth,
            num_heads=sizes.num_heads,
            window=sizes.window,
            mlstm=MLSTMConfig(num_heads=sizes.num_heads),
        )
    )


def run(sizes: Sizes, session: Session) -> Iterator[dict]:
    """Check all models, then time their updates by turns at every length not yet measured.

    Yields:
        "case", "tokens" (of a row), "rows", "parameters" by name, and what `timing.summarise`
        returns, each contestant with its "tokens_per_second".

    Raises:
        OracleError: loss or gradient are not what the other program says.
    """
    waiting = [length for length in sizes.tokens if not session.is_done(_case(length))]
    if not waiting:
        return
    configs = make_configs(sizes)
    for name, config in configs.items():
        check(name, config, sizes)
    for length in waiting:
        yield _time(configs, length, sizes)


def _case(length: int) -> str:
    return f"T {length}"


def check(name: str, config: LanguageModelConfig, sizes: Sizes) -> None:
    """Compare an update's loss and gradient norm with and without rematerialisation.

    Raises:
        OracleError: they differ.
    """
    values = []
    for remat in ("none", "full"):
        update = Update(dataclasses.replace(config, remat=remat), 1, sizes.checked)
        metrics = jax.device_get(update())
        values.append({key: float(metrics[key]) for key in ("loss", "grad_norm")})
    for key, value in values[0].items():
        if not abs(value - values[1][key]) <= _TOLERANCE * abs(value):
            raise OracleError(
                f"{name}: {key} of an update is {value}, {values[1][key]} with rematerialisation"
            )


class Update:
    """A training run's update as a call: each continues from the last one's state.

    Args:
        config: the model.
        rows, length: of a batch.
    """

    def __init__(self, config: LanguageModelConfig, rows: int, length: int) -> None:
        data = DataConfig(sequence_length=length, batch_size=rows)
        run = TrainConfig(model=config, data=data, mesh=MeshConfig(data=1))
        mesh = make_mesh(run.mesh, jax.devices()[:1])
        blueprint = make_blueprint(run, mesh)
        self._state = init_state(run, blueprint)
        self._batch = put_batch(_batch(rows, length, config.vocab_size), batch_sharding(mesh))
        step = make_train_step(blueprint, mesh)
        self.program = step.lower(blueprint.abstract, self._batch).compile()

    def __call__(self) -> dict[str, jax.Array]:
        """Do an update; returns its metrics."""
        self._state, metrics = self.program(self._state, self._batch)
        return metrics


def _batch(rows: int, length: int, vocab_size: int) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, vocab_size, (rows, length + 1), np.int32)
    shape = (rows, length)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), shape),
        "loss_weights": np.ones(shape, np.float32),
        "target_bytes": np.ones(shape, np.int32),
    }


def _time(configs: dict[str, LanguageModelConfig], length: int, sizes: Sizes) -> dict:
    rows = max(1, sizes.tokens_per_update // length)
    updates = {name: Update(config, rows, length) for name, config in configs.items()}
    samples = timing.measure(updates, sizes.budget)
    temporaries = {n: timing.temporary_bytes(update.program) for n, update in updates.items()}
    found = timing.summarise(samples, temporaries, {name: name for name in REFERENCES})
    for name, contestant in found["contestants"].items():
        rates = rows * length / samples[name].seconds
        contestant["tokens_per_second"] = dataclasses.asdict(timing.spread(rates))
    return {
        "case": _case(length),
        "tokens": length,
        "rows": rows,
        "parameters": {name: parameters(config) for name, config in configs.items()},
        **found,
    }


def targets(measurements: list[dict]) -> list[dict]:
    """Judge what the Phalanx hybrid gains: 1.1 times at 4k tokens, 1.4 times at 32k."""
    judged = []
    for length, required in ((4096, 1.1), (32768, 1.4)):
        for m in measurements:
            if m["tokens"] == length:
                speedup = m["contestants"]["phalanx_hybrid"]["speedup"]["transformer++"]["median"]
                judged.append(
                    {
                        "what": f"phalanx_hybrid: speed over transformer++, update, T {length}",
                        "required": f">= {required}",
                        "measured": speedup,
                        "met": speedup >= required,
                    }
                )
    return judged
