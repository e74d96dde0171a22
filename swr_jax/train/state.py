"""The state that training carries from update to update, made already in its place on the mesh."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, traverse_util
from jax.sharding import Mesh, NamedSharding

from swr_jax.nn.language_model import LanguageModel, LanguageModelConfig
from swr_jax.train.config import TrainConfig
from swr_jax.train.guard import GuardState, init_guard
from swr_jax.train.optimizer import learning_rate_schedule, make_optimizer
from swr_jax.train.sharding import logical_axes, opt_state_shardings, param_shardings

Params = Any  # nested dict of arrays, as nnx.to_pure_dict gives it
ParamPath = tuple[str | int, ...]  # the keys that lead to a parameter


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that an update reads and writes, and so everything that a checkpoint keeps.

    step: int32, updates done. params: nested dict of arrays. opt_state: optax's.
    rng: the run's PRNG key; what needs randomness at step n takes `jax.random.fold_in(rng, n)`.
    guard: what the guard against updates that spoil a run remembers; None without one.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    rng: jax.Array
    guard: GuardState | None = None


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """What is known of a training state before any array of it exists.

    graphdef: the model without its parameters. optimizer, schedule: optax's. abstract: a
    TrainState of ShapeDtypeStructs, each with its sharding. trained: paths of the parameters that
    are updated, and have an optimizer state; None: all.
    """

    graphdef: nnx.GraphDef
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    abstract: TrainState
    trained: frozenset[ParamPath] | None = None

    @property
    def num_params(self) -> int:
        """Number of parameters."""
        return sum(math.prod(p.shape) for p in jax.tree.leaves(self.abstract.params))

    @property
    def num_trained(self) -> int:
        """Number of parameters that are updated."""
        part = self.trained_part(self.abstract.params)
        return sum(math.prod(p.shape) for p in jax.tree.leaves(part))

    def of_model(self, config: LanguageModelConfig) -> "Blueprint":
        """The same state under another model of the same parameters: of another window, say."""
        return dataclasses.replace(self, graphdef=abstract_model(config)[0])

    def trained_part(self, params: Params) -> Params:
        """The parameters that are updated, nested as all are."""
        return trained_part(params, self.trained)

    def with_trained(self, params: Params, part: Params) -> Params:
        """All parameters, those that are updated as in `part`."""
        if self.trained is None:
            return part
        flat = traverse_util.flatten_dict(params) | traverse_util.flatten_dict(part)
        return traverse_util.unflatten_dict(flat)


def trained_part(params: Params, trained: frozenset[ParamPath] | None) -> Params:
    """Those of the parameters, or of what is nested like them, whose paths are in `trained`."""
    if trained is None:
        return params
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict({path: flat[path] for path in flat if path in trained})


def _initial_params(config: TrainConfig, key: jax.Array) -> Params:
    model = LanguageModel(config.model, rngs=nnx.Rngs(key))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def abstract_model(config: LanguageModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """A model without its parameters, and those as ShapeDtypeStructs."""
    model = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    return nnx.split(model, nnx.Param)


def abstract_params(config: LanguageModelConfig, mesh: Mesh) -> Params:
    """A model's parameters as ShapeDtypeStructs, each with its sharding."""
    _, variables = abstract_model(config)
    params = nnx.to_pure_dict(variables)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        params,
        param_shardings(params, logical_axes(variables), mesh),
    )


def make_blueprint(
    config: TrainConfig, mesh: Mesh, *, new: frozenset[ParamPath] | None = None
) -> Blueprint:
    """Plans model, optimizer and the place of every array, without allocating any.

    Args:
        config: the run.
        mesh: where its arrays lie.
        new: paths of the parameters that are not a teacher's; None: all are treated alike.
    """
    trained, rates = None, None
    graphdef, variables = abstract_model(config.model)
    params, axes = nnx.to_pure_dict(variables), logical_axes(variables)
    if new is not None and config.distill.train == "new":
        trained = new
    elif new is not None:
        paths = traverse_util.flatten_dict(params)
        rates = {path: 1.0 if path in new else config.distill.kept_rate for path in paths}
        rates = traverse_util.unflatten_dict(rates)
    schedule = learning_rate_schedule(config.optimizer, steps=config.steps)
    optimizer = make_optimizer(
        config.optimizer, schedule=schedule, axes=trained_part(axes, trained), rates=rates
    )
    opt_state = jax.eval_shape(optimizer.init, trained_part(params, trained))
    rng = jax.eval_shape(lambda: jax.random.key(0))
    guard = jax.eval_shape(lambda: init_guard(config.guard))

    shardings = param_shardings(params, axes, mesh)
    replicated = NamedSharding(mesh, jax.P())
    abstract = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, opt_state, rng, guard),
        TrainState(
            replicated,
            shardings,
            opt_state_shardings(optimizer, opt_state, trained_part(shardings, trained), mesh),
            replicated,
            jax.tree.map(lambda _: replicated, guard),
        ),
    )
    return Blueprint(graphdef, optimizer, schedule, abstract, trained)


def init_state(
    config: TrainConfig,
    blueprint: Blueprint,
    *,
    initial_params: Callable[..., Params] | None = None,
    arguments: tuple[Any, ...] = (),
) -> TrainState:
    """The state before the first update, a function of `config.seed` but not of the mesh.

    Args:
        config: the run.
        blueprint: made of it.
        initial_params: traced as `initial_params(key, *arguments)`; None: those of a new model.
        arguments: pytrees of arrays, which stay where they are.
    """
    make_params = initial_params or functools.partial(_initial_params, config)

    # It runs once, and on CPUs the optimised code of many random draws takes 10 s to compile.
    fast = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None

    @functools.partial(
        jax.jit,
        out_shardings=jax.tree.map(lambda x: x.sharding, blueprint.abstract),
        compiler_options=fast,
    )
    def init(key: jax.Array, *arguments: Any) -> TrainState:
        params_key, rng = jax.random.split(key)
        params = make_params(params_key, *arguments)
        opt_state = blueprint.optimizer.init(blueprint.trained_part(params))
        return TrainState(jnp.int32(0), params, opt_state, rng, init_guard(config.guard))

    return init(jax.random.key(config.seed), *arguments)
