"""Trains a language model.

    python experiments/pretrain.py --config=experiments/configs/phalanx_tiny.py --workdir=runs/first

Every value of the configuration can be overridden (--config.model.features=256). The same command
started again goes on from the newest checkpoint in --workdir.
"""

import os
import shlex
import signal
import sys
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from swr_jax.train.checkpoint import UnwrittenCheckpointError
from swr_jax.train.config import make_train_config
from swr_jax.train.loop import NonFiniteError, Summary, train

FOLDER = Path(__file__).parent

# What a user can mend, by what the message says.
_ERRORS = (FileNotFoundError, ImportError, NonFiniteError, UnwrittenCheckpointError, ValueError)

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file; --config.NAME=VALUE overrides a value in it."
)
flags.mark_flag_as_required("config")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for checkpoints, metrics and plot, made if missing.", required=True
)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Be one of several processes, as on a TPU pod or under Slurm or GKE."
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, where the cluster does not tell it by itself."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Likewise, how many processes.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Likewise, the number of this one.")


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line; for an unknown override ends with the library's words alone."""
    try:
        return app.parse_flags_with_usage(argv)
    except AttributeError as error:
        sys.exit(f"error: unknown option of the configuration: {error}")


def main(argv: list[str]) -> None:
    """Parses, trains, reports."""
    logging.set_verbosity(logging.WARNING)  # orbax tells of every file it writes
    sys.stdout.reconfigure(errors="replace")  # a terminal may not know every character
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}: options begin with --")
    if DISTRIBUTED.value:
        jax.distributed.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    try:
        summary = train(make_train_config(CONFIG.value.to_dict()), Path(WORKDIR.value))
    except _ERRORS as error:
        sys.exit(f"error: {error}")
    if jax.process_index() == 0:
        report(summary)
    # A cluster that takes the machine away (SIGTERM) is not to hear of a failure: all is saved.
    if summary.stopped_by == signal.SIGINT:
        sys.exit(128 + signal.SIGINT)  # the shell's convention


def report(summary: Summary) -> None:
    """Prints what came of a run, and the command to run next."""
    if summary.stopped_by:
        print(f"\nstopped by {summary.stopped_by.name}; step {summary.step} is saved. Go on with")
        print(f"  {_command(*sys.argv)}")
        return
    validation, unigram = summary.validation, summary.validation["unigram_bits_per_byte"]
    bits = validation["bits_per_byte"]
    print(f"\ndone: {summary.step} steps")
    if summary.train_loss is not None:  # or the log of a run that was done already is gone
        print(f"  train loss          {summary.train_loss:.4f} nats per token")
    print(f"  validation loss     {validation['loss']:.4f} nats per token, ", end="")
    print(f"perplexity {validation['perplexity']:.3f}")
    print(f"  validation          {bits:.4f} bits per byte (unigram model: {unigram:.4f})")
    if summary.tokens_per_second:
        print(f"  speed               {summary.tokens_per_second:,.0f} tokens per second")
    print(f"  checkpoint          {summary.checkpoints / str(summary.step)}")
    print(f"  loss plot           {summary.plot}")
    print(f"  metrics             {summary.log} (TensorBoard: {summary.tensorboard})")
    if summary.sample:
        # A young model writes control characters too, which a terminal would obey.
        shown = [c if c.isprintable() or c in "\n\t" else "\ufffd" for c in summary.sample]
        print("\nsample:")
        print("".join(shown))
    print("\nwrite more text with")
    script = os.path.relpath(FOLDER / "generate.py")
    print("  " + _command(script, f"--checkpoint={WORKDIR.value}", "--prompt=import "))


def _command(*arguments: str) -> str:
    """A line for the shell that runs `arguments` in this Python."""
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    return shlex.join([str(python), *arguments])


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
