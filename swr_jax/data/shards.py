"""Makes one shard of token records: tokenises its pieces, writes, checks."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from swr_jax.data import pieces, token_records
from swr_jax.data.tokenizers import Tokenizer

_REPORT = 1 << 20  # bytes of text between two reports of progress
# zstd at its fastest: as small as slower levels on token ids. One document per chunk: one read.
_RECORD_OPTIONS = "group_size:1,zstd:1"

Advance = Callable[[int], Any]


class PreparationError(ValueError):
    """A corpus cannot be tokenised, or not into this folder."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker must know beside the pieces of a shard."""

    folder: Path
    tokenizer: str
    fingerprint: str
    text_field: str
    num_shards: int
    names: dict[Path, str]


def make_or_keep(
    job: Job,
    number: int,
    shard: list[pieces.Piece],
    tokenizer: Tokenizer,
    advance: Advance,
) -> str:
    """Sees to it that a shard is there; returns "made", "kept" or, if made anew, "damaged"."""
    stem = token_records.shard_stem(number, job.num_shards)
    manifest = job.folder / f"{stem}.json"
    state = "made"
    if manifest.exists():
        if _is_whole(job.folder, stem, manifest):
            advance(_size_of(shard))
            return "kept"
        manifest.unlink()
        state = "damaged"
    _make_shard(job, stem, shard, tokenizer, advance)
    return state


def _is_whole(folder: Path, stem: str, manifest: Path) -> bool:
    try:
        expected = token_records.read_json(manifest)
    except ValueError:
        return False
    name = stem + token_records.SHARD_SUFFIX
    found = [token_records.sha256(folder / n) for n in (name, token_records.lengths_name(name))]
    return found == [expected["sha256"], expected["lengths_sha256"]]


def _make_shard(
    job: Job,
    stem: str,
    shard: list[pieces.Piece],
    tokenizer: Tokenizer,
    advance: Advance,
) -> None:
    from array_record.python import array_record_module

    vocab_size = tokenizer.vocab_size
    dtype = token_records.token_dtype(vocab_size)
    path = job.folder / (stem + token_records.SHARD_SUFFIX)
    lengths: list[int] = []
    text_bytes = largest = 0
    with Unfinished(path) as part:
        writer = array_record_module.ArrayRecordWriter(str(part), _RECORD_OPTIONS)
        for piece in shard:
            reported = read = unreported = 0
            for text, taken in pieces.read(piece, text_field=job.text_field):
                ids = tokenizer.encode(text)
                if len(ids):
                    largest = max(largest, int(ids.max()))
                    if largest >= vocab_size:
                        raise PreparationError(
                            f"{piece.path}: tokenizer={job.tokenizer!r} gave the id {largest}, its "
                            f"vocabulary has {vocab_size}: correct the tokenizer"
                        )
                writer.write(ids.astype(dtype).tobytes())
                lengths.append(len(ids))
                text_bytes += len(text)
                read = min(read + taken, piece.size)
                unreported += len(text)
                if unreported >= _REPORT:
                    advance(read - reported)
                    reported, unreported = read, 0
            advance(piece.size - reported)
        writer.close()
    lengths_path = job.folder / token_records.lengths_name(path.name)
    with Unfinished(lengths_path) as part, open(part, "wb") as file:
        np.save(file, np.array(lengths, np.uint32))
    first, last = shard[0], shard[-1]
    unit = "row_group" if first.kind == "parquet" else "byte"
    manifest = {
        "format": token_records.FORMAT,
        "documents": len(lengths),
        "tokens": sum(lengths),
        "text_bytes": text_bytes,
        "largest_id": largest,
        "bytes": path.stat().st_size,
        "sha256": token_records.sha256(path),
        "lengths_sha256": token_records.sha256(lengths_path),
        "from": {"file": job.names[first.path], unit: first.start},
        "to": {"file": job.names[last.path], unit: last.stop},
        "tokenizer": job.tokenizer,
        "fingerprint": job.fingerprint,
    }
    write_json(job.folder / f"{stem}.json", manifest)


def _size_of(shard: list[pieces.Piece]) -> int:
    """Bytes of the source's files that a shard is made from."""
    return sum(piece.size for piece in shard)


class Unfinished:
    """A temporary name beside `path`, which takes its place when the block ends without error."""

    def __init__(self, path: Path):
        self._path = path
        # Two processes may be at it, where one outlives its parent for a moment.
        self._part = path.with_name(f".{path.name}.{os.getpid()}.part")

    def __enter__(self) -> Path:
        return self._part

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._part.unlink(missing_ok=True)
            return
        with open(self._part, "rb") as file:
            os.fsync(file.fileno())  # or a power cut could leave the name without the content
        self._part.replace(self._path)


def write_json(path: Path, content: dict) -> None:
    """Replaces a file in one step."""
    with Unfinished(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n")
