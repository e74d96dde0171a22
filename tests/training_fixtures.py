"""Fixtures: a corpus and a configuration small enough to train on in a test."""

import itertools
from pathlib import Path

import jax
import numpy as np
import pytest

from swr_jax.data import DataConfig
from swr_jax.nn.language_model import LanguageModelConfig
from swr_jax.train import loop
from swr_jax.train.config import OptimizerConfig, TrainConfig


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty documents of words: letters of a word follow from each other, words do not."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = np.array(["window", "block", "carrier", "décay", "gate", "窗口"])
    for number in range(40):
        text = " ".join(rng.choice(words, size=60))
        (folder / f"{number:02}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def config(corpus_folder: Path) -> TrainConfig:
    """Two blocks of width 16, 8 rows of 32 bytes; with every device in the data axis."""
    return TrainConfig(
        model=LanguageModelConfig(
            vocab_size=264,  # the 259 ids of bytes, and some to be divisible by 8
            features=16,
            depth=2,
            pattern=("phalanx", "attention"),
            num_heads=2,
        ),
        data=DataConfig(
            source=str(corpus_folder),
            sequence_length=32,
            batch_size=8,
            validation_fraction=0.1,
            shuffle_tokens=4096,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=4),
        steps=40,
        log_every=1,
        eval_every=20,
        eval_batches=4,
        checkpoint_every=10,
        sample_tokens=0,
    )


@pytest.fixture
def tamper_with_training_batches(monkeypatch: pytest.MonkeyPatch):
    """Call it with `tamper(number, batch) -> batch`; batches of the next run count from 1."""
    put_batch = loop.put_batch

    def install(tamper) -> None:
        numbers = itertools.count(1)
        monkeypatch.setattr(
            loop,
            "put_batch",
            lambda batch, sharding: put_batch(tamper(next(numbers), batch), sharding),
        )

    return install


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in the loop use one device of the eight, so that their updates take no time."""
    make_mesh = loop.make_mesh
    monkeypatch.setattr(loop, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))
