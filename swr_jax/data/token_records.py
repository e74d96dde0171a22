"""Documents that are tokenised already: ArrayRecord shards of token ids and what they were made by.

A folder of such records, which `swr_jax.data.prepare` makes, holds

    preparation.json                           what was asked for; written first
    tokens-00000-of-00004.arrayrecord  …       a record is a document: its ids, little-endian
    tokens-00000-of-00004.lengths.npy  …       uint32 [documents], tokens of each
    tokens-00000-of-00004.json         …       the shard's manifest: counts, SHA-256, origin
    index.npy                                  int64 [documents + 1], tokens before each document
    metadata.json                              totals, and what every shard must be; written last

Ids come with no special tokens. A folder without metadata was not finished.
"""

import concurrent.futures
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import SupportsIndex

import numpy as np

PREPARATION_NAME = "preparation.json"
METADATA_NAME = "metadata.json"
INDEX_NAME = "index.npy"
SHARD_SUFFIX = ".arrayrecord"
FORMAT = "swr_jax tokens 2"
_AGAIN = "the command that prepared the folder mends it when it is run again"


class TokenRecords:
    """Token ids of documents, read at random from the ArrayRecord shards of one folder.

    Args:
      paths: all shards of the folder, in order.

    Attributes:
      folder: where they lie.
      tokenizer: name of the tokenizer that made the records.
      fingerprint: its `Tokenizer.fingerprint`.
      vocab_size: its number of ids.
      content: hexadecimal SHA-256 over those of all shards: equal for equal tokens.
      offsets: int64 [documents + 1], tokens before each document, and of all; mapped from the file.

    Raises:
      ValueError: no metadata, shards of several folders, or a missing, foreign or cut-off shard.
    """

    def __init__(self, paths: Sequence[Path]):
        # Opened here and not on import: text needs no ArrayRecord.
        from array_record.python import array_record_data_source

        folders = {path.parent for path in paths}
        if len(folders) != 1:
            raise ValueError(
                f"token records must lie in one folder, got {sorted(map(str, folders))}"
            )
        self.folder = folders.pop()
        metadata = read_json(self.folder / METADATA_NAME)
        self.tokenizer: str = metadata["tokenizer"]
        self.fingerprint: str = metadata["fingerprint"]
        self.vocab_size: int = metadata["vocab_size"]
        self._dtype = np.dtype(metadata["dtype"])
        self._metadata = metadata
        shards = metadata["shards"]
        found = {path.name for path in paths if path.name.endswith(SHARD_SUFFIX)}
        if found != set(shards):
            missing, foreign = sorted(set(shards) - found), sorted(found - set(shards))
            raise ValueError(
                f"{self.folder} is not as {METADATA_NAME} says: shards missing {missing}, shards "
                f"of something else {foreign}; name the whole folder, and {_AGAIN}"
            )
        digest = hashlib.sha256()
        for name, shard in shards.items():
            size = (self.folder / name).stat().st_size
            if size != shard["bytes"]:
                raise ValueError(
                    f"{self.folder / name} has {size} bytes, {METADATA_NAME} says "
                    f"{shard['bytes']}: it is cut off or of something else; {_AGAIN}"
                )
            digest.update(shard["sha256"].encode())
        self.content = digest.hexdigest()
        self.offsets = _read_index(self.folder / INDEX_NAME, metadata)
        self._first = np.cumsum([0] + [shard["documents"] for shard in shards.values()])
        self._names = list(shards)
        names = [str(self.folder / name) for name in shards]
        try:
            self._records = array_record_data_source.ArrayRecordDataSource(names)
            documents = len(self._records)
        except RuntimeError as error:
            damaged = ", ".join(damaged_files(self.folder, metadata)) or "a shard"
            raise ValueError(
                f"{self.folder} is damaged: {damaged} cannot be opened: {error}; {_AGAIN}"
            ) from error
        if documents != len(self):
            raise ValueError(
                f"the shards in {self.folder} hold {documents} documents, {METADATA_NAME} says "
                f"{len(self)}; {_AGAIN}"
            )

    def __len__(self) -> int:
        """Number of documents."""
        return self._metadata["documents"]

    @property
    def tokens(self) -> int:
        """Number of tokens, without special ones."""
        return self._metadata["tokens"]

    def __getitem__(self, index: SupportsIndex) -> np.ndarray:
        """Token ids of document `index`, int32 [n].

        Raises:
          ValueError: the record is damaged, has another length than the index says, or holds an id
            that the vocabulary does not have.
        """
        try:
            ids = np.frombuffer(self._records[index], self._dtype)
        except (RuntimeError, ValueError) as error:
            raise self._damaged(index, str(error)) from error
        expected = int(self.offsets[index.__index__() + 1] - self.offsets[index])
        if len(ids) != expected:
            raise self._damaged(index, f"it has {len(ids)} tokens, {INDEX_NAME} says {expected}")
        if len(ids) and int(ids.max()) >= self.vocab_size:
            raise self._damaged(
                index, f"it holds id {ids.max()} of a vocabulary of {self.vocab_size}"
            )
        return ids.astype(np.int32)

    def verify(self, threads: int = 1) -> None:
        """Reads every file of the folder and compares its SHA-256.

        Raises:
          ValueError: some differ; they are named.
        """
        if damaged := damaged_files(self.folder, self._metadata, threads=threads):
            raise ValueError(
                f"{self.folder} is damaged: {', '.join(damaged)} have not the SHA-256 that was "
                f"written down when they were made; {_AGAIN}"
            )

    def _damaged(self, index: SupportsIndex, reason: str) -> ValueError:
        shard = int(np.searchsorted(self._first, index.__index__(), side="right")) - 1
        return ValueError(
            f"{self.folder / self._names[shard]}, record {index.__index__() - self._first[shard]} "
            f"is damaged: {reason}; {_AGAIN}"
        )


