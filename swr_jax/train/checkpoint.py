"""Checkpoints from which a run goes on as if it had never stopped."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils

from swr_jax.nn.language_model import LanguageModel, LanguageModelConfig
from swr_jax.train.config import TrainConfig, from_dict, to_dict
from swr_jax.train.fingerprint import fingerprint_of_json, fingerprints
from swr_jax.train.guard import init_guard
from swr_jax.train.state import Params, TrainState, abstract_model

FOLDER = "checkpoints"  # of a run's folder
# Options that do not change what a run computes, so that they may change when it is resumed.
_OF_NO_EFFECT = (
    "model.remat ",
    "model.mlstm.chunk_size ",
    "model.gated_delta.chunk_size ",
    "data.read_threads ",
    "data.verify ",
)


class CorruptCheckpointError(ValueError):
    """A checkpoint cannot be read, or does not hold what was saved."""


class UnwrittenCheckpointError(OSError):
    """A checkpoint could not be written: the disk is full, or gone."""


class Checkpointer:
    """Saves and restores training states in the folder `checkpoints` of `workdir`, one per step.

    A checkpoint has these items: `params`; `optimizer` (its state, the step and the PRNG key);
    `data`, the place in the training data; `config`, the run's configuration; with a guard against
    updates that spoil a run also `guard`, what it remembers. The place is that of
    all processes together, so a run may go on with more of them or fewer: none of its documents is
    repeated or left out.
    With them are kept the fingerprints of all, so that damage on the disk does not go unseen.
    Saving is asynchronous, and a checkpoint whose writing was cut off is never taken for a whole
    one. Use it as a context manager: leaving it waits for the last write. What cannot be written
    raises UnwrittenCheckpointError, from whichever method is called next; the checkpoints before it
    stay as they are.
    """

    def __init__(self, workdir: Path, *, keep: int) -> None:
        self.directory = Path(workdir).absolute() / FOLDER
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(keep),
                cleanup_tmp_directories=True,
            ),
        )
        self._begun: int | None = None  # step of the checkpoint that was begun last

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        told = kind is not None and issubclass(kind, UnwrittenCheckpointError)
        said_before = (UnwrittenCheckpointError,) if told else ()
        with contextlib.suppress(*said_before), self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # Of any class, as in `_damage`; orbax raises what went wrong in its threads here.
            newest = max(self._manager.all_steps(read=True), default=None)
            kept = (
                "There is none before it"
                if newest is None
                else (f"The newest checkpoint is of step {newest}: {self.directory}")
            )
            raise UnwrittenCheckpointError(
                f"the checkpoint of step {self._begun} could not be written: "
                f"{_in_short(error)}. {kept}. Make room on the disk, then start the same command"
            ) from error

    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint, None when there is none."""
        return self._manager.latest_step()

    def reached_preemption(self, step: int) -> bool:
        """Whether the cluster asked all processes to stop, agreed on between them."""
        return self._manager.reached_preemption(step)

    def save(
        self,
        step: int,
        state: TrainState,
        data_iterator: grain.DatasetIterator,
        config: TrainConfig,
    ) -> None:
        """Starts to write a checkpoint of `step`; returns once `state` may be overwritten."""
        if step == self.latest_step():
            return
        data, run = data_iterator.get_state(), to_dict(config)
        arrays = {"params": state.params, "optimizer": _optimizer_item(state)}
        if state.guard is not None:
            arrays["guard"] = state.guard
        saved = {
            **{name: fingerprints(item) for name, item in arrays.items()},
            "data": fingerprint_of_json(data),
            "config": fingerprint_of_json(run),
        }
        with self._writing():  # the checkpoint before this one, until it is finished
            self._manager.wait_until_finished()
        self._begun = step
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardSave(item) for name, item in arrays.items()},
                    data=ocp.args.JsonSave(data),
                    config=ocp.args.JsonSave({"config": run, "fingerprints": saved}),
                ),
            )

    def wait(self) -> None:
        """Waits until every checkpoint started is written, and raises if one could not be."""
        with self._writing():
            self._manager.wait_until_finished()

    def restore(
        self,
        step: int,
        abstract_state: TrainState,
        data_iterator: grain.DatasetIterator,
        config: TrainConfig,
    ) -> TrainState:
        """The state of `step` in the shardings of `abstract_state`; moves `data_iterator` there.

        Raises:
            CorruptCheckpointError: the checkpoint cannot be read, or has changed since it was made.
            ValueError: its model, data or distillation differ from `config`'s.
        """
        saved, expected = _read_config(self._manager, step)
        for part in ("model", "data", "distill"):
            was, now = (to_dict(getattr(either, part)) for either in (saved, config))
            _check_same(self.directory, part, was, now)
        arrays = {
            "params": abstract_state.params,
            "optimizer": _optimizer_item(abstract_state),
        }
        guard = abstract_state.guard
        if guard is not None and saved.guard.active:
            arrays["guard"] = guard
        restored = _read(
            self._manager,
            step,
            expected,
            **{name: ocp.args.StandardRestore(item) for name, item in arrays.items()},
            data=ocp.args.JsonRestore(),
        )
        if guard is not None:  # one that the run did without so far remembers nothing
            shardings = jax.tree.map(lambda x: x.sharding, guard)
            guard = restored.get("guard") or jax.device_put(init_guard(config.guard), shardings)
        data_iterator.set_state(restored["data"])
        optimizer = restored["optimizer"]
        return TrainState(
            step=optimizer["step"],
            params=restored["params"],
            opt_state=optimizer["opt_state"],
            rng=optimizer["rng"],
            guard=guard,
        )

    def restore_newest(
        self,
        abstract_state: TrainState,
        data_iterator: grain.DatasetIterator,
        config: TrainConfig,
    ) -> tuple[int, TrainState, list[CorruptCheckpointError]]:
        """Step and state of the newest whole checkpoint, and what was wrong with newer ones.

        Those newer ones are set aside, as STEP.corrupt: the run will come to their steps again.
        Arguments as for `restore`.

        Raises:
            CorruptCheckpointError: there are checkpoints, and none of them is whole.
            FileNotFoundError: there is no checkpoint.
            ValueError: as `restore`.
        """
        errors: list[CorruptCheckpointError] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            error, state = None, None
            try:
                state = self.restore(step, abstract_state, data_iterator, config)
            except CorruptCheckpointError as found:
                error = found
            if _in_any_process(error is not None):
                errors.append(error or _corrupt(self.directory / str(step), "another process says"))
                continue
            for _ in errors:
                self._set_aside(self.latest_step())
            return step, state, errors
        if not errors:
            raise FileNotFoundError(f"{self.directory} holds no finished checkpoint")
        raise CorruptCheckpointError(
            f"none of the checkpoints in {self.directory} is whole: "
            + "; ".join(map(str, errors))
            + ". Restore the folder from a copy, or begin anew in another --workdir"
        )

    def _set_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            path = self.directory / str(step)
            taken = len(list(self.directory.glob(f"{step}.corrupt*")))
            path.rename(path.with_name(f"{step}.corrupt" + (f".{taken}" if taken else "")))
        multihost_utils.sync_global_devices(f"set aside the checkpoint of step {step}")
        self._manager.reload()


