"""What decides a training run: frozen dataclasses, made from and turned into dictionaries."""

import dataclasses
import operator
import types
import typing
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from swr_jax.data import DataConfig, load_tokenizer
from swr_jax.nn.language_model import LanguageModelConfig
from swr_jax.nn.swap import INITS


def _require(condition: bool, name: str, value: Any, rule: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {rule}, got {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a linear warm-up, a cosine decay and clipping by the global gradient norm.

    learning_rate is the peak, reached after `warmup_steps`; the cosine ends at the last step of
    the run at `learning_rate · final_fraction`. `clip_norm=None` does not clip.
    """

    learning_rate: float = 3e-4
    warmup_steps: int = 100
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "> 0")
        _require(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, ">= 0")
        _require(
            0 <= self.final_fraction <= 1,
            "optimizer.final_fraction",
            self.final_fraction,
            "between 0 and 1",
        )
        _require(
            self.clip_norm is None or self.clip_norm > 0,
            "optimizer.clip_norm",
            self.clip_norm,
            "> 0, or None for no clipping",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Size of each mesh axis; at most one may be -1, which takes the devices that are left.

    data: copies of the model, each with its part of the batch. fsdp: the batch split further, and
    parameters and optimizer state split with it. tensor: heads, feed-forward features and
    vocabulary split. sequence: every sequence split in time.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1


# The options of the model that a window schedule can draw, and the mixer that each one sizes.
DRAWN_OPTIONS: dict[str, str] = {"window": "swa", "phalanx.block_size": "phalanx"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowScheduleConfig:
    """Stochastic windows (arXiv 2509.24552): every update trains with a size drawn anew.

    option: the option of the model that is drawn, a name in `DRAWN_OPTIONS`. sizes: its values, in
    tokens; none: nothing is drawn. probabilities: one per size. At the end of a run the longest
    size takes over, for the last anneal_fraction of the updates (rounded up): anneal "switch"
    uses it in all of them, "linear" lets its probability rise to 1 at the last one.

    The model's own option must be the longest size: evaluation, checkpoints and generation know
    nothing of draws and use the model as it is configured.
    """

    option: str = "window"
    sizes: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()
    anneal: str = "switch"
    anneal_fraction: float = 0.1

    def __post_init__(self) -> None:
        # Lists would not be equal to the tuples that a checkpoint's configuration is read into.
        for name in ("sizes", "probabilities"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        sizes, probabilities = self.sizes, self.probabilities
        _require(
            self.option in DRAWN_OPTIONS,
            "window_schedule.option",
            self.option,
            f"one of {', '.join(DRAWN_OPTIONS)}",
        )
        positive = all(type(size) is int and size >= 1 for size in sizes)
        _require(
            positive and len(set(sizes)) == len(sizes),
            "window_schedule.sizes",
            sizes,
            "different integers >= 1, or empty for no draws",
        )
        _require(
            len(probabilities) == len(sizes),
            "window_schedule.probabilities",
            probabilities,
            f"as many as window_schedule.sizes={sizes}",
        )
        numbers = all(type(p) in (int, float) and p >= 0 for p in probabilities)
        _require(
            not sizes or (numbers and abs(sum(probabilities) - 1) <= 1e-6),
            "window_schedule.probabilities",
            probabilities,
            "numbers >= 0 that sum to 1",
        )
        _require(
            self.anneal in ("switch", "linear"),
            "window_schedule.anneal",
            self.anneal,
            "switch or linear",
        )
        _require(
            0 <= self.anneal_fraction <= 1,
            "window_schedule.anneal_fraction",
            self.anneal_fraction,
            "between 0 and 1",
        )

    def check_model(self, model: LanguageModelConfig) -> None:
        """Raises ValueError if `model` does not use what is drawn or has not the longest size."""
        if not self.sizes:
            return
        mixer = DRAWN_OPTIONS[self.option]
        _require(
            mixer in model.pattern,
            "model.pattern",
            model.pattern,
            f"one with {mixer!r}, the mixer of window_schedule.option={self.option!r}",
        )
        _require(
            operator.attrgetter(self.option)(model) == max(self.sizes),
            f"model.{self.option}",
            operator.attrgetter(self.option)(model),
            f"{max(self.sizes)}, the longest of window_schedule.sizes={self.sizes}, with which the "
            "model is evaluated",
        )


GUARD_ACTIONS = ("stop", "skip", "rollback")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What a run does about an update that would spoil it: NaN, infinity, or a spike of the loss.

    action: "stop" ends the run with an error; "skip" leaves the update out and goes on with the
    next batch; "rollback" returns to the newest checkpoint and goes on from there with the data
    that come next, so that the batches which led to it are not seen again. spike_factor: a loss
    above so many times its average is a spike; None: no loss is. memory: updates that the average
    reaches back over, and that must be done before there can be a spike. max_in_a_row: "skip"
    stops the run after more than so many updates one after the other. max_rollbacks: likewise
    "rollback", in the whole run.
    """

    action: str = "stop"
    spike_factor: float | None = None
    memory: int = 100
    max_in_a_row: int = 10
    max_rollbacks: int = 3

    def __post_init__(self) -> None:
        _require(
            self.action in GUARD_ACTIONS,
            "guard.action",
            self.action,
            f"one of {', '.join(GUARD_ACTIONS)}",
        )
        _require(
            self.spike_factor is None or self.spike_factor > 1,
            "guard.spike_factor",
            self.spike_factor,
            "> 1, or None for no loss to be a spike",
        )
        for name in ("memory", "max_in_a_row", "max_rollbacks"):
            _require(getattr(self, name) >= 1, f"guard.{name}", getattr(self, name), ">= 1")

    @property
    def active(self) -> bool:
        """Whether updates are looked at on the device; otherwise only NaN and infinity stop."""
        return self.action != "stop" or self.spike_factor is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A model made of a trained one, its teacher, by new mixers in the place of attention.

    teacher: folder of the teacher's training run; "": none, the model starts from nothing. Layers
    whose mixer in `model.pattern` is not the teacher's are new, all else is as in the teacher.
    teacher_step: step of the teacher's newest checkpoint; None: any, and the run's checkpoints
    have it from then on, so that a run does not go on with a teacher that has learned more.
    train: what is updated, the "new" mixers or "all". kept_rate: with "all", the learning rate of
    what is the teacher's, over that of what is new. init: how Phalanx starts, as for
    `swap_mixers`.

    The loss is a weighted sum of means over targets. hidden: weight of the squared distance of a
    new layer's block output from the teacher's, over the teacher's square, mean over new layers.
    logits: weight of the divergence KL(teacher, student) of predictions at `temperature`, times
    its square. cross_entropy: weight of the ordinary loss.
    """

    teacher: str = ""
    teacher_step: int | None = None
    train: str = "new"
    kept_rate: float = 0.1
    init: str = "average"
    hidden: float = 10.0
    logits: float = 1.0
    cross_entropy: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _require(self.train in ("new", "all"), "distill.train", self.train, "new or all")
        _require(0 < self.kept_rate <= 1, "distill.kept_rate", self.kept_rate, "above 0, at most 1")
        _require(self.init in INITS, "distill.init", self.init, f"one of {', '.join(INITS)}")
        weights = ("hidden", "logits", "cross_entropy")
        for name in weights:
            _require(getattr(self, name) >= 0, f"distill.{name}", getattr(self, name), ">= 0")
        _require(
            any(getattr(self, name) > 0 for name in weights),
            "distill.hidden, logits and cross_entropy",
            (self.hidden, self.logits, self.cross_entropy),
            "above 0, at least one of them",
        )
        _require(self.temperature > 0, "distill.temperature", self.temperature, "> 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a training run.

    steps counts optimizer updates; each sees `data.batch_size` sequences (all processes together),
    taken in `accumulation` micro-batches one after the other to save memory. z_loss weighs
    mean(log Z)² in the loss (0: none). The `*_every` intervals count steps.
    """

    model: LanguageModelConfig
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    window_schedule: WindowScheduleConfig = WindowScheduleConfig()
    guard: GuardConfig = GuardConfig()
    distill: DistillConfig = DistillConfig()
    steps: int = 1000
    accumulation: int = 1
    z_loss: float = 0.0
    seed: int = 0
    log_every: int = 10
    eval_every: int = 100
    eval_batches: int = 16
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    sample_prompt: str = ""
    sample_tokens: int = 200
    sample_temperature: float = 0.8

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "accumulation",
            "log_every",
            "eval_every",
            "eval_batches",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            _require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        _require(self.z_loss >= 0, "z_loss", self.z_loss, ">= 0")
        _require(self.sample_tokens >= 0, "sample_tokens", self.sample_tokens, ">= 0")
        self.window_schedule.check_model(self.model)


# What a field of each type accepts; a bool, though an int to Python, is no number.
_SCALARS: dict[type, tuple[type, ...]] = {
    bool: (bool,),
    int: (int,),
    float: (int, float),
    str: (str,),
}


def _without_none(hint: Any) -> Any:
    """`X | None` -> X; other hints unchanged."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        rest = [h for h in typing.get_args(hint) if h is not type(None)]
        return rest[0] if len(rest) == 1 else hint
    return hint


def from_dict[T](cls: type[T], values: Mapping[str, Any], *, path: str = "config") -> T:
    """Builds the (nested) dataclass `cls` from a mapping such as an ml_collections ConfigDict.

    Lists become tuples where the field is a tuple. Raises ValueError that names the key for a key
    that `cls` does not have, a required one that is missing, and a value of another type.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(
            f"{path} has no option {unknown[0]!r}; the options are {', '.join(sorted(fields))}"
        )
    required = {
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - set(values)):
        raise ValueError(f"{path}.{missing[0]} is not set and has no default: set it")
    arguments = {}
    for name, value in values.items():
        hint = _without_none(hints[name])
        if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
            value = from_dict(hint, value, path=f"{path}.{name}")
        elif isinstance(value, list):
            value = tuple(value)
        elif hint in _SCALARS and value is not None:
            accepted = _SCALARS[hint]
            if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
                raise ValueError(
                    f"{path}.{name} must be {hint.__name__}, got {value!r} ({type(value).__name__})"
                )
        arguments[name] = value
    return cls(**arguments)


def to_dict(config: Any) -> Any:
    """The dataclass as JSON-able values: nested dictionaries, lists, and dtypes by their name."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, (tuple, list)):
        return [to_dict(value) for value in config]
    if config is None or isinstance(config, (str, int, float, bool)):
        return config
    return jnp.dtype(config).name


def make_train_config(values: Mapping[str, Any]) -> TrainConfig:
    """`from_dict(TrainConfig, values)`, with `model.vocab_size` None taken from the tokenizer."""
    values = dict(values)
    model, data = values.get("model"), values.get("data", {})
    if model is not None and model.get("vocab_size") is None:
        tokenizer = data.get("tokenizer", DataConfig.tokenizer)
        values["model"] = {**model, "vocab_size": load_tokenizer(tokenizer).vocab_size}
    return from_dict(TrainConfig, values)
