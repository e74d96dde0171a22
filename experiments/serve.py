"""Serves a trained model over HTTP, in the completions and chat format of OpenAI.

    python experiments/serve.py --checkpoint=runs/first --port=8000
    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \
        -d '{"model": "first", "prompt": "def main(", "max_tokens": 64}'

Any client of that format works with base_url=http://127.0.0.1:8000/v1 and any key. Requests are
answered side by side, --slots of them; beyond --max_waiting more, clients are told to try again.
Chats become a transcript ("User: ...", "Assistant: ..."), since these models know no other form.
Besides the format's own options there are top_k and min_p. SIGTERM and Ctrl-C let answers end
within --grace seconds. Needs: pip install 'swr_jax[serve]'.
"""

import sys
from pathlib import Path

from absl import app, flags, logging

from swr_jax.data import load_tokenizer
from swr_jax.generate import Engine
from swr_jax.train.checkpoint import load_model

CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Folder of a training run (its --workdir).", required=True
)
NAME = flags.DEFINE_string("name", None, "The model's name; by default that of the folder.")
HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on.")
PORT = flags.DEFINE_integer("port", 8000, "Port to listen on; 0 takes a free one.", 0, 65535)
SLOTS = flags.DEFINE_integer("slots", 8, "Answers that are generated side by side.", 1)
MAX_WAITING = flags.DEFINE_integer("max_waiting", 64, "Requests that may wait for a slot.", 0)
MAX_LENGTH = flags.DEFINE_integer(
    "max_length", 4096, "Most tokens of a request, prompt and answer together.", 2
)
CHUNK_SIZE = flags.DEFINE_integer("chunk_size", 512, "Tokens of a prompt that are read at once.")
GRACE = flags.DEFINE_float("grace", 10.0, "Seconds that answers have left after a signal.", 0.0)


def main(argv: list[str]) -> None:
    """Parses, loads, serves."""
    logging.set_verbosity(logging.ERROR)  # orbax warns that it only reads
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}: options begin with --")
    try:
        from swr_jax.serve.app import Server
        from swr_jax.serve.worker import Worker
    except ImportError as error:
        sys.exit(f"error: {error}")
    folder = Path(CHECKPOINT.value)
    try:
        model, config, step = load_model(folder)
        engine = Engine(
            model,
            load_tokenizer(config.data.tokenizer),
            slots=SLOTS.value,
            max_length=MAX_LENGTH.value,
            max_waiting=MAX_WAITING.value,
            chunk_size=CHUNK_SIZE.value,
        )
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    name = NAME.value or folder.absolute().name
    print(f"{name}, step {step}: compiling", flush=True)
    engine.warm_up()
    Server(
        Worker(engine),
        name,
        host=HOST.value,
        port=PORT.value,
        grace=GRACE.value,
        announce=lambda address: print(f"{name} on {address}; Ctrl-C to stop", flush=True),
    ).serve_until_signal()
    print("stopped")


if __name__ == "__main__":
    app.run(main)
