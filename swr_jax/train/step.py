"""One optimizer update and one evaluation, as jitted functions of a sharded training state."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from swr_jax.train.config import GuardConfig
from swr_jax.train.distill import Distillation, Hidden, logits_and_hidden
from swr_jax.train.gather import gathering
from swr_jax.train.guard import guarded
from swr_jax.train.sharding import MICRO_BATCH_SPEC, batch_sharding
from swr_jax.train.state import Blueprint, Params, TrainState

_NO_GUARD = GuardConfig()

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


def loss_sums(logits: jax.Array, batch: Batch) -> Metrics:
    """Weighted sums over a batch of what the loss is made of; float32 whatever the logits' dtype.

    Args:
        logits: [B, T, V], any float dtype.
        batch: `targets` [B, T] int32, `loss_weights` [B, T] float32, `target_bytes` [B, T] int32.

    Returns:
        Scalars. nats: Σ weight · cross-entropy. log_z_squared: Σ weight · (log Z)². weight: Σ
        weight. target_bytes (int32): bytes of text that the targets of positive weight stand for.
    """
    logits = logits.astype(jnp.float32)
    weights = batch["loss_weights"].astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
    return {
        "nats": jnp.sum(weights * (log_z - picked)),
        "log_z_squared": jnp.sum(weights * jnp.square(log_z)),
        "weight": jnp.sum(weights),
        "target_bytes": jnp.sum(jnp.where(weights > 0, batch["target_bytes"], 0)),
    }


def _run(
    graphdef: nnx.GraphDef,
    abstract: Params,
    params: Params,
    batch: Batch,
    *,
    layers: tuple[int, ...] = (),
) -> tuple[jax.Array, Hidden]:
    """A model's logits, and the outputs of some layers."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    model = gathering(graphdef, params, shardings)
    mesh = jax.tree.leaves(shardings)[0].mesh
    tokens, options = batch["tokens"], {name: batch[name] for name in ("positions", "segment_ids")}
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # The operators split along its axes.
        if layers:
            return logits_and_hidden(model, layers, tokens, **options)
        return model(tokens, **options), {}


def _micro_batches(batch: Batch, count: int, mesh: Mesh) -> Batch:
    """[B, T] -> [count, B / count, T], each device keeping the rows that it has."""

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, MICRO_BATCH_SPEC))

    return jax.tree.map(split, dict(batch))


def gradient_and_sums(
    blueprint: Blueprint,
    params: Params,
    batch: Batch,
    *,
    mesh: Mesh,
    accumulation: int = 1,
    z_loss: float = 0.0,
    distillation: Distillation | None = None,
    teacher: Params | None = None,
) -> tuple[Params, Metrics]:
    """Gradient of a batch's mean loss, and its `loss_sums`, over `accumulation` micro-batches.

    The mean is over the weights of the whole batch, not of each micro-batch, so the result does
    not depend on `accumulation` (but for rounding) even where weights are uneven. The gradient is
    that of the parameters which are trained. With a distillation the sums have its losses too;
    `teacher` are the teacher's parameters, where it is asked.
    """
    total_weight = jnp.maximum(jnp.sum(batch["loss_weights"].astype(jnp.float32)), 1.0)
    compared = distillation.compared if distillation else ()

    def share_of_mean(trained: Params, part: Batch, said: Any) -> tuple[jax.Array, Metrics]:
        whole = blueprint.with_trained(params, trained)
        student = _run(blueprint.graphdef, blueprint.abstract.params, whole, part, layers=compared)
        sums = loss_sums(student[0], part)
        loss = sums["nats"]
        if distillation:
            loss, more = distillation.loss(sums, student, said, part["loss_weights"])
            sums |= more
        return (loss + z_loss * sums["log_z_squared"]) / total_weight, sums

    def of_part(part: Batch) -> tuple[Params, Metrics]:
        said = None
        if teacher is not None:
            # Before differentiation begins, so that nothing of it is kept for the way back.
            said = _run(
                distillation.graphdef, distillation.abstract, teacher, part, layers=compared
            )
        trained = blueprint.trained_part(params)
        gradient, sums = jax.grad(share_of_mean, has_aux=True)(trained, part, said)
        # Split like the parameters at once: each device keeps the part that it updates.
        abstract = blueprint.trained_part(blueprint.abstract.params)
        shardings = jax.tree.map(lambda x: x.sharding, abstract)
        return jax.lax.with_sharding_constraint(gradient, shardings), sums

    if accumulation == 1:
        return of_part(batch)

    def add(total: tuple[Params, Metrics], part: Batch) -> tuple[tuple[Params, Metrics], None]:
        return jax.tree.map(jnp.add, total, of_part(part)), None

    parts = _micro_batches(batch, accumulation, mesh)
    shapes = jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, parts)
    return total


def make_train_step(
    blueprint: Blueprint,
    mesh: Mesh,
    *,
    accumulation: int = 1,
    z_loss: float = 0.0,
    guard: GuardConfig = _NO_GUARD,
    distillation: Distillation | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """A jitted `(state, batch) -> (state, metrics)`; the state that is passed in is used up.

    Where a distillation asks its teacher, the teacher's parameters are a third argument.

    Metrics are scalars: those of `loss_sums` and of the distillation; loss, the mean nats per
    target; grad_norm, before clipping; param_norm, after the update; learning_rate; with a guard
    those of `guarded`.
    """

    def train_step(
        state: TrainState, batch: Batch, teacher: Params | None = None
    ) -> tuple[TrainState, Metrics]:
        gradient, sums = gradient_and_sums(
            blueprint,
            state.params,
            batch,
            mesh=mesh,
            accumulation=accumulation,
            z_loss=z_loss,
            distillation=distillation,
            teacher=teacher,
        )
        trained = blueprint.trained_part(state.params)
        updates, opt_state = blueprint.optimizer.update(gradient, state.opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        params = blueprint.with_trained(state.params, trained)
        metrics = sums | {
            "loss": sums["nats"] / jnp.maximum(sums["weight"], 1.0),
            "grad_norm": optax.tree.norm(gradient),
            "param_norm": optax.tree.norm(params),
            "learning_rate": blueprint.schedule(state.step),
        }
        new = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state)
        return guarded(guard, state, new, metrics) if guard.active else (new, metrics)

    shardings = jax.tree.map(lambda x: x.sharding, blueprint.abstract)
    arguments = [shardings, batch_sharding(mesh)]
    if distillation and distillation.asks_teacher:
        arguments.append(jax.tree.map(lambda x: x.sharding, distillation.abstract))
    return jax.jit(
        train_step,
        in_shardings=tuple(arguments),
        out_shardings=(shardings, NamedSharding(mesh, jax.P())),
        donate_argnums=0,
    )


def make_eval_step(blueprint: Blueprint, mesh: Mesh) -> Callable[[Params, Batch], Metrics]:
    """A jitted `(params, batch) -> loss_sums`."""

    def eval_step(params: Params, batch: Batch) -> Metrics:
        logits, _ = _run(blueprint.graphdef, blueprint.abstract.params, params, batch)
        return loss_sums(logits, batch)

    shardings = jax.tree.map(lambda x: x.sharding, blueprint.abstract.params)
    return jax.jit(
        eval_step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=NamedSharding(mesh, jax.P()),
    )
