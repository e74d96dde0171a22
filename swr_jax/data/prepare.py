"""Tokenises a corpus once, with every core, into the folder that `TokenRecords` reads.

The corpus is cut into shards by its own bytes alone, so that neither the number of workers nor an
interruption shows in what is written. A worker is a process that makes one shard at a time under a
temporary name and renames it when it is whole; the shard's manifest, which comes last, holds its
SHA-256. Run again, the same preparation checks the shards that are there by their SHA-256, keeps
those that are right and makes the others.
"""

import dataclasses
import fcntl
import hashlib
import multiprocessing
import multiprocessing.connection
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from swr_jax.data import pieces, token_records
from swr_jax.data.shards import (
    Advance,
    Job,
    PreparationError,
    Unfinished,
    make_or_keep,
    write_json,
)
from swr_jax.data.sources import list_source
from swr_jax.data.tokenizers import load_tokenizer

_LOCK_NAME = ".lock"
_MANY_SHARDS = 256  # as many as there are at most while they are small
_SMALLEST_SHARD, _LARGEST_SHARD = 1 << 20, 1 << 26  # bytes of the source
_WORTH_A_WORKER = 1 << 23  # bytes of the source that take longer than a process to start
_OF_NO_EFFECT = ("source", "tokenizer")  # names of what other entries say exactly


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run of a preparation has done.

    Attributes:
      metadata: content of `metadata.json`.
      made, kept: shards that this run has made, and found whole.
      damaged: names of shards that were there with another SHA-256 than in their manifest; they
        are among those made.
    """

    metadata: dict
    made: int
    kept: int
    damaged: list[str]


class Preparation:
    """A corpus, a tokenizer and the folder for the tokens, which is locked until `close`.

    Args:
      source, kind, text_field: see `open_source`; text, not tokens.
      output: made if missing; must be empty or hold a part of this very preparation.
      tokenizer: see `load_tokenizer`.
      shard_bytes: about how many bytes of the source's files go into a shard; None is a 256th of
        all, between 1 and 64 MiB.

    Attributes:
      size: bytes of the source's files.
      num_shards: shards that they make.

    Raises:
      ValueError: see `open_source` and `load_tokenizer`.
      PreparationError: `output` holds something else, or another process is at work in it.
      ImportError: a package that the source or the tokenizer needs is missing.
    """

    def __init__(
        self,
        source: str,
        output: Path,
        *,
        tokenizer: str = "bytes",
        kind: str = "auto",
        text_field: str = "text",
        shard_bytes: int | None = None,
    ):
        vocabulary = load_tokenizer(tokenizer)
        kind, paths = list_source(source, kind=kind)
        if kind == "arrayrecord":
            raise PreparationError(f"source={source!r} holds tokens already; name a source of text")
        sizes = {path: os.path.getsize(path) for path in paths}
        total = sum(sizes.values())
        if shard_bytes is None:
            shard_bytes = min(max(total // _MANY_SHARDS, _SMALLEST_SHARD), _LARGEST_SHARD)
        if shard_bytes < 1:
            raise PreparationError(f"shard_bytes={shard_bytes} must be at least 1, or None")
        found = pieces.cut(kind, paths, text_field=text_field, size=shard_bytes)
        self._shards = list(_grouped(found, shard_bytes))
        self.num_shards = len(self._shards)
        self.size = sum(piece.size for shard in self._shards for piece in shard)
        names = pieces.relative(paths)
        listing = "".join(f"{names[path]}\0{sizes[path]}\n" for path in paths)
        self._plan = {
            "format": token_records.FORMAT,
            "source": source,
            "kind": kind,
            "text_field": text_field,
            "files": len(paths),
            "bytes": total,
            "listing_sha256": hashlib.sha256(listing.encode()).hexdigest(),
            "tokenizer": tokenizer,
            "fingerprint": vocabulary.fingerprint,
            "vocab_size": vocabulary.vocab_size,
            "shard_bytes": shard_bytes,
            "shards": self.num_shards,
        }
        self._job = Job(
            output, tokenizer, vocabulary.fingerprint, text_field, self.num_shards, names
        )
        self._tokenizer = vocabulary
        self._lock = _locked(output)
        try:
            self._accept_folder()
        except ValueError:
            self.close()
            raise

    def __enter__(self) -> "Preparation":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets others work in the folder."""
        os.close(self._lock)

    def run(self, *, workers: int | None = None, advance: Advance = lambda _: None) -> Outcome:
        """Makes the shards that are missing or damaged, then index and metadata.

        Args:
          workers: processes; 1 works in this one. None is one per core, or fewer where the corpus
            is too small for starting them to pay.
          advance: told now and then how many bytes of the source are done since it was last told.

        Raises:
          ValueError: a document cannot be read; shards that are finished stay, and the same
            preparation goes on with the others.
          PreparationError: a worker died, for example for want of memory; likewise.
        """
        if workers is None:
            workers = max(1, min(usable_cores(), self.size // _WORTH_A_WORKER))
        if workers < 1:
            raise PreparationError(f"workers={workers} must be at least 1")
        workers = min(workers, self.num_shards)
        if workers == 1:
            states = {
                number: make_or_keep(self._job, number, shard, self._tokenizer, advance)
                for number, shard in enumerate(self._shards)
            }
        else:
            states = _run_workers(self._job, self._shards, workers, advance)
        metadata = self._finish()
        stems = [token_records.shard_stem(n, self.num_shards) for n in sorted(states)]
        found = [states[number] for number in sorted(states)]
        return Outcome(
            metadata,
            made=sum(state != "kept" for state in found),
            kept=found.count("kept"),
            damaged=[stem for stem, state in zip(stems, found, strict=True) if state == "damaged"],
        )

    def _accept_folder(self) -> None:
        folder = self._job.folder
        path = folder / token_records.PREPARATION_NAME
        if path.exists():
            before = token_records.read_json(path)
            changed = [
                f"{key} was {before.get(key)!r}, is now {value!r}"
                for key, value in self._plan.items()
                if key not in _OF_NO_EFFECT and before.get(key) != value
            ]
            if changed:
                raise PreparationError(
                    f"output={str(folder)!r} was begun otherwise: {'; '.join(changed)}. Go on with "
                    "the same source, tokenizer and options, or name a new folder"
                )
            for stale in folder.glob(".*.part"):
                stale.unlink()
            return
        if any(path.name != _LOCK_NAME for path in folder.iterdir()):
            raise PreparationError(f"output={str(folder)!r} is not empty: name a new folder")
        write_json(path, self._plan)

    def _finish(self) -> dict:
        folder, plan = self._job.folder, self._plan
        shards, lengths = {}, []
        for number in range(self.num_shards):
            stem = token_records.shard_stem(number, self.num_shards)
            manifest = token_records.read_json(folder / f"{stem}.json")
            name = stem + token_records.SHARD_SUFFIX
            kept = ("documents", "tokens", "text_bytes", "bytes", "sha256", "lengths_sha256")
            shards[name] = {key: manifest[key] for key in kept}
            lengths.append(np.load(folder / token_records.lengths_name(name)))
        lengths = np.concatenate(lengths)
        if not len(lengths):
            raise PreparationError(f"source={plan['source']!r} holds no documents")
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        index = folder / token_records.INDEX_NAME
        with Unfinished(index) as part, open(part, "wb") as file:
            np.save(file, offsets)
        totals = {
            key: sum(shard[key] for shard in shards.values())
            for key in ("documents", "tokens", "text_bytes")
        }
        metadata = {
            **{key: plan[key] for key in ("format", "source", "kind", "text_field")},
            **{key: plan[key] for key in ("tokenizer", "fingerprint", "vocab_size")},
            "dtype": token_records.token_dtype(plan["vocab_size"]).str,
            **totals,
            "index_sha256": token_records.sha256(index),
            "shards": shards,
        }
        write_json(folder / token_records.METADATA_NAME, metadata)
        return metadata


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _grouped(found: Iterator[pieces.Piece], size: int) -> Iterator[list[pieces.Piece]]:
    shard: list[pieces.Piece] = []
    taken = 0
    for piece in found:
        if shard and taken + piece.size / 2 > size:
            yield shard
            shard, taken = [], 0
        shard.append(piece)
        taken += piece.size
    if shard:
        yield shard


def _locked(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise PreparationError(
            f"another process prepares output={str(folder)!r}: wait for it, or name another folder"
        ) from error
    return descriptor


# Processes. A pipe each, so that the death of one is seen at once, and theirs that the parent's is.


def _run_workers(
    job: Job, shards: list[list[pieces.Piece]], count: int, advance: Advance
) -> dict[int, str]:
    # Not forked: JAX and the tokenizers have threads.
    context = multiprocessing.get_context("spawn")
    processes = {}
    waiting = iter(enumerate(shards))
    states: dict[int, str] = {}
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(job, theirs), daemon=True)
            process.start()
            theirs.close()
            processes[ours] = process
            ours.send(next(waiting))
        busy = list(processes)
        while busy:
            for connection in multiprocessing.connection.wait(busy):
                try:
                    message, value = connection.recv()
                    if message == "done":
                        task = next(waiting, None)
                        connection.send(task)
                        if task is None:
                            busy.remove(connection)
                except (EOFError, ConnectionError):
                    process = processes[connection]
                    process.join()
                    raise PreparationError(
                        f"a worker died (exit code {process.exitcode}; -9 is often want of memory:"
                        " fewer workers need less). Run the same command again to go on"
                    ) from None
                if message == "failed":
                    raise value
                if message == "read":
                    advance(value)
                else:
                    states |= value
    finally:
        for connection, process in processes.items():
            process.terminate()
            process.join()
            connection.close()
    return states


def _work(job: Job, connection: multiprocessing.connection.Connection) -> None:
    """A worker: makes the shards that come through the pipe until there is None or no parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process to each core is enough
    try:
        tokenizer = load_tokenizer(job.tokenizer)
        while (task := connection.recv()) is not None:
            number, shard = task
            state = make_or_keep(
                job, number, shard, tokenizer, lambda size: connection.send(("read", size))
            )
            connection.send(("done", {number: state}))
    except (EOFError, ConnectionError):
        return  # the parent was killed
    except (ImportError, OSError, ValueError) as error:
        connection.send(("failed", error))
