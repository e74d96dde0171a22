"""The window an update trains with: drawn once per batch, alike in all processes and resumes."""

import dataclasses
import hashlib
import math

import numpy as np

from swr_jax.nn.language_model import LanguageModelConfig
from swr_jax.train.config import TrainConfig


def size_probabilities(config: TrainConfig, step: int) -> np.ndarray:
    """Probability of each of `config.window_schedule.sizes` at update `step`, float64.

    Args:
        config: the run; it must draw sizes.
        step: number of the update, from 1 to `config.steps`.
    """
    schedule = config.window_schedule
    own = np.asarray(schedule.probabilities, np.float64)
    # Less a hair, so that a tenth of 30 steps does not round up to 4.
    annealed = math.ceil(schedule.anneal_fraction * config.steps - 1e-6)
    into = step - (config.steps - annealed)  # 1 at the first update that is annealed
    if into <= 0:
        return own
    share = 1.0 if schedule.anneal == "switch" else into / annealed
    longest = np.asarray(schedule.sizes) == max(schedule.sizes)
    return (1 - share) * own + share * longest


def drawn_size(config: TrainConfig, step: int) -> int | None:
    """The size that update `step` trains with; None if the run draws none.

    A function of `config.window_schedule`, `config.seed` and `step` alone: no state is kept, so a
    resumed run repeats it and all processes agree. `config.steps` only says where annealing begins.

    Args:
        config: the run.
        step: number of the update, from 1 to `config.steps`.
    """
    sizes = config.window_schedule.sizes
    if not sizes:
        return None
    # A generator's stream may change with the library's version, a standard hash cannot.
    digest = hashlib.sha256(f"window {config.seed} {step}".encode()).digest()
    uniform = (int.from_bytes(digest[:8]) >> 11) / 2**53  # in [0, 1), exact
    bounds = np.cumsum(size_probabilities(config, step))
    return sizes[int(np.searchsorted(bounds / bounds[-1], uniform, side="right"))]


def drawn_models(config: TrainConfig) -> dict[int | None, LanguageModelConfig]:
    """The model for each value that `drawn_size` can take.

    All have the parameters of `config.model` and differ in what is drawn alone.
    """
    schedule, model = config.window_schedule, config.model
    if not schedule.sizes:
        return {None: model}
    group, _, name = schedule.option.rpartition(".")

    def of_size(size: int) -> LanguageModelConfig:
        if not group:
            return dataclasses.replace(model, **{name: size})
        options = dataclasses.replace(getattr(model, group), **{name: size})
        return dataclasses.replace(model, **{group: options})

    return {size: of_size(size) for size in schedule.sizes}
