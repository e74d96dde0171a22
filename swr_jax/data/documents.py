"""Documents by index in files of text, JSON lines and Parquet."""

import collections
import gzip
import itertools
import json
import os
import shutil
import tempfile
import threading
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, SupportsIndex

import numpy as np

from swr_jax.data.tokenizers import text_to_bytes

if TYPE_CHECKING:
    from pyarrow import parquet

# A source of a few text files would leave nothing to hold out, so below this number of files they
# are cut into about so many pieces. Files beyond the largest piece are cut in any case, so that a
# read stays small.
_FEW_FILES = 128
_SMALLEST_PIECE, _LARGEST_PIECE_OF_FEW, _LARGEST_PIECE = 1 << 12, 1 << 20, 1 << 24
_SCAN = 1 << 26  # bytes searched for line ends at a time
_PARQUET_CACHE = 1 << 28  # bytes of decoded row groups kept


class TextFiles:
    """Text files, one document each.

    Fewer than 128 files are cut at line ends into about 128 pieces (of 4 KiB to 1 MiB), and any
    file into pieces of at most 16 MiB; characters stay whole.

    Args:
      paths: the files.

    Attributes:
      spans: file, first byte and the byte after the last, of every document.

    Raises:
      ValueError: a file is missing, unreadable or empty.
    """

    def __init__(self, paths: Sequence[Path]):
        sizes = [file_size(path) for path in paths]
        limit = _LARGEST_PIECE
        if len(paths) < _FEW_FILES:
            limit = min(max(sum(sizes) // _FEW_FILES, _SMALLEST_PIECE), _LARGEST_PIECE_OF_FEW)
        self.spans: list[tuple[Path, int, int]] = []
        for path, size in zip(paths, sizes, strict=True):
            cuts = [0, size] if size <= limit else _line_cuts(path, limit)
            self.spans += [(path, *span) for span in itertools.pairwise(cuts)]

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.spans)

    def __getitem__(self, index: SupportsIndex) -> bytes:
        """Bytes of document `index`."""
        path, start, stop = self.spans[index]
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(stop - start)


class JsonLines:
    """Files of one JSON object per line, plain or gzipped; lines of white space are passed over.

    Plain files are mapped, not read. Gzip has no random access, so such files are unpacked once
    into nameless temporary files (in TMPDIR), which vanish with the process.

    Args:
      paths: the files; gzip is recognised by content.
      text_field: key of the text in each object.

    Raises:
      ValueError: a file is missing, unreadable, empty or not gzip through its end; or a line, the
        first of each file now and the others when they are read, is not a JSON object with a string
        at `text_field` (file:line is named).
    """

    def __init__(self, paths: Sequence[Path], *, text_field: str = "text"):
        self._paths = list(paths)
        self._text_field = text_field
        self._files = [_map_file(path) for path in self._paths]
        self._lines = [_line_spans(data) for data in self._files]
        for path, (starts, _) in zip(self._paths, self._lines, strict=True):
            if not len(starts):
                raise ValueError(f"{path} is empty: it must hold one JSON object per line")
        self._first = np.cumsum([0] + [len(starts) for starts, _ in self._lines])
        for index in self._first[:-1]:  # another schema is known before anything is trained
            self[index]

    def __len__(self) -> int:
        """Number of documents."""
        return int(self._first[-1])

    def __getitem__(self, index: SupportsIndex) -> bytes:
        """Text of document `index` as UTF-8; undecodable bytes become U+FFFD."""
        file, line = _locate(self._first, index)
        starts, stops = self._lines[file]
        raw = self._files[file][starts[line] : stops[line]].tobytes()
        return text_of_json(raw, self._text_field, place=lambda: self._place(file, line))

    def _place(self, file: int, line: int) -> str:
        # Line numbers are counted only when there is something to report.
        before = self._files[file][: self._lines[file][0][line]]
        return f"{self._paths[file]}:{int(np.count_nonzero(before == ord('\n'))) + 1}"


class ParquetRows:
    """Rows of Parquet files, one document each; FineWeb-Edu's schema by default.

    Row groups are read one at a time, the text column alone, and the last ones read (256 MiB) are
    kept. A corpus much larger than that is shuffled faster as token records
    (`experiments/prepare_data.py`), for which a document costs one small read.

    Args:
      paths: the files.
      text_field: column of the text.

    Raises:
      ValueError: a file is missing, unreadable, not Parquet, or has no string column `text_field`;
        when a document is read, its text is null.
      ImportError: pyarrow is missing.
    """

    def __init__(self, paths: Sequence[Path], *, text_field: str = "text"):
        self._arrow, self._parquet = _import_parquet()
        self._text_field = text_field
        self._groups = []  # (path, metadata of the file, row group)
        rows = [0]
        for path in paths:
            with open_parquet(path, text_field) as file:
                for group in range(file.metadata.num_row_groups):
                    self._groups.append((path, file.metadata, group))
                    rows.append(file.metadata.row_group(group).num_rows)
        self._first = np.cumsum(rows)
        if not len(self):
            raise ValueError(f"{paths[0]} is empty: it holds no rows")
        self._cache: collections.OrderedDict = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Number of documents."""
        return int(self._first[-1])

    def __getitem__(self, index: SupportsIndex) -> bytes:
        """Text of document `index` as UTF-8."""
        group, row = _locate(self._first, index)
        text = self._column(group)[row].as_py()
        if text is None:
            path, _, number = self._groups[group]
            raise null_text(path, row, number, self._text_field)
        return text

    def _column(self, group: int):
        with self._lock:
            if group in self._cache:
                self._cache.move_to_end(group)
                return self._cache[group]
            path, metadata, number = self._groups[group]
            with self._parquet.ParquetFile(path, metadata=metadata) as file:
                try:
                    table = file.read_row_group(number, columns=[self._text_field])
                except (OSError, self._arrow.ArrowInvalid) as error:
                    raise ValueError(f"{path}: row group {number} is damaged: {error}") from error
            # Binary, so that text which is not valid UTF-8 can be read at all.
            column = table.column(0).cast(self._arrow.large_binary()).combine_chunks()
            self._cache[group] = column
            while (
                len(self._cache) > 1
                and sum(kept.nbytes for kept in self._cache.values()) > _PARQUET_CACHE
            ):
                self._cache.popitem(last=False)
            return column


def text_of_json(line: bytes, text_field: str, *, place: Callable[[], str]) -> bytes:
    """Text of one JSON object as UTF-8; undecodable bytes become U+FFFD.

    Raises:
      ValueError: it is not an object with a string at `text_field`; `place()` says where it is.
    """
    try:
        record = json.loads(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place()} is not valid JSON: {error}") from error
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        found = f"has {sorted(record)}" if isinstance(record, dict) else "is no object"
        raise ValueError(
            f"{place()} {found}: it must be an object with a string at {text_field!r}; name "
            "another field with text_field="
        )
    return text_to_bytes(text)


def open_parquet(path: Path, text_field: str) -> "parquet.ParquetFile":
    """Opens a Parquet file; ValueError if it is none or has no string column `text_field`."""
    arrow, parquet = _import_parquet()
    file_size(path)
    try:
        file = parquet.ParquetFile(path)
    except arrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from error
    schema, types = file.schema_arrow, arrow.types
    if text_field not in schema.names:
        raise ValueError(
            f"{path} has the columns {schema.names}: text_field={text_field!r} must be one of them"
        )
    kind = schema.field(text_field).type
    is_text = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    if not any(test(kind) for test in is_text):
        raise ValueError(
            f"{path}: column {text_field!r} is {kind} and must be string or binary; "
            "name another with text_field="
        )
    return file


def null_text(path: Path, row: int, group: int, text_field: str) -> ValueError:
    """The error of a row of Parquet that holds no text."""
    return ValueError(
        f"{path}, row {row} of row group {group}: {text_field!r} is null and must be text; drop "
        "such rows"
    )


def _import_parquet() -> tuple[ModuleType, ModuleType]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(
            "Parquet files need the package 'pyarrow': pip install 'swr_jax[text]'"
        ) from error
    return pyarrow, parquet


def file_size(path: Path) -> int:
    """Bytes of a file; ValueError if it cannot be read or holds none."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if not size:
        raise ValueError(f"{path} is empty")
    return size


def _line_cuts(path: Path, limit: int) -> list[int]:
    """Offsets that cut a file into pieces of at most `limit` bytes, after a line end if any."""
    data = np.memmap(path, np.uint8, mode="r")
    cuts = [0]
    while len(data) - cuts[-1] > limit:
        start, stop = cuts[-1], cuts[-1] + limit
        line_end = data[start:stop].tobytes().rfind(b"\n")
        if line_end >= 0:
            stop = start + line_end + 1
        else:
            # A UTF-8 character continues for at most three bytes; more is no UTF-8 at all.
            stop -= next((back for back in range(4) if data[stop - back] & 0xC0 != 0x80), 0)
        cuts.append(stop)
    return [*cuts, len(data)]


def _map_file(path: Path) -> np.ndarray:
    """Content of a file as uint8, mapped; a gzipped one is unpacked into a temporary file."""
    file_size(path)
    with open(path, "rb") as file:
        if file.read(2) != b"\x1f\x8b":
            return np.memmap(path, np.uint8, mode="r")
    with tempfile.TemporaryFile() as unpacked:
        try:
            with gzip.open(path, "rb") as packed:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is not a whole gzip file: {error}") from error
        if not unpacked.tell():
            return np.empty(0, np.uint8)
        unpacked.flush()
        return np.memmap(unpacked, np.uint8, mode="r")


def _line_spans(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start and end of every line that is not blank."""
    ends = [
        start + np.flatnonzero(data[start : start + _SCAN] == ord("\n"))
        for start in range(0, len(data), _SCAN)
    ]
    stops = np.concatenate([*ends, [len(data)]])
    starts = np.concatenate([[0], stops[:-1] + 1])
    if data[:3].tobytes() == b"\xef\xbb\xbf":  # byte order mark
        starts[0] = 3
    blank = stops <= starts
    for line in np.flatnonzero(~blank & (stops - starts < 16)):
        blank[line] = not data[starts[line] : stops[line]].tobytes().strip()
    return starts[~blank], stops[~blank]


def _locate(first: np.ndarray, index: SupportsIndex) -> tuple[int, int]:
    """Part that holds element `index`, and its place there; `first` are the parts' beginnings."""
    index = index.__index__()
    if not 0 <= index < first[-1]:
        raise IndexError(f"index {index} must be in [0, {first[-1]})")
    part = int(np.searchsorted(first, index, side="right")) - 1
    return part, index - int(first[part])