class JoinedRecords:
    """Several folders of token records, one after the other.

    Attributes:
      content, offsets: as of `TokenRecords`, over all of them.
    """

    def __init__(self, parts: Sequence[TokenRecords]):
        self._parts = parts
        self._first = np.cumsum([0] + [len(part) for part in parts])
        lengths = [np.diff(part.offsets) for part in parts]
        self.offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
        self.content = hashlib.sha256("".join(part.content for part in parts).encode()).hexdigest()

    def __len__(self) -> int:
        """Number of documents."""
        return int(self._first[-1])

    def __getitem__(self, index: SupportsIndex) -> np.ndarray:
        """Token ids of document `index`, int32 [n]."""
        part = int(np.searchsorted(self._first, index.__index__(), side="right")) - 1
        return self._parts[part][index.__index__() - int(self._first[part])]


def token_dtype(vocab_size: int) -> np.dtype:
    """Two bytes per token where they do, else four."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def shard_stem(number: int, count: int) -> str:
    """Name of a shard's files, without what tells them apart."""
    return f"tokens-{number:05d}-of-{count:05d}"


def lengths_name(shard: str) -> str:
    """Name of the file with the lengths of a shard's documents."""
    return shard.removesuffix(SHARD_SUFFIX) + ".lengths.npy"


def sha256(path: Path) -> str | None:
    """Hexadecimal SHA-256 of a file's content, None if there is no such file."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def damaged_files(folder: Path, metadata: dict, *, threads: int = 1) -> list[str]:
    """Names of the files in `folder` that are missing or have another SHA-256."""
    expected = {INDEX_NAME: metadata["index_sha256"]}
    for name, shard in metadata["shards"].items():
        expected[name] = shard["sha256"]
        expected[lengths_name(name)] = shard["lengths_sha256"]
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        found = pool.map(sha256, (folder / name for name in expected))
        pairs = zip(expected.items(), found, strict=True)
        return [name for (name, digest), other in pairs if digest != other]


def read_json(path: Path) -> dict:
    """Metadata, manifest or preparation of this format.

    Raises:
      ValueError: missing, not JSON, or of another format.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): token records are made by "
            "experiments/prepare_data.py, which writes it last; run it again to go on"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path} has format {found!r}, must be {FORMAT!r}: prepare it anew")
    return content


def _read_index(path: Path, metadata: dict) -> np.ndarray:
    try:
        offsets = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}; {_AGAIN}") from error
    expected = (metadata["documents"] + 1, metadata["tokens"])
    found = (len(offsets), int(offsets[-1]))
    if found != expected:
        raise ValueError(
            f"{path} ends at {found} (entries, tokens), {METADATA_NAME} says {expected}; {_AGAIN}"
        )
    return offsets
