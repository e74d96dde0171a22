"""Tokenises a corpus once: any source and tokenizer to ArrayRecord shards of token ids.

    python experiments/prepare_data.py --source=fineweb/ --tokenizer=tokenizer.json --output=tokens/

Train on the result with `--config.data.source=tokens/` and the same tokenizer; another one is
refused. Order and documents stay what they were, so batches are the same as from the source itself.
"""

from collections.abc import Iterator
from pathlib import Path

import grain
import numpy as np
from absl import app, flags
from tqdm import tqdm

from swr_jax.data import load_tokenizer, open_source
from swr_jax.data.sources import KINDS
from swr_jax.data.token_records import write_token_records

_SOURCE = flags.DEFINE_string(
    "source", "python", "File, folder or pattern, or 'python' for the standard library's files."
)
_KIND = flags.DEFINE_enum("kind", "auto", KINDS, "What the source is; auto goes by suffix.")
_TEXT_FIELD = flags.DEFINE_string("text_field", "text", "JSON field or Parquet column of the text.")
_TOKENIZER = flags.DEFINE_string("tokenizer", "bytes", "'bytes', a tokenizer.json or a *.model.")
_OUTPUT = flags.DEFINE_string("output", None, "New folder for the shards.", required=True)
_NUM_SHARDS = flags.DEFINE_integer("num_shards", 1, "Files to write.", lower_bound=1)
_THREADS = flags.DEFINE_integer("threads", 4, "Threads that read and tokenise.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Reads, tokenises, writes and reports."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}: name the source with --source=")
    try:
        report = _prepare(Path(_OUTPUT.value))
    except (ImportError, ValueError) as error:
        raise SystemExit(f"prepare_data: {error}") from error
    size = sum(file.stat().st_size for file in Path(_OUTPUT.value).iterdir())
    print(
        f"{_OUTPUT.value}: {report['documents']:,} documents, {report['tokens']:,} tokens of "
        f"{report['tokenizer']!r} (vocabulary {report['vocab_size']:,}) in "
        f"{len(report['shards'])} shard(s), {size / 2**20:.1f} MiB"
    )


def _prepare(output: Path) -> dict:
    tokenizer = load_tokenizer(_TOKENIZER.value)
    source = open_source(_SOURCE.value, kind=_KIND.value, text_field=_TEXT_FIELD.value)
    if hasattr(source, "fingerprint"):
        raise ValueError(f"source={_SOURCE.value!r} holds tokens already; name a source of text")
    read_options = grain.ReadOptions(
        num_threads=_THREADS.value, prefetch_buffer_size=4 * _THREADS.value
    )
    documents = grain.MapDataset.source(source).map(tokenizer.encode).to_iter_dataset(read_options)

    def with_progress() -> Iterator[np.ndarray]:
        # A generator, so that no bar appears before the output folder has been accepted.
        yield from tqdm(documents, total=len(source), unit="doc", desc="tokenising")

    return write_token_records(
        output,
        with_progress(),
        num_documents=len(source),
        num_shards=_NUM_SHARDS.value,
        tokenizer=_TOKENIZER.value,
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
    )


if __name__ == "__main__":
    app.run(main)
