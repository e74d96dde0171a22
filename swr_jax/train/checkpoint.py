"""Checkpoints from which a run goes on as if it had never stopped."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from flax import nnx

from swr_jax.nn.language_model import LanguageModel
from swr_jax.train.config import TrainConfig, from_dict, to_dict
from swr_jax.train.state import TrainState

FOLDER = "checkpoints"  # of a run's folder
# Options that do not change what a run computes, so that they may change when it is resumed.
_OF_NO_EFFECT = (
    "model.remat ",
    "model.mlstm.chunk_size ",
    "model.gated_delta.chunk_size ",
    "data.read_threads ",
    "data.verify ",
)


class Checkpointer:
    """Saves and restores training states in the folder `checkpoints` of `workdir`, one per step.

    A checkpoint has four items: `params`; `optimizer` (its state, the step and the PRNG key);
    `data`, the place in the training data; `config`, the run's configuration. The place is that of
    all processes together, so a run may go on with more of them or fewer: none of its documents is
    repeated or left out.
    Saving is asynchronous, and a checkpoint whose writing was cut off is never taken for a whole
    one. Use it as a context manager: leaving it waits for the last write.
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

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

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
        run = {"config": to_dict(config)}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                optimizer=ocp.args.StandardSave(_optimizer_item(state)),
                data=ocp.args.JsonSave(data_iterator.get_state()),
                config=ocp.args.JsonSave(run),
            ),
        )

    def wait(self) -> None:
        """Waits until every checkpoint started is written, and raises if one could not be."""
        self._manager.wait_until_finished()

    def restore(
        self,
        step: int,
        abstract_state: TrainState,
        data_iterator: grain.DatasetIterator,
        config: TrainConfig,
    ) -> TrainState:
        """The state of `step` in the shardings of `abstract_state`; moves `data_iterator` there.

        Raises ValueError if the checkpoint's model or data differ from `config`'s.
        """
        run = self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))
        run = run["config"]
        # What was saved before an option existed had its default.
        saved = from_dict(TrainConfig, run["config"])
        for part in ("model", "data"):
            was, now = (to_dict(getattr(either, part)) for either in (saved, config))
            _check_same(self.directory, part, was, now)
        item = _optimizer_item(abstract_state)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract_state.params),
                optimizer=ocp.args.StandardRestore(item),
                data=ocp.args.JsonRestore(),
            ),
        )
        data_iterator.set_state(restored["data"])
        optimizer = restored["optimizer"]
        return TrainState(
            step=optimizer["step"],
            params=restored["params"],
            opt_state=optimizer["opt_state"],
            rng=optimizer["rng"],
        )


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

    Args:
        directory: the `checkpoints` folder of a run, or the run's folder that holds it.

    Raises:
        FileNotFoundError: there is no checkpoint in `directory`.
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
        step = manager.latest_step()
        if step is None:
            raise FileNotFoundError(
                f"{directory} holds no finished checkpoint: name the folder of a training run "
                "(its --workdir) that has saved at least one"
            )
        run = manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))
        config = from_dict(TrainConfig, run["config"]["config"])
        abstract = nnx.eval_shape(lambda: LanguageModel(config.model, rngs=nnx.Rngs(0)))
        graphdef, variables = nnx.split(abstract, nnx.Param)
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
            nnx.to_pure_dict(variables),
        )
        restored = manager.restore(
            step, args=ocp.args.Composite(params=ocp.args.StandardRestore(shapes))
        )
    return nnx.merge(graphdef, restored["params"]), config, step
