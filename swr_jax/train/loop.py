"""Training from the first update to the last; reads from top to bottom."""

import collections
import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from flax import nnx
from tqdm import tqdm

from swr_jax.data import make_dataset, open_corpus
from swr_jax.generate import generate_text
from swr_jax.train.agreement import check_agreement
from swr_jax.train.checkpoint import Checkpointer
from swr_jax.train.config import GuardConfig, TrainConfig
from swr_jax.train.evaluation import evaluate, unigram_bits_per_byte, validation_batches
from swr_jax.train.flops import flops_per_token
from swr_jax.train.guard import with_counts
from swr_jax.train.metrics import (
    LOG_NAME,
    PLOT_NAME,
    TENSORBOARD_FOLDER,
    Meter,
    Reporter,
    Stopwatch,
    plot_losses,
    read_metrics,
)
from swr_jax.train.sharding import batch_sharding, check_batch, make_mesh, put_batch
from swr_jax.train.state import make_blueprint
from swr_jax.train.step import Metrics, make_eval_step, make_train_step
from swr_jax.train.teacher import init_student, with_teacher
from swr_jax.train.window_schedule import drawn_models, drawn_size


class NonFiniteError(FloatingPointError):
    """The loss, the gradient or a parameter became NaN or infinite, or the loss had a spike."""


