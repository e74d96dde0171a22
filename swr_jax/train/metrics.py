"""What a run reports: one line per interval on the terminal, JSON lines, TensorBoard, a plot."""

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
from tqdm import tqdm

LOG_NAME = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
PLOT_NAME = "loss.png"

# Dense bfloat16 FLOP/s of one device by the start of `jax.Device.device_kind`; makers' data sheets.
PEAK_FLOPS: dict[str, float] = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Dense bfloat16 FLOP/s of `device`; None where the table has none, as for a CPU."""
    matches = [kind for kind in PEAK_FLOPS if device.device_kind.startswith(kind)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


def memory_mib(device: jax.Device) -> float:
    """Most memory used so far, MiB: the device's where it tells, else the process's on the host."""
    if stats := device.memory_stats():
        return stats["peak_bytes_in_use"] / 2**20
    # Linux counts ru_maxrss in KiB, macOS in bytes.
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def likelihood(nats: float, weight: float, target_bytes: int) -> dict[str, float]:
    """Mean loss in nats per target, perplexity, and bits per byte of the text.

    bits per byte = nats / ln 2 / target_bytes; unlike the loss it compares models that see the
    text through different tokenizers.

    Args:
        nats: Σ weight · cross-entropy over the targets.
        weight: Σ weight.
        target_bytes: bytes of text that the targets stand for.
    """
    loss = nats / max(weight, 1.0)
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": nats / math.log(2) / max(target_bytes, 1),
    }


class Meter:
    """Gathers the numbers of updates between two reports, and the time that updates took.

    Args:
        tokens_per_step: tokens of one update.
        devices: those the run uses.
    """

    def __init__(self, *, tokens_per_step: int, devices: Sequence[jax.Device]) -> None:
        self._tokens_per_step = tokens_per_step
        self._devices = devices
        self._updates: list[Mapping[str, float]] = []
        self._started: float | None = None
        self._steps = self._total_steps = 0
        self._seconds = self._total_seconds = 0.0
        self._flops = 0.0

    def start_clock(self) -> None:
        """From here on time counts."""
        self._started = time.perf_counter()

    def stop_clock(self) -> None:
        """Time no longer counts, nor do updates added before the clock first ran."""
        if self._started is not None:
            self._seconds += time.perf_counter() - self._started
            self._started = None

    def add(self, update: Mapping[str, float], *, flops_per_token: float) -> None:
        """Takes the metrics of one update, as numbers.

        Args:
            update: what the step returned and, of a run that draws it, the window or block_size.
            flops_per_token: of the model at that size, for MFU (model FLOPs utilisation).
        """
        self._updates.append(update)
        if self._started is not None:
            self._steps += 1
            self._flops += self._tokens_per_step * flops_per_token

    def discard(self) -> None:
        """Forgets the updates since the last interval, which were undone; time stops."""
        self.stop_clock()
        self._updates, self._steps, self._seconds, self._flops = [], 0, 0.0, 0.0

    def interval(self) -> dict[str, float]:
        """What is reported of the updates since the last call; begins a new interval.

        loss, perplexity, bits_per_byte and the losses of a distillation are over all targets of the
        interval, grad_norm and a drawn window or block_size are means over its updates,
        learning_rate is that of the last, as are a guard's counts of refused updates and rollbacks
        in the run so far.
        tokens_per_second is left out if no update was timed, mfu also where the device's peak is
        not known.
        """
        updates, steps, seconds = self._updates, self._steps, self._seconds
        flops = self._flops
        self._total_steps += steps
        self._total_seconds += seconds
        self._updates, self._steps, self._seconds, self._flops = [], 0, 0.0, 0.0

        def total(name: str) -> float:
            return sum(float(update[name]) for update in updates)

        if total("weight"):
            values = likelihood(total("nats"), total("weight"), int(total("target_bytes")))
        else:  # every update was refused, so there is no loss to report
            values = dict.fromkeys(("loss", "perplexity", "bits_per_byte"), math.nan)
        values["grad_norm"] = total("grad_norm") / len(updates)
        values["learning_rate"] = float(updates[-1]["learning_rate"])
        for name in ("hidden_loss", "logits_loss"):
            if name in updates[-1]:
                values[name] = total(name) / max(total("weight"), 1.0)
        for name in ("window", "block_size"):
            if name in updates[-1]:
                values[name] = total(name) / len(updates)
        for name in ("refused", "rollbacks"):
            if name in updates[-1]:
                values[name] = updates[-1][name]
        if steps:
            values["tokens_per_second"] = steps * self._tokens_per_step / seconds
            if peak := peak_flops(self._devices[0]):
                values["mfu"] = flops / seconds / (peak * len(self._devices))
        values["memory_mib"] = memory_mib(jax.local_devices()[0])  # others' are not to be asked
        return values

    def tokens_per_second(self) -> float | None:
        """Over all intervals reported; None if no update was timed."""
        if not self._total_steps:
            return None
        return self._total_steps * self._tokens_per_step / self._total_seconds


class Stopwatch:
    """Adds up the time that parts of a run take: `with stopwatch("evaluation"): ...`.

    Attributes:
        seconds: by the name of the part.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Times what is inside as one more stretch of `part`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - began


