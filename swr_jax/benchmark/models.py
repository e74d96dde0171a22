"""Language models of equal size and different mixers, to be compared with each other."""

import dataclasses

from flax import nnx

from swr_jax.nn.language_model import LanguageModel, LanguageModelConfig, num_parameters

PATTERNS = {
    "phalanx_hybrid": ("phalanx", "attention"),
    "transformer++": ("attention",),
    "swa_hybrid": ("swa", "attention"),
    "swax": ("swa", "mlstm"),
}
_MLP_STEP = 8  # by which the width of feed-forward networks is changed


def equal_models(base: LanguageModelConfig) -> dict[str, LanguageModelConfig]:
    """Give `base` every pattern of `PATTERNS`, by name, with as many parameters as Transformer++.

    Width and depth are those of `base`; the feed-forward networks' width makes up for the mixers.
    """
    goal = parameters(dataclasses.replace(base, pattern=PATTERNS["transformer++"]))
    found = {}
    for name, pattern in PATTERNS.items():
        plain = dataclasses.replace(base, pattern=pattern)
        more = (goal - parameters(plain)) / (3 * base.features * base.depth)
        wide = plain.hidden_features + _MLP_STEP * round(more / _MLP_STEP)
        found[name] = dataclasses.replace(plain, mlp_features=wide)
    return found


def parameters(config: LanguageModelConfig) -> int:
    """Number of parameters of a model."""
    return num_parameters(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))
