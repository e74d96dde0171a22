"""Tokenises a corpus once, with all cores, into ArrayRecord shards of token ids.

    python experiments/prepare_data.py --source=fineweb/ --tokenizer=tokenizer.json --output=tokens/

Train on the result with `--config.data.source=tokens/` and the same tokenizer; another one is
refused. Order and documents stay what they were, so batches are the same as from the source itself,
whatever the number of workers. The same command started again goes on where it was stopped, checks
what is there by its SHA-256 and makes damaged shards anew; with --verify it only checks, and needs
no source.
"""

import time
from pathlib import Path

from absl import app, flags
from tqdm import tqdm

from swr_jax.data import token_records
from swr_jax.data.prepare import Outcome, Preparation, usable_cores
from swr_jax.data.sources import KINDS

_SOURCE = flags.DEFINE_string(
    "source", "python", "File, folder or pattern, or 'python' for the standard library's files."
)
_KIND = flags.DEFINE_enum("kind", "auto", KINDS, "What the source is; auto goes by suffix.")
_TEXT_FIELD = flags.DEFINE_string("text_field", "text", "JSON field or Parquet column of the text.")
_TOKENIZER = flags.DEFINE_string("tokenizer", "bytes", "'bytes', a tokenizer.json or a *.model.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder for the shards.", required=True)
_SHARD_MIB = flags.DEFINE_float(
    "shard_mib", None, "MiB of the source per shard; by its size, from 1 to 64, if not given."
)
_WORKERS = flags.DEFINE_integer(
    "workers", None, "Processes that tokenise; one per core if not given.", lower_bound=1
)
_VERIFY = flags.DEFINE_bool("verify", False, "Only check what is in --output by its SHA-256.")


def main(argv: list[str]) -> None:
    """Prepares or checks, and reports."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}: name the source with --source=")
    try:
        if _VERIFY.value:
            verify(Path(_OUTPUT.value))
        else:
            prepare(Path(_OUTPUT.value))
    except (ImportError, OSError, ValueError) as error:
        raise SystemExit(f"prepare_data: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("\nprepare_data: stopped; run the same command to go on") from None


def prepare(output: Path) -> None:
    """Makes what is missing in `output`."""
    shard_bytes = None if _SHARD_MIB.value is None else int(_SHARD_MIB.value * 2**20)
    preparation = Preparation(
        _SOURCE.value,
        output,
        tokenizer=_TOKENIZER.value,
        kind=_KIND.value,
        text_field=_TEXT_FIELD.value,
        shard_bytes=shard_bytes,
    )
    began = time.perf_counter()
    with (
        preparation,
        tqdm(total=preparation.size, unit="B", unit_scale=True, desc="tokenising") as bar,
    ):
        outcome = preparation.run(workers=_WORKERS.value, advance=bar.update)
    report(output, outcome, time.perf_counter() - began)


def report(output: Path, outcome: Outcome, seconds: float) -> None:
    """Prints what a preparation has come to, and how to train on it."""
    metadata = outcome.metadata
    size = sum(shard["bytes"] for shard in metadata["shards"].values())
    for stem in outcome.damaged:
        print(f"{output / stem}: was damaged (another SHA-256 than written down), made anew")
    print(
        f"{output}: {metadata['documents']:,} documents, {metadata['tokens']:,} tokens of "
        f"{metadata['tokenizer']!r} (vocabulary {metadata['vocab_size']:,}) in "
        f"{len(metadata['shards'])} shard(s), {size / 2**20:.1f} MiB"
    )
    print(f"{outcome.made} made in {seconds:.1f} s, {outcome.kept} kept")
    print(
        f"train with --config.data.source={output} --config.data.tokenizer={metadata['tokenizer']}"
    )


def verify(output: Path) -> None:
    """Compares every file with its SHA-256; ValueError names those that differ."""
    metadata = token_records.read_json(output / token_records.METADATA_NAME)
    damaged = token_records.damaged_files(
        output, metadata, threads=_WORKERS.value or usable_cores()
    )
    if damaged:
        raise ValueError(
            f"{output} is damaged: {', '.join(damaged)}; run without --verify to make them anew"
        )
    print(f"{output}: {len(metadata['shards'])} shard(s) and the index have their SHA-256")


if __name__ == "__main__":
    app.run(main)
