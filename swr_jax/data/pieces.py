"""Corpora of any size cut into pieces that can be read one after the other, in any process.

`open_source` gives documents by index and must know where each begins. To tokenise a corpus once
that is neither needed nor, for terabytes, to be had: here a file is cut by bytes or row groups, and
a piece is read from its beginning to its end. All pieces in order give the documents that
`open_source` gives, in its order.
"""

import dataclasses
import gzip
import itertools
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from swr_jax.data.documents import (
    TextFiles,
    file_size,
    null_text,
    open_parquet,
    text_of_json,
)

_GZIP = b"\x1f\x8b"
_ROWS = 256  # of Parquet decoded at a time
_SCAN = 1 << 24  # bytes searched for line ends at a time


@dataclasses.dataclass(frozen=True)
class Piece:
    """Part of a file: bytes [start, stop), or row groups [start, stop) of Parquet.

    kind is "text" (the piece is one document), "jsonl" (lines that begin in it), "gzip" (a whole
    file of lines) or "parquet". size is how many bytes of the file it takes up.
    """

    path: Path
    kind: str
    start: int
    stop: int
    size: int


def cut(kind: str, paths: list[Path], *, text_field: str, size: int) -> Iterator[Piece]:
    """Pieces of files, each about `size` bytes or less where the format allows it.

    Args:
      kind, paths: what `list_source` gave.
      text_field: column of Parquet that holds the text.
      size: bytes of a file.

    Raises:
      ValueError: a file is missing, unreadable, empty, or not of its kind.
      ImportError: pyarrow is missing.
    """
    if kind == "text":
        for path, start, stop in TextFiles(paths).spans:
            yield Piece(path, kind, start, stop, stop - start)
        return
    for path in paths:
        whole = file_size(path)
        if kind == "parquet":
            with open_parquet(path, text_field) as file:
                if not file.metadata.num_rows:
                    raise ValueError(f"{path} is empty: it holds no rows")
                for group in range(file.metadata.num_row_groups):
                    row_group = file.metadata.row_group(group)
                    columns = (row_group.column(c) for c in range(row_group.num_columns))
                    taken = sum(column.total_compressed_size for column in columns)
                    yield Piece(path, kind, group, group + 1, taken)
        elif _is_gzip(path):
            yield Piece(path, "gzip", 0, whole, whole)
        else:
            count = -(-whole // size)
            cuts = [whole * number // count for number in range(count + 1)]
            for start, stop in itertools.pairwise(cuts):
                yield Piece(path, kind, start, stop, stop - start)


def read(piece: Piece, *, text_field: str) -> Iterator[tuple[bytes, int]]:
    """Documents of a piece as UTF-8, each with the bytes of the piece read since the last one.

    Raises:
      ValueError: the file is damaged or a document is not what it should be; the place is named.
    """
    if piece.kind == "text":
        with open(piece.path, "rb") as file:
            file.seek(piece.start)
            yield file.read(piece.stop - piece.start), piece.size
    elif piece.kind == "parquet":
        yield from _read_parquet(piece, text_field)
    elif piece.kind == "gzip":
        with gzip.open(piece.path, "rb") as file:
            lines = _lines(file, 0, None)
            documents = _read_lines(piece.path, lines, text_field)
            try:
                yield from ((text, 0) for text, _ in documents)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{piece.path} is not a whole gzip file: {error}") from error
    else:
        with open(piece.path, "rb") as file:
            lines = _lines(file, piece.start, piece.stop)
            yield from _read_lines(piece.path, lines, text_field)


def _is_gzip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == _GZIP


def _lines(file: BinaryIO, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    """The lines that begin in [start, stop), each with the place where it begins."""
    at = start
    if start:
        file.seek(start - 1)
        at += len(file.readline()) - 1  # the rest of a line that began before
    while stop is None or at < stop:
        line = file.readline()
        if not line:
            return
        yield at, line
        at += len(line)


def _read_lines(
    path: Path, lines: Iterator[tuple[int, bytes]], text_field: str
) -> Iterator[tuple[bytes, int]]:
    passed = 0
    for at, line in lines:
        passed += len(line)
        if at == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")  # byte order mark
        line = line.removesuffix(b"\n")
        if line.strip():
            yield text_of_json(line, text_field, place=lambda at=at: _place(path, at)), passed
            passed = 0


def _place(path: Path, at: int) -> str:
    """file:line of a line's beginning; lines are counted only when there is something to report."""
    number = 1
    with gzip.open(path, "rb") if _is_gzip(path) else open(path, "rb") as file:
        while at:
            block = file.read(min(at, _SCAN))
            number += block.count(b"\n")
            at -= len(block)
    return f"{path}:{number}"


def _read_parquet(piece: Piece, text_field: str) -> Iterator[tuple[bytes, int]]:
    import pyarrow

    with open_parquet(piece.path, text_field) as file:
        for group in range(piece.start, piece.stop):
            rows = file.metadata.row_group(group).num_rows
            row = 0
            try:
                for batch in file.iter_batches(_ROWS, row_groups=[group], columns=[text_field]):
                    # Binary, so that text which is not valid UTF-8 can be read at all.
                    for text in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                        if text is None:
                            raise null_text(piece.path, row, group, text_field)
                        row += 1
                        yield text, piece.size * row // rows - piece.size * (row - 1) // rows
            except (OSError, pyarrow.ArrowInvalid) as error:
                raise ValueError(f"{piece.path}: row group {group} is damaged: {error}") from error


def relative(paths: list[Path]) -> dict[Path, str]:
    """Names of files that stay what they are where the whole corpus is moved."""
    root = os.path.commonpath([path.parent for path in paths])
    return {path: Path(os.path.relpath(path, root)).as_posix() for path in paths}
