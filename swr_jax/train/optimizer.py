"""AdamW with warm-up and cosine decay, that decays weight matrices only."""

from typing import Any

import jax
import optax

from swr_jax.train.config import OptimizerConfig

# Modules of a mixer that make its gates. The gate of a SwiGLU is not among them: it is half of a
# feed-forward network's input projection, and decays like the other half.
_GATES = frozenset(
    {"decay", "pre_gate", "post_gate", "input_gate", "forget_gate", "output_gate", "write_gate"}
)


def learning_rate_schedule(config: OptimizerConfig, *, steps: int) -> optax.Schedule:
    """Learning rate of updates 0 … `steps` - 1: linear up to the peak, then a cosine down."""
    warmup = min(config.warmup_steps, steps - 1)
    return optax.schedules.warmup_cosine_decay_schedule(
        # Not from 0, where the first update would be lost.
        init_value=config.learning_rate / (warmup + 1),
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=steps,
        end_value=config.learning_rate * config.final_fraction,
    )


def decay_mask(axes: Any) -> Any:
    """True for each parameter that weight decay applies to: the matrices that are not gates.

    Norm scales and biases have one axis besides "layers", the stack of equal layers. Gates keep
    their size too: pulling the logits of a recurrence's decays to zero would pull the decays to
    1/2, and with them the memory of their heads.

    Args:
        axes: logical axis names of each parameter, as `logical_axes` gives them.
    """

    def decays(path: tuple[Any, ...], names: tuple[str | None, ...]) -> bool:
        is_matrix = len([name for name in names if name != "layers"]) >= 2
        return is_matrix and _GATES.isdisjoint(entry.key for entry in path)

    return jax.tree_util.tree_map_with_path(decays, axes, is_leaf=lambda x: isinstance(x, tuple))


def make_optimizer(
    config: OptimizerConfig,
    *,
    schedule: optax.Schedule,
    axes: Any,
    rates: Any = None,
) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW (arXiv 1711.05101) with `decay_mask(axes)`.

    Args:
        config: the optimizer's options.
        schedule: learning rate by update.
        axes: logical axis names of each parameter, as `logical_axes` gives them.
        rates: what the learning rate of each parameter is multiplied by; None: 1.
    """
    optimizer = optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decay_mask(axes),
    )
    if config.clip_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    if rates is not None:
        multiplied = optax.stateless(
            lambda updates, _: jax.tree.map(lambda x, rate: x * rate, updates, rates)
        )
        optimizer = optax.chain(optimizer, multiplied)
    return optimizer
