"""What a student learns from its teacher: outputs of the layers that are new, and predictions.

Both are sums over tokens that weigh as in the ordinary loss, so that means over a batch do not
depend on how it is cut into micro-batches. Losses are float32 whatever the models' dtypes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from swr_jax.nn.language_model import LanguageModel
from swr_jax.train.config import DistillConfig
from swr_jax.train.state import Params

Hidden = dict[int, jax.Array]  # outputs [B, T, M] of blocks, by the number of the layer


@dataclasses.dataclass(frozen=True)
class Distillation:
    """What is known of a distillation before any array of the teacher exists.

    config: weights and temperature. layers: numbers of the new ones. graphdef: the teacher without
    its parameters. abstract: those as ShapeDtypeStructs, each with its sharding.
    """

    config: DistillConfig
    layers: tuple[int, ...]
    graphdef: nnx.GraphDef
    abstract: Params

    @property
    def asks_teacher(self) -> bool:
        """Whether the loss depends on what the teacher says."""
        return self.config.hidden > 0 or self.config.logits > 0

    @property
    def compared(self) -> tuple[int, ...]:
        """Numbers of the layers whose outputs the loss depends on."""
        return self.layers if self.config.hidden > 0 else ()

    def loss(
        self,
        sums: Mapping[str, jax.Array],
        student: tuple[jax.Array, Hidden],
        teacher: tuple[jax.Array, Hidden] | None,
        weights: jax.Array,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The weighted sum of all losses, and the sum over tokens of each that is new.

        Args:
            sums: the student's `loss_sums`.
            student, teacher: what `logits_and_hidden` returned; no teacher where none is asked.
            weights: [B, T], those of the tokens in the ordinary loss.
        """
        config, weights = self.config, weights.astype(jnp.float32)
        loss, found = config.cross_entropy * sums["nats"], {}
        if config.hidden > 0:
            pair = (student[1], teacher[1])
            found["hidden_loss"] = hidden_distance(*pair, weights)
            loss += config.hidden * found["hidden_loss"]
        if config.logits > 0:
            pair = (student[0], teacher[0])
            found["logits_loss"] = divergence(*pair, weights, temperature=config.temperature)
            loss += config.logits * found["logits_loss"]
        return loss, found


class _Recorder(nnx.Module):
    """A block that hands out its output in the place of a new state."""

    def __init__(self, block: nnx.Module):
        self.block = block

    def __call__(self, x: jax.Array, *, state: Any, **options: Any) -> tuple[jax.Array, jax.Array]:
        del state
        x, _ = self.block(x, **options, state=None)
        return x, x

    def absorb(self, state: Any, added: jax.Array) -> jax.Array:
        del state
        return added


def logits_and_hidden(
    model: LanguageModel, layers: Sequence[int], tokens: jax.Array, **options: Any
) -> tuple[jax.Array, Hidden]:
    """Logits as of a call, and the outputs of some layers' blocks.

    Args:
        model: not to be used afterwards.
        layers: numbers of the layers.
        tokens: [B, T] integers.
        **options: positions and segment_ids, as of a call.
    """
    config = model.config
    period = len(config.pattern)
    state: list[jax.Array | None] = [None] * period
    for place in {layer % period for layer in layers}:
        model.periods[place] = _Recorder(model.periods[place])
        state[place] = jnp.zeros(config.num_periods)  # any: the scan stacks what replaces it
    x, outputs = model.hidden(tokens, **options, state=tuple(state))
    outputs = [None if output is None else jnp.unstack(output) for output in outputs]
    return model.logits(x), {n: outputs[n % period][n // period] for n in layers}


def hidden_distance(student: Hidden, teacher: Hidden, weights: jax.Array) -> jax.Array:
    """Σ weight · mean over layers of |student - teacher|² / |teacher|², a scalar.

    Args:
        student, teacher: outputs of the same layers' blocks, of any float dtype.
        weights: [B, T] float32.
    """
    total = jnp.float32(0)
    for layer in student:
        ours, theirs = (x[layer].astype(jnp.float32) for x in (student, teacher))
        distance = jnp.sum(jnp.square(ours - theirs), axis=-1)
        # The bound is far below what a norm lets through; it keeps NaN out where all is zero.
        square = jnp.maximum(jnp.sum(jnp.square(theirs), axis=-1), 1e-12)
        total += jnp.sum(weights * distance / square)
    return total / len(student)


def divergence(
    student: jax.Array, teacher: jax.Array, weights: jax.Array, *, temperature: float
) -> jax.Array:
    """Σ weight · temperature² · KL(teacher, student) of predictions (arXiv 1503.02531), a scalar.

    Args:
        student, teacher: logits [B, T, V], of any float dtype.
        weights: [B, T] float32.
        temperature: divides both logits.
    """
    ours, theirs = (
        jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
        for logits in (student, teacher)
    )
    return temperature**2 * jnp.sum(weights * jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1))
