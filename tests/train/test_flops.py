"""FLOPs of a model's training, counted again by hand."""

import jax
import pytest
from flax import nnx

from swr_jax.nn.blocks import MIXERS, GatedDeltaConfig, MLSTMConfig
from swr_jax.nn.language_model import LanguageModelConfig
from swr_jax.train.flops import flops_per_token


def test_flops_count_parameters_and_the_pairs_that_attention_sees():
    length, features, window = 12, 8, 5
    config = LanguageModelConfig(
        vocab_size=10,
        features=features,
        depth=6,
        pattern=("phalanx", "swa", "attention"),
        num_heads=2,
        window=window,
        tie_embeddings=False,
    )
    pairs = {
        "attention": sum(1 for i in range(length) for j in range(length) if j <= i),
        "swa": sum(1 for i in range(length) for j in range(length) if i - window < j <= i),
    }
    # Two layers of each kind; q·k and weights·v, 2 FLOPs per product, backward twice as many.
    attention = 2 * sum(pairs.values()) * features * 2 * 2 * 3 / length
    expected = 6 * (1000 - 10 * features) + attention
    assert flops_per_token(config, num_params=1000, length=length) == pytest.approx(expected)


def test_flops_of_heads_count_their_own_features():
    # Four times the features / num_heads that they would have.
    config = LanguageModelConfig(
        vocab_size=10, features=8, depth=2, pattern=("attention",), num_heads=2, head_dim=16
    )
    pairs = 12 * 13 / 2
    attention = 2 * pairs * (2 * 16) * 2 * 2 * 3 / 12
    expected = 6 * 1000 + attention
    assert flops_per_token(config, num_params=1000, length=12) == pytest.approx(expected)


def test_flops_count_what_matrix_memories_do():
    features, heads = 48, 3
    config = LanguageModelConfig(
        vocab_size=10,
        features=features,
        depth=4,
        pattern=("mlstm", "gated_delta"),
        num_heads=2,
        mlstm=MLSTMConfig(num_heads=heads, qk_dim_factor=0.5, v_dim_factor=1.0),
        gated_delta=GatedDeltaConfig(num_heads=heads, head_dim=12, expand_v=1.5),
    )
    # Products of one head and token, each 2 FLOPs: C + k v' and C'q; S k, S + u k' and S q.
    mlstm = 2 * (8 * 16 + 8 * 16)
    gated_delta = 2 * (12 * 18 + 12 * 18 + 12 * 18)
    expected = 6 * 1000 + 2 * heads * (mlstm + gated_delta) * 3  # two of each, backward twice that
    assert flops_per_token(config, num_params=1000, length=64) == pytest.approx(expected)
    for name, dims in (("mlstm", (8, 16)), ("gated_delta", (12, 18))):
        mixer = MIXERS[name](config, nnx.Rngs(0))
        sizes = {x.shape[-2:] for x in jax.tree.leaves(mixer.init_state(1, max_length=1))}
        assert dims in sizes
