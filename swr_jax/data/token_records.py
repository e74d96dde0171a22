"""Documents that are tokenised already: ArrayRecord shards of token ids and what they were made by.

A folder of such records holds `tokens-00000-of-00004.arrayrecord` … and `metadata.json`. A record
is one document: its token ids, little-endian, with no special tokens. The metadata are written
last, so a folder without them was not finished.
"""

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import SupportsIndex

import numpy as np

METADATA_NAME = "metadata.json"
_FORMAT = "swr_jax tokens 1"


class TokenRecords:
    """Token ids of documents, read at random from ArrayRecord shards.

    Args:
      paths: shards of one folder, which holds their `metadata.json` too.

    Attributes:
      tokenizer: name of the tokenizer that made the records.
      fingerprint: its `Tokenizer.fingerprint`.

    Raises:
      ValueError: no metadata, shards of several folders, or a damaged or missing shard.
    """

    def __init__(self, paths: Sequence[Path]):
        # Opened here and not on import: text needs no ArrayRecord.
        from array_record.python import array_record_data_source

        folders = {path.parent for path in paths}
        if len(folders) != 1:
            raise ValueError(
                f"token records must lie in one folder, got {sorted(map(str, folders))}"
            )
        metadata = _read_metadata(folders.pop() / METADATA_NAME)
        self.tokenizer: str = metadata["tokenizer"]
        self.fingerprint: str = metadata["fingerprint"]
        self._dtype = np.dtype(metadata["dtype"])
        for path in paths:
            expected = metadata["shards"].get(path.name)
            try:
                with array_record_data_source.ArrayRecordDataSource([str(path)]) as shard:
                    found = len(shard)
            except RuntimeError as error:
                raise ValueError(f"{path} is not an ArrayRecord file: {error}") from error
            if found != expected:
                raise ValueError(
                    f"{path} holds {found} documents, {METADATA_NAME} says {expected}: "
                    "prepare the folder anew"
                )
        self._records = array_record_data_source.ArrayRecordDataSource([str(p) for p in paths])

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> np.ndarray:
        """Token ids of document `index`, int32 [n]."""
        return np.frombuffer(self._records[index], self._dtype).astype(np.int32)


def write_token_records(
    folder: Path,
    documents: Iterable[np.ndarray],
    *,
    num_documents: int,
    num_shards: int,
    tokenizer: str,
    fingerprint: str,
    vocab_size: int,
) -> dict:
    """Writes token ids as ArrayRecord shards that keep the documents' order.

    Args:
      folder: made if missing; must be empty.
      documents: token ids of each document, integers [n] below `vocab_size`, no special tokens.
      num_documents: how many they are.
      num_shards: files to spread them over.
      tokenizer: name of the tokenizer, for messages.
      fingerprint: its `Tokenizer.fingerprint`, checked when the records are trained on.
      vocab_size: its number of ids; decides between two and four bytes per token.

    Returns:
      The metadata written: format, tokenizer, fingerprint, vocab_size, dtype, documents, tokens,
      shards (documents by file name).

    Raises:
      ValueError: `folder` is not empty, or `num_shards` is not in [1, num_documents].
    """
    from array_record.python import array_record_module

    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"output={str(folder)!r} is not empty: name a new folder")
    if not 1 <= num_shards <= num_documents:
        raise ValueError(
            f"num_shards={num_shards} must be at least 1 and at most the number of documents, "
            f"{num_documents}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    tokens = 0
    shards = {}
    for shard, group in itertools.groupby(
        enumerate(documents), key=lambda numbered: numbered[0] * num_shards // num_documents
    ):
        name = f"tokens-{shard:05d}-of-{num_shards:05d}.arrayrecord"
        shards[name] = 0
        # One record per group of the file, so that one document is one read.
        writer = array_record_module.ArrayRecordWriter(str(folder / name), "group_size:1")
        for _, ids in group:
            writer.write(ids.astype(dtype).tobytes())
            shards[name] += 1
            tokens += len(ids)
        writer.close()
    metadata = {
        "format": _FORMAT,
        "tokenizer": tokenizer,
        "fingerprint": fingerprint,
        "vocab_size": vocab_size,
        "dtype": dtype.str,
        "documents": sum(shards.values()),
        "tokens": tokens,
        "shards": shards,
    }
    (folder / METADATA_NAME).write_text(json.dumps(metadata, indent=2) + "\n")
    return metadata


def _read_metadata(path: Path) -> dict:
    try:
        metadata = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): token records are made by "
            "experiments/prepare_data.py, which writes it last"
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path} has format {metadata.get('format')!r}, must be {_FORMAT!r}")
    return metadata
