"""Continues a text with a trained model, streaming it as it is made.

    python experiments/generate.py --checkpoint=runs/first --prompt="def main("

Without --prompt the text to continue is read from standard input; an empty one begins a document.
"""

import signal
import sys
from pathlib import Path

import jax
from absl import app, flags, logging

from swr_jax.data import load_tokenizer
from swr_jax.generate import generate_text
from swr_jax.train.checkpoint import load_model

CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Folder of a training run (its --workdir).", required=True
)
PROMPT = flags.DEFINE_string("prompt", None, "Text to continue; standard input if not given.")
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 500, "Most tokens to write.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.8, "Below 1 likelier text, 0 always the likeliest token.", lower_bound=0.0
)
TOP_K = flags.DEFINE_integer(
    "top_k", None, "Choose among so many of the likeliest tokens only.", lower_bound=1
)
SEED = flags.DEFINE_integer("seed", 0, "Another seed, another text.")


def main(argv: list[str]) -> None:
    """Parses, generates, prints."""
    logging.set_verbosity(logging.ERROR)  # orbax warns that it only reads
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}: options begin with --")
    sys.stdout.reconfigure(errors="replace")  # a terminal may not know every character
    prompt = PROMPT.value
    if prompt is None:
        if sys.stdin.isatty():
            print("text to continue, ended by Ctrl-D:", file=sys.stderr)
        # Bytes that are no UTF-8 become U+FFFD rather than an error.
        prompt = sys.stdin.buffer.read().decode("utf-8", "replace")
    try:
        model, config, _ = load_model(Path(CHECKPOINT.value))
        pieces = generate_text(
            model,
            load_tokenizer(config.data.tokenizer),
            prompt,
            max_tokens=MAX_TOKENS.value,
            temperature=TEMPERATURE.value,
            top_k=TOP_K.value,
            key=jax.random.key(SEED.value),
        )
        sys.stdout.write(prompt)
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)  # the shell's convention
    sys.stdout.write("\n")


if __name__ == "__main__":
    app.run(main)