class _RollBackError(Exception):
    """An update was refused, and `config.guard` wants to go on from the newest checkpoint."""

    def __init__(self, step: int, values: Mapping[str, float], found: str) -> None:
        super().__init__(f"update {step} refused: {found}")
        self.refused, self.rollbacks = int(values["refused"]), int(values["rollbacks"]) + 1


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run came to.

    step: updates done. stopped_by: the signal that ended it early, if any. train_loss: mean nats
    per target of the last interval that the log tells of, None without a log. validation: loss,
    perplexity, bits_per_byte and the unigram model's bits per byte; None if stopped early.
    tokens_per_second: while updates ran, compilation left out; None if there was nothing to time.
    seconds: what else took time between updates: "reports", "evaluation" and "checkpoints".
    sample: `config.sample_prompt` and what the model made of it; empty if there was none to make.
    """

    step: int
    stopped_by: signal.Signals | None
    train_loss: float | None
    validation: dict[str, float] | None
    tokens_per_second: float | None
    seconds: Mapping[str, float]
    sample: str
    checkpoints: Path
    log: Path
    tensorboard: Path
    plot: Path


def train(config: TrainConfig, workdir: Path) -> Summary:
    """Trains a language model, going on from the newest checkpoint in `workdir` if there is one.

    What becomes of an update that would spoil the run is up to `config.guard`.
    With `config.window_schedule` every update trains at the size drawn for it; evaluation, the
    sample and whoever loads the checkpoint use `config.model`, which is of the longest size.

    With `config.distill` the model starts as a trained one in which some mixers are new.

    `workdir` gets `checkpoints/`, `metrics.jsonl`, `tensorboard/` and `loss.png`. SIGINT and
    SIGTERM end the run with a checkpoint after the update at hand, a second one ends it at once.

    Raises:
        NonFiniteError: the loss, the gradient or a parameter is not finite, or the loss had a
            spike, and `config.guard` has no way on. The message says at which step; the newest
            checkpoint is from before it.
        ValueError: the configuration does not fit the devices, the data or the checkpoint, or is
            not the same in all processes.
    """
    check_agreement(config)
    is_main = jax.process_index() == 0
    say = tqdm.write if is_main else _say_nothing

    mesh = make_mesh(config.mesh)
    length, batch_size = config.data.sequence_length, config.data.batch_size
    check_batch(
        mesh, batch_size=batch_size, sequence_length=length, accumulation=config.accumulation
    )
    sharding = batch_sharding(mesh)

    corpus = open_corpus(config.data)
    if config.model.vocab_size < corpus.tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size} must be at least the "
            f"{corpus.tokenizer.vocab_size} ids of data.tokenizer={config.data.tokenizer!r}"
        )
    dataset = make_dataset(
        config.data,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        corpus=corpus,
    )
    batches = iter(dataset)
    held_out = validation_batches(config.data, corpus, count=config.eval_batches)
    unigram = unigram_bits_per_byte(corpus, held_out)

    config, teacher = with_teacher(config, mesh)
    blueprint = make_blueprint(config, mesh, new=teacher and teacher.new)
    models = drawn_models(config)
    train_steps = {
        size: make_train_step(
            blueprint.of_model(model),
            mesh,
            accumulation=config.accumulation,
            z_loss=config.z_loss,
            guard=config.guard,
            distillation=teacher and teacher.distillation,
        )
        for size, model in models.items()
    }
    flops = {
        size: flops_per_token(model, num_params=blueprint.num_params, length=length)
        for size, model in models.items()
    }
    drawn_name = config.window_schedule.option.rpartition(".")[2]
    eval_step = make_eval_step(blueprint, mesh)

    device = jax.devices()[0]
    tokens_per_step = batch_size * length
    say(
        f"model: {blueprint.num_params:,} parameters, pattern {'+'.join(config.model.pattern)}, "
        f"depth {config.model.depth}, features {config.model.features}\n"
        f"data: {config.data.source}, {len(corpus.train):,} documents to train on, "
        f"{len(corpus.validation):,} held out; {tokens_per_step:,} tokens per step\n"
        f"devices: {jax.device_count()} x {device.device_kind}, mesh "
        + ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    )
    if teacher:
        say(f"teacher: {teacher.describe(blueprint)}")

    workdir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpointer(workdir, keep=config.keep_checkpoints))
        start = checkpoints.latest_step() or 0
        if start:
            start, state, damaged = checkpoints.restore_newest(blueprint.abstract, batches, config)
            for error in damaged:
                say(f"set aside as .corrupt: {error}")
            say(f"resumed from the checkpoint of step {start}")
            if start >= config.steps:
                say(f"nothing left to train: steps={config.steps}; raise it, or begin elsewhere")
        else:
            state = init_student(config, blueprint, teacher)
        reporter = stack.enter_context(Reporter(workdir, resume_step=start or -1, enabled=is_main))
        if teacher and not start:  # what the swap alone has done
            swapped = evaluate(eval_step, state.params, held_out, sharding)
            reporter.report(0, "validation", swapped | {"unigram_bits_per_byte": unigram})
        # A teacher that is not asked in updates is not needed any more.
        asked, teacher = teacher.asked if teacher else (), None
        signals = stack.enter_context(_StopSignals())
        bar = stack.enter_context(
            tqdm(
                total=config.steps, initial=start, unit=" steps", disable=None if is_main else True
            )
        )

        spent = Stopwatch()
        meter = Meter(tokens_per_step=tokens_per_step, devices=jax.devices())
        pending: collections.deque = collections.deque()  # updates whose numbers are not read yet
        compiled: set[int | None] = set()  # sizes that have been trained at

        def look_at_oldest() -> None:
            step, size, metrics = pending.popleft()
            drawn = {} if size is None else {drawn_name: size}
            values = _checked(step, metrics, checkpoints, config.guard) | drawn
            meter.add(values, flops_per_token=flops[size])

        validation, stopped_by, step = None, None, start
        while step < config.steps:
            step += 1
            size = drawn_size(config, step)
            first = size not in compiled
            if first:  # compilation is not to be timed
                meter.stop_clock()
                compiled.add(size)
                began = time.perf_counter()
            state, metrics = train_steps[size](state, put_batch(next(batches), sharding), *asked)
            pending.append((step, size, metrics))
            stopped_by = signals.agreed(step, checkpoints)
            done = step == config.steps
            log_due = done or stopped_by or step % config.log_every == 0
            eval_due = done or (not stopped_by and step % config.eval_every == 0)
            save_due = done or stopped_by or step % config.checkpoint_every == 0
            pause = log_due or eval_due or save_due or first
            try:
                # The device works on the newest update while the one before it is looked at.
                while len(pending) > (0 if pause else 1):
                    look_at_oldest()
            except _RollBackError as error:
                place = batches.get_state()
                step, state, _ = checkpoints.restore_newest(blueprint.abstract, batches, config)
                batches.set_state(place)  # the data go on: the same would lead to the same again
                state = with_counts(state, refused=error.refused, rollbacks=error.rollbacks)
                say(f"{error}; back to the checkpoint of step {step}, with the data that follow")
                pending.clear()
                meter.discard()
                reporter.rewind(step)
                bar.update(step - bar.n)
                continue
            bar.update()
            if not pause:
                continue

            meter.stop_clock()
            if first:
                at = "" if size is None else f" at {drawn_name} {size}"
                say(f"first step{at}, with its compilation: {time.perf_counter() - began:.1f} s")
            if log_due:
                with spent("reports"):
                    values = meter.interval()
                    bar.set_postfix_str(f"loss {values['loss']:.3f}")
                    reporter.report(step, "train", values)
            if eval_due:
                with spent("evaluation"):
                    validation = evaluate(eval_step, state.params, held_out, sharding)
                    validation["unigram_bits_per_byte"] = unigram
                    reporter.report(step, "validation", validation)
            if save_due:
                with spent("checkpoints"):
                    checkpoints.save(step, state, batches, config)
            if stopped_by:
                break
            meter.start_clock()
        bar.close()
        with spent("checkpoints"):
            checkpoints.wait()

        if validation is None and not stopped_by:  # there was no step left to do
            validation = evaluate(eval_step, state.params, held_out, sharding)
            validation["unigram_bits_per_byte"] = unigram

        if is_main:
            plot_losses(workdir, unigram_bits_per_byte=unigram)
        train_losses = [x["loss"] for x in read_metrics(workdir) if x["split"] == "train"]
        sample = ""
        if config.sample_tokens and not stopped_by and jax.process_count() == 1:
            model = nnx.merge(blueprint.graphdef, state.params)
            sample = config.sample_prompt + "".join(
                generate_text(
                    model,
                    corpus.tokenizer,
                    config.sample_prompt,
                    max_tokens=config.sample_tokens,
                    temperature=config.sample_temperature,
                    key=jax.random.fold_in(state.rng, state.step),
                )
            )
        return Summary(
            step=int(state.step),
            stopped_by=stopped_by,
            train_loss=train_losses[-1] if train_losses else None,
            validation=validation,
            tokens_per_second=meter.tokens_per_second(),
            seconds=spent.seconds,
            sample=sample,
            checkpoints=checkpoints.directory,
            log=workdir / LOG_NAME,
            tensorboard=workdir / TENSORBOARD_FOLDER,
            plot=workdir / PLOT_NAME,
        )


def _say_nothing(_: str) -> None:
    pass


def _checked(
    step: int, metrics: Metrics, checkpoints: Checkpointer, guard: GuardConfig
) -> dict[str, float]:
    """The metrics of `step` as numbers; raises where the run cannot go on from that update."""
    values = {name: value.item() for name, value in jax.device_get(metrics).items()}
    # Also the parameters' norm, or a checkpoint could be saved that has no way on.
    bad = [n for n in ("loss", "grad_norm", "param_norm") if not math.isfinite(values[n])]
    if not (bad or values.get("is_refused")):
        return values
    found = ", ".join(f"{name} is {values[name]}" for name in bad) or (
        f"loss is {values['loss']:.4g}, more than {guard.spike_factor} times its average"
    )
    tried = ""
    if guard.action == "skip":
        if values["in_a_row"] <= guard.max_in_a_row:
            return values | {"grad_norm": 0.0}
        tried = f" {values['in_a_row']} updates in a row were left out."
    checkpoints.wait()
    newest = checkpoints.latest_step()
    if guard.action == "rollback" and newest:
        if values["rollbacks"] < guard.max_rollbacks:
            raise _RollBackError(step, values, found)
        tried = f" The run has gone back to a checkpoint {values['rollbacks']} times."
    kept = (
        f"The newest checkpoint, of step {newest}, is from before it: {checkpoints.directory}"
        if newest
        else "There was no checkpoint yet"
    )
    raise NonFiniteError(
        f"training broke down at step {step}: {found}.{tried} {kept}. Try a lower learning rate, a "
        "longer warm-up or a smaller clip_norm"
    )


class _StopSignals:
    """Notes SIGINT and SIGTERM, so that the loop can end between two updates.

    Within the `with` block the first signal is noted; after it the handlers are back as they were,
    so that a second one takes its usual, immediate effect.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "_StopSignals":
        # Python lets only the main thread handle signals. With several processes JAX listens to
        # SIGTERM itself, to make all of them stop at the same step.
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            for number in self._SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _note(self, number: int, _: FrameType | None) -> None:
        self._received = signal.Signals(number)
        self.__exit__()

    def agreed(self, step: int, checkpoints: Checkpointer) -> signal.Signals | None:
        """The signal received; with several processes, once all know of it at the same `step`."""
        if jax.process_count() == 1:
            return self._received
        return signal.SIGTERM if checkpoints.reached_preemption(step) else None
