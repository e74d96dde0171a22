"""From a trained model to the student that it teaches: which layers are new, and how they start."""

import dataclasses
from pathlib import Path

import jax
from flax import nnx, traverse_util
from jax.sharding import Mesh

from swr_jax.nn.language_model import LanguageModelConfig
from swr_jax.nn.swap import (
    MIXER_OPTIONS,
    is_attention,
    layer_mixers,
    shortest_period,
    swapped_parameters,
)
from swr_jax.train.checkpoint import load_params
from swr_jax.train.config import TrainConfig, to_dict
from swr_jax.train.distill import Distillation
from swr_jax.train.state import (
    Blueprint,
    ParamPath,
    Params,
    TrainState,
    abstract_model,
    abstract_params,
    init_state,
)

# Options in which a student may differ from its teacher wherever they are used.
_FREE = frozenset({"pattern", "remat", "dtype", "param_dtype"})


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A trained model on the mesh, and what a student is to it.

    model: its configuration. params: its parameters. new: paths of the student's parameters that
    are not the teacher's; None: they are updated like all others. distillation: what the student
    learns.
    """

    model: LanguageModelConfig
    params: Params
    new: frozenset[ParamPath] | None
    distillation: Distillation

    @property
    def asked(self) -> tuple[Params, ...]:
        """What the student's updates take besides state and batch."""
        return (self.params,) if self.distillation.asks_teacher else ()

    def describe(self, blueprint: Blueprint) -> str:
        """In a line: who teaches what to how many of the student's parameters."""
        config, layers = self.distillation.config, self.distillation.layers
        return (
            f"{config.teacher}, pattern {'+'.join(self.model.pattern)}; new mixers in layers "
            f"{', '.join(map(str, layers))}; {blueprint.num_trained:,} parameters are trained"
        )


def with_teacher(config: TrainConfig, mesh: Mesh) -> tuple[TrainConfig, Teacher | None]:
    """Reads the teacher that `config.distill` names, each array into its place on the mesh.

    Returns the configuration, with the step of the teacher's checkpoint in it, and the teacher;
    None if none is named.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the newest one is not of `distill.teacher_step`, or the student differs from
            the teacher in more than the mixers of some layers.
    """
    distill = config.distill
    if not distill.teacher:
        return config, None
    params, run, step = load_params(
        Path(distill.teacher), lambda model: abstract_params(model, mesh)
    )
    if distill.teacher_step not in (None, step):
        raise ValueError(
            f"distill.teacher_step={distill.teacher_step}, but the newest checkpoint in "
            f"distill.teacher={distill.teacher!r} is of step {step}: name a folder with a copy of "
            "the one that is meant, or the newest one's step"
        )
    layers = new_layers(run.model, config.model)
    distillation = Distillation(
        config=distill,
        layers=layers,
        graphdef=abstract_model(run.model)[0],
        abstract=jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
        ),
    )
    alike = distill.train == "all" and distill.kept_rate == 1
    new = None if alike else new_parameters(config.model, layers)
    distill = dataclasses.replace(distill, teacher_step=step)
    teacher = Teacher(run.model, params, new, distillation)
    return dataclasses.replace(config, distill=distill), teacher


def new_layers(teacher: LanguageModelConfig, student: LanguageModelConfig) -> tuple[int, ...]:
    """Numbers of the layers in which a student has another mixer than its teacher.

    Raises ValueError if they differ in anything else that both use, if there is no such layer, or
    if the teacher's mixer there is no attention.
    """
    ours, theirs = to_dict(student), to_dict(teacher)
    kept = {*teacher.pattern} & {*student.pattern}
    free = _FREE | {name for name, mixer in MIXER_OPTIONS.items() if mixer not in kept}
    changed = [
        f"model.{name}={ours[name]!r} (the teacher's: {theirs[name]!r})"
        for name in ours
        if name not in free and ours[name] != theirs[name]
    ]
    if changed:
        raise ValueError(
            f"student and teacher differ in {', '.join(changed)}: only mixers may be others, "
            "use the teacher's options for all else"
        )
    pairs = list(zip(layer_mixers(teacher), layer_mixers(student), strict=True))
    layers = tuple(layer for layer, (was, now) in enumerate(pairs) if was != now)
    if not layers:
        raise ValueError(
            f"model.pattern={student.pattern}: the teacher's, so there is nothing new to learn; "
            "put another mixer in the place of attention"
        )
    if wrong := [layer for layer in layers if not is_attention(teacher, pairs[layer][0])]:
        was, now = pairs[wrong[0]]
        raise ValueError(
            f"model.pattern={student.pattern} has {now!r} in layer {wrong[0]}, where the teacher "
            f"has {was!r}: only attention can be replaced"
        )
    return layers


def new_parameters(student: LanguageModelConfig, layers: tuple[int, ...]) -> frozenset[ParamPath]:
    """Paths of the parameters that belong to the mixers of some layers.

    Raises ValueError if one of them is stacked with those of another layer.
    """
    mixers = [(mixer, layer in layers) for layer, mixer in enumerate(layer_mixers(student))]
    period = len(student.pattern)
    of_places = [set(mixers[place::period]) for place in range(period)]
    if mixed := [place for place, found in enumerate(of_places) if len(found) > 1]:
        pattern = tuple(mixer for mixer, _ in shortest_period(mixers))
        raise ValueError(
            f"model.pattern={student.pattern} stacks new and old {student.pattern[mixed[0]]!r} in "
            f"one array, which only distill.train='all' with distill.kept_rate=1 treats alike: "
            f"write it as {pattern}"
        )
    places = {layer % period for layer in layers}
    paths = traverse_util.flatten_dict(nnx.to_pure_dict(abstract_model(student)[1]))
    return frozenset(
        path for path in paths if path[0] == "periods" and path[1] in places and path[2] == "mixer"
    )


def init_student(config: TrainConfig, blueprint: Blueprint, teacher: Teacher | None) -> TrainState:
    """The state before the first update: without a teacher that of a new model."""
    if teacher is None:
        return init_state(config, blueprint)

    def initial_params(key: jax.Array, params: Params) -> Params:
        return swapped_parameters(
            params, teacher.model, config.model, init=config.distill.init, rngs=nnx.Rngs(key)
        )

    return init_state(config, blueprint, initial_params=initial_params, arguments=(teacher.params,))
