"""The published models' configurations have the published numbers of parameters."""

import importlib
from pathlib import Path

import pytest
from flax import nnx

from swr_jax.nn.language_model import LanguageModel, num_parameters
from swr_jax.train.config import make_train_config

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.mark.parametrize(
    ("name", "published", "mixers"),
    [
        ("swax_1b", 1.4e9, {"swa": 12, "mlstm": 12}),
        ("swax_7b", 7e9, {"swa": 16, "mlstm": 16}),
        ("xlstm_1b", 1.4e9, {"mlstm": 24}),
    ],
)
def test_parameters_are_within_two_percent_of_the_published_number(
    name, published, mixers, monkeypatch
):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    values = importlib.import_module(f"configs.{name}").get_config()
    config = make_train_config(values.to_dict()).model
    model = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    count = num_parameters(model)
    assert abs(count / published - 1) <= 0.02

    # The same number by hand. Four M x M per mixer, mLSTM's gates and norm besides; three matrices
    # of SwiGLU and two norms per block; embedding, output and the last norm.
    width, heads = config.features, config.mlstm.num_heads
    extra = {"swa": 0, "mlstm": 2 * heads * (width + 1) + width}
    hidden = {2048: 5504, 4096: 10_944}[width]
    assert count == 2 * config.vocab_size * width + width + sum(
        number * (4 * width**2 + extra[mixer] + 3 * width * hidden + 2 * width)
        for mixer, number in mixers.items()
    )