_FORMATS = {
    "loss": ".4f",
    "perplexity": ".3f",
    "bits_per_byte": ".4f",
    "unigram_bits_per_byte": ".4f",
    "grad_norm": ".3f",
    "learning_rate": ".2e",
    "hidden_loss": ".5f",
    "logits_loss": ".5f",
    "window": ",.0f",
    "block_size": ",.0f",
    "refused": ",.0f",
    "rollbacks": ",.0f",
    "tokens_per_second": ",.0f",
    "mfu": ".1%",
    "memory_mib": ",.0f",
}


def format_line(step: int, split: str, values: Mapping[str, float]) -> str:
    """`step: 120  split: train  loss: 1.2345  …`, one `key: value` after the other."""
    shown = [f"{name}: {value:{_FORMATS[name]}}" for name, value in values.items()]
    return "  ".join([f"step: {step}", f"split: {split}", *shown])


class Reporter:
    """Tells the terminal, `metrics.jsonl` and TensorBoard how a run goes.

    Args:
        directory: gets `metrics.jsonl` and `tensorboard/`.
        resume_step: step that the run starts from; later lines of an earlier run are dropped, so
            that no step is there twice.
        enabled: False does nothing: of several processes one reports.
    """

    def __init__(self, directory: Path, *, resume_step: int, enabled: bool) -> None:
        self._enabled = enabled
        if not enabled:
            return
        self._directory = directory
        self._open(resume_step)

    def _open(self, step: int) -> None:
        import tensorboardX

        kept = [line for line in read_metrics(self._directory) if line["step"] <= step]
        shortened = self._directory / (LOG_NAME + ".tmp")
        shortened.write_text("".join(json.dumps(line) + "\n" for line in kept))
        shortened.replace(self._directory / LOG_NAME)
        self._file = (self._directory / LOG_NAME).open("a")
        self._tensorboard = tensorboardX.SummaryWriter(
            str(self._directory / TENSORBOARD_FOLDER), purge_step=step + 1
        )

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._enabled:
            self._file.close()
            self._tensorboard.close()

    def rewind(self, step: int) -> None:
        """Drops what was reported after `step`: the run goes on from there."""
        if self._enabled:
            self.__exit__()
            self._open(step)

    def report(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Reports `values` of the split "train" or "validation" after update `step`."""
        if not self._enabled:
            return
        tqdm.write(format_line(step, split, values))
        self._file.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(f"{split}/{name}", value, step)


def read_metrics(directory: Path) -> list[dict]:
    """The lines of `metrics.jsonl`, oldest first; none where there is no file yet.

    A last line cut short by a crash is left out.
    """
    path = directory / LOG_NAME
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def plot_losses(directory: Path, *, unigram_bits_per_byte: float) -> None:
    """Draws bits per byte against step, from `metrics.jsonl`, into `loss.png`."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    import matplotlib.pyplot as plt

    lines = read_metrics(directory)
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for split, style in (
        ("train", {"color": "tab:blue", "linewidth": 1.2}),
        ("validation", {"color": "tab:orange", "marker": "o", "markersize": 4}),
    ):
        points = [(line["step"], line["bits_per_byte"]) for line in lines if line["split"] == split]
        if points:
            axes.plot(*zip(*points, strict=True), label=split, **style)
    axes.axhline(
        unigram_bits_per_byte, color="gray", linestyle="--", linewidth=1, label="unigram model"
    )
    axes.set(xlabel="step", ylabel="bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(directory / PLOT_NAME, dpi=150)
    plt.close(figure)