def _in_any_process(here: bool) -> bool:
    return bool(np.any(multihost_utils.process_allgather(np.bool_(here))))


def _corrupt(path: Path, what: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"checkpoint {path} is not whole: {what}")


def _damage(path: Path, error: Exception) -> CorruptCheckpointError:
    """What to raise for `error`, which reading ended in.

    It may be of any class: what damaged files make of JSON, of the metadata of arrays and of their
    contents has no class in common, and orbax raises `Exception` itself.
    """
    return _corrupt(path, _in_short(error))


def _in_short(error: Exception) -> str:
    message = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {message[:200]}"


def _read_config(manager: ocp.CheckpointManager, step: int) -> tuple[TrainConfig, dict[str, Any]]:
    """The configuration that a checkpoint was made with, and the fingerprints of its items.

    What was saved before an option existed had its default; what was saved before there were
    fingerprints has none.
    """
    path = Path(manager.directory) / str(step)
    try:
        run = manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))
        values = run["config"]["config"]
        expected = run["config"].get("fingerprints", {})
        if expected and fingerprint_of_json(values) != expected["config"]:
            raise _corrupt(path, "its configuration is not what was saved")
    except CorruptCheckpointError:
        raise
    except Exception as error:
        raise _damage(path, error) from error
    return from_dict(TrainConfig, values), expected


