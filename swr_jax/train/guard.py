"""What becomes of an update whose loss is not finite, or far above what it was: left out or undone.

The decision is part of the compiled update, and what it rests on is part of the training state: it
is the same on every device and in every process, and the same after a run was stopped and resumed.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from swr_jax.train.config import GuardConfig

if TYPE_CHECKING:
    from swr_jax.train.state import TrainState

Metrics = dict[str, jax.Array]
# Sums over a batch that a refused update adds nothing to.
_SUMS = ("nats", "log_z_squared", "weight", "target_bytes", "hidden_loss", "logits_loss")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GuardState:
    """What the guard remembers; scalars.

    loss_average (float32): exponential average of the losses of accepted updates, begun at 0, so
    that it is to be divided by 1 - decay ** accepted. accepted, refused (int32): updates so far.
    in_a_row (int32): updates refused since the last that was accepted. rollbacks (int32): returns
    to a checkpoint.
    """

    loss_average: jax.Array
    accepted: jax.Array
    refused: jax.Array
    in_a_row: jax.Array
    rollbacks: jax.Array


def init_guard(config: GuardConfig) -> GuardState | None:
    """The memory of a guard that has seen nothing; None where `config` asks for no guard."""
    if not config.active:
        return None
    return GuardState(np.float32(0), *(np.int32(0) for _ in range(4)))


def with_counts(state: "TrainState", *, refused: int, rollbacks: int) -> "TrainState":
    """A restored state whose guard still knows what happened after it was saved."""
    counts = {"refused": np.int32(refused), "rollbacks": np.int32(rollbacks)}
    placed = {
        name: jax.device_put(count, getattr(state.guard, name).sharding)
        for name, count in counts.items()
    }
    return dataclasses.replace(state, guard=dataclasses.replace(state.guard, **placed))


def guarded(
    config: GuardConfig, old: "TrainState", new: "TrainState", metrics: Metrics
) -> tuple["TrainState", Metrics]:
    """`new`, or where the update is refused `old` but for its step and the guard's memory.

    Refused is an update whose loss, gradient norm or parameters' norm is not finite and, once
    `config.memory` updates were accepted, one whose loss is above `config.spike_factor` times their
    average.

    Args:
        config: an active one.
        old, new: states before and after the update; `old` has a GuardState.
        metrics: scalars with loss, grad_norm and param_norm.

    Returns:
        The state, and the metrics with the guard's: is_refused (this update, 0 or 1), in_a_row,
        refused and rollbacks, as in its memory. Sums over the batch of a refused update are 0.
    """
    guard, loss = old.guard, metrics["loss"].astype(jnp.float32)
    finite = jnp.isfinite(loss)
    for name in ("grad_norm", "param_norm"):
        finite &= jnp.isfinite(metrics[name])
    decay = 1 - 1 / config.memory
    refused = ~finite
    if config.spike_factor is not None:
        average = guard.loss_average / (1 - decay ** guard.accepted.astype(jnp.float32))
        refused |= (guard.accepted >= config.memory) & (loss > config.spike_factor * average)

    def choose(kept: Any, updated: Any) -> Any:
        return jax.tree.map(lambda x, y: jnp.where(refused, x, y), kept, updated)

    count = refused.astype(jnp.int32)
    memory = GuardState(
        loss_average=jnp.where(
            refused, guard.loss_average, decay * guard.loss_average + (1 - decay) * loss
        ),
        accepted=guard.accepted + 1 - count,
        refused=guard.refused + count,
        in_a_row=jnp.where(refused, guard.in_a_row + 1, 0),
        rollbacks=guard.rollbacks,
    )
    state = dataclasses.replace(
        new,
        params=choose(old.params, new.params),
        opt_state=choose(old.opt_state, new.opt_state),
        guard=memory,
    )
    metrics = metrics | {
        name: jnp.where(refused, jnp.zeros_like(metrics[name]), metrics[name])
        for name in _SUMS
        if name in metrics
    }
    return state, metrics | {
        "is_refused": count,
        "in_a_row": memory.in_a_row,
        "refused": memory.refused,
        "rollbacks": memory.rollbacks,
    }
