"""A small corpus for the tests of the data pipeline."""

import pytest
from data.batches import random_documents, write_corpus

from swr_jax.data import DataConfig


@pytest.fixture
def config(tmp_path) -> DataConfig:
    """Sixty documents, one of them many rows long, and windows much smaller than the corpus."""
    documents = [*random_documents(59, 40), "long " * 100]
    return DataConfig(
        source=write_corpus(tmp_path, documents),
        sequence_length=16,
        batch_size=4,
        shuffle_tokens=256,
        validation_fraction=0.2,
    )