def _read(
    manager: ocp.CheckpointManager,
    step: int,
    expected: Mapping[str, Any],
    **items: Any,
) -> Mapping[str, Any]:
    """Items of a checkpoint, each in the shardings asked for and with the fingerprint it must have.

    Raises:
        CorruptCheckpointError: one cannot be read, or holds other values than were saved.
    """
    path = Path(manager.directory) / str(step)
    try:
        restored = manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:
        raise _damage(path, error) from error
    for name, asked in items.items():
        value = restored[name]
        if isinstance(asked, ocp.args.JsonRestore):
            found, before = {name: fingerprint_of_json(value)}, {name: expected.get(name)}
        else:
            _check_placed(path, value, asked.item)
            found, before = fingerprints(value), expected.get(name)
        if name in expected and found != before:
            other = sorted(k for k in set(found) | set(before) if found.get(k) != before.get(k))
            raise _corrupt(path, f"{', '.join(other)} of {name} is not what was saved")
    return restored


def _check_placed(path: Path, restored: Any, asked: Any) -> None:
    """Raises if an array is not where it was asked to be: a copy on every device, say."""

    def check(array: jax.Array, wanted: jax.ShapeDtypeStruct) -> None:
        if not array.sharding.is_equivalent_to(wanted.sharding, array.ndim):
            raise RuntimeError(
                f"checkpoint {path} was restored as {array.sharding} instead of {wanted.sharding}"
            )

    jax.tree.map(check, restored, asked)


def _optimizer_item(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "rng": state.rng}


def _differences(saved: Any, given: Any, path: str) -> list[str]:
    if isinstance(saved, Mapping) and isinstance(given, Mapping):
        keys = sorted(set(saved) | set(given))
        return [d for k in keys for d in _differences(saved.get(k), given.get(k), f"{path}.{k}")]
    return [] if saved == given else [f"{path} was {saved!r}, is now {given!r}"]


def _check_same(directory: Path, part: str, saved: Any, given: Any) -> None:
    changed = [d for d in _differences(saved, given, part) if not d.startswith(_OF_NO_EFFECT)]
    if changed:
        raise ValueError(
            f"cannot resume from {directory} with another configuration: {'; '.join(changed)}. "
            "Use the configuration it was made with, or a new --workdir"
        )


def load_model(directory: Path) -> tuple[LanguageModel, TrainConfig, int]:
    """The model of the newest checkpoint on the default device, its configuration and its step.

    Where that checkpoint is damaged, the newest that is whole, with a warning of what is wrong.

    Args:
        directory: the `checkpoints` folder of a run, or the run's folder that holds it.

    Raises:
        CorruptCheckpointError: none of the checkpoints is whole.
        FileNotFoundError: there is no checkpoint in `directory`.
    """
    params, config, step = load_params(directory, _on_default_device)
    return nnx.merge(abstract_model(config.model)[0], params), config, step


def _on_default_device(config: LanguageModelConfig) -> Params:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        nnx.to_pure_dict(abstract_model(config)[1]),
    )


def load_params(
    directory: Path, abstract_params: Callable[[LanguageModelConfig], Params]
) -> tuple[Params, TrainConfig, int]:
    """The parameters of the newest checkpoint, its configuration and its step; see `load_model`.

    Args:
        directory: the `checkpoints` folder of a run, or the run's folder that holds it.
        abstract_params: makes ShapeDtypeStructs of the model's configuration, each with its
            sharding.
    """
    directory = Path(directory).absolute()
    if (directory / FOLDER).is_dir():
        directory = directory / FOLDER
    # A manager would not mind a folder that is missing, or that is none of its own.
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory} does not exist: name the folder of a training run (its --workdir)"
        )
    with ocp.CheckpointManager(
        directory, options=ocp.CheckpointManagerOptions(read_only=True)
    ) as manager:
        steps = sorted(manager.all_steps(), reverse=True)
        if not steps:
            raise FileNotFoundError(
                f"{directory} holds no finished checkpoint: name the folder of a training run "
                "(its --workdir) that has saved at least one"
            )
        errors = []
        for step in steps:
            try:
                config, expected = _read_config(manager, step)
                item = ocp.args.StandardRestore(abstract_params(config.model))
                return _read(manager, step, expected, params=item)["params"], config, step
            except CorruptCheckpointError as error:
                errors.append(str(error))
                warnings.warn(f"{error}; trying the one before it", stacklevel=2)
    raise CorruptCheckpointError(
        f"none of the checkpoints in {directory} is whole: {'; '.join(errors)}"
    )
