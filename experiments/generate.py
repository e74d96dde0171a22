"""Continues a text with a trained model, streaming it as it is made.

    python experiments/generate.py --checkpoint=runs/first --prompt="def main("
    python experiments/generate.py --checkpoint=runs/first --interactive

Without --prompt the text to continue is read from standard input; an empty one begins a document.
With --interactive you and the model write in turns; nothing is read twice, however long it gets.
Ctrl-C ends an answer, Ctrl-D the conversation. --save keeps the state in a file when all is said,
--resume goes on from there: with --prompt=", and then" as if it had been one text.
"""

import signal
import sys
from pathlib import Path

from absl import app, flags, logging

from swr_jax.data import load_tokenizer
from swr_jax.generate import Conversation, Sampling
from swr_jax.train.checkpoint import load_model

CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Folder of a training run (its --workdir).", required=True
)
PROMPT = flags.DEFINE_string("prompt", None, "Text to continue; standard input if not given.")
INTERACTIVE = flags.DEFINE_bool("interactive", False, "Write in turns with the model.")
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 500, "Most tokens to write.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.8, "Below 1 likelier text, 0 always the likeliest token.", lower_bound=0.0
)
TOP_K = flags.DEFINE_integer(
    "top_k", None, "Choose among so many of the likeliest tokens only.", lower_bound=1
)
TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "Choose among the likeliest tokens that together have this probability."
)
MIN_P = flags.DEFINE_float(
    "min_p", 0.0, "Choose among tokens of this share of the likeliest one's probability."
)
STOP = flags.DEFINE_multi_string("stop", [], "End before this text; may be given several times.")
SEED = flags.DEFINE_integer("seed", 0, "Another seed, another text.")
MAX_LENGTH = flags.DEFINE_integer(
    "max_length", 8192, "Most tokens of a conversation with a model of full attention.", 2
)
SAVE = flags.DEFINE_string("save", None, "File to keep the state in at the end.")
RESUME = flags.DEFINE_string("resume", None, "File that --save wrote, to go on from.")

HELP = "Your text, then Enter; Ctrl-C ends an answer; /new begins anew; Ctrl-D or /quit ends."


def main(argv: list[str]) -> None:
    """Parses, generates, prints."""
    logging.set_verbosity(logging.ERROR)  # orbax warns that it only reads
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}: options begin with --")
    sys.stdout.reconfigure(errors="replace")  # a terminal may not know every character
    prompt = "" if INTERACTIVE.value and PROMPT.value is None else PROMPT.value
    if prompt is None:
        if sys.stdin.isatty():
            print("text to continue, ended by Ctrl-D:", file=sys.stderr)
        # Bytes that are no UTF-8 become U+FFFD rather than an error.
        prompt = sys.stdin.buffer.read().decode("utf-8", "replace")
    try:
        sampling = Sampling(
            temperature=TEMPERATURE.value,
            top_k=TOP_K.value,
            top_p=TOP_P.value,
            min_p=MIN_P.value,
            seed=SEED.value,
        )
        model, config, step = load_model(Path(CHECKPOINT.value))
        tokenizer = load_tokenizer(config.data.tokenizer)
        if INTERACTIVE.value:
            print(f"{CHECKPOINT.value}, step {step}. {HELP}", file=sys.stderr)
            conversation = converse(model, tokenizer, prompt, sampling)
        else:
            length = 1 + len(tokenizer.encode(prompt)) + MAX_TOKENS.value
            conversation = begin(model, tokenizer, length)
            conversation.reserve(length)  # after what was saved
            conversation.read(prompt)
            sys.stdout.write(prompt)
            show(conversation, sampling)
        if SAVE.value:
            conversation.save(SAVE.value)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)  # the shell's convention


def begin(model, tokenizer, max_length: int) -> Conversation:
    """Returns an empty conversation, or the saved one."""
    return Conversation(model, tokenizer, max_length=max_length, saved=RESUME.value)


def converse(model, tokenizer, prompt: str, sampling: Sampling) -> Conversation:
    """Reads lines and answers them until there are no more."""
    conversation = begin(model, tokenizer, MAX_LENGTH.value)
    if prompt:
        conversation.read(prompt)
        sys.stdout.write(prompt)
        show(conversation, sampling, until_interrupted=True)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            print()
            return conversation
        if line == "/quit":
            return conversation
        if line == "/new":
            conversation = Conversation(model, tokenizer, max_length=MAX_LENGTH.value)
            continue
        try:
            conversation.read(line + "\n")
            show(conversation, sampling, until_interrupted=True)
        except ValueError as error:
            print(f"error: {error}; /new begins anew", file=sys.stderr)


def show(
    conversation: Conversation, sampling: Sampling, *, until_interrupted: bool = False
) -> None:
    """Prints an answer as it is made; Ctrl-C ends it between two tokens, if that is wanted."""
    interrupted = []
    before = signal.getsignal(signal.SIGINT)
    if until_interrupted:
        signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
    try:
        for piece in conversation.answer(
            max_tokens=MAX_TOKENS.value,
            sampling=sampling,
            stop=STOP.value,
            is_over=lambda: bool(interrupted),
        ):
            sys.stdout.write(piece)
            sys.stdout.flush()
    finally:
        signal.signal(signal.SIGINT, before)
    sys.stdout.write("\n")


if __name__ == "__main__":
    app.run(main)
