"""Documents by index: text files, JSON lines, Parquet, token records, Python's own library.

A source is a grain `RandomAccessDataSource`: `len(source)` documents, `source[i]` the text of one
as bytes (not necessarily valid UTF-8), or its token ids for token records. Random access is what
makes a global shuffle, a split by document and an exact resume cheap.
"""

import glob
import os
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, SupportsIndex

import numpy as np
from absl import logging

from swr_jax.data.documents import JsonLines, ParquetRows, TextFiles
from swr_jax.data.token_records import PREPARATION_NAME, TokenRecords

KINDS = ("auto", "python", "text", "jsonl", "parquet", "arrayrecord")
_SUFFIXES = {
    "jsonl": (".jsonl", ".jsonl.gz", ".json.gz", ".ndjson"),
    "parquet": (".parquet",),
    "arrayrecord": (".arrayrecord", ".array_record"),
}

_BINARY_PROBE = 8192  # bytes; a NUL among them marks a file as binary
_NO_LIBRARY_TEXT = frozenset(
    ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings")
)


class DocumentSource(Protocol):
    """Documents by index."""

    def __len__(self) -> int:
        """Number of documents."""

    def __getitem__(self, index: SupportsIndex) -> bytes | np.ndarray:
        """Text of document `index` as bytes, or its token ids."""


def open_source(source: str, *, kind: str = "auto", text_field: str = "text") -> DocumentSource:
    """Opens documents by name, file, folder (searched to any depth) or glob pattern.

    Args:
      source: "python" (the text and source files of the running Python's standard library), or a
        path, or a pattern with `*`, `?` or `[`.
      kind: one of `KINDS`. "auto" goes by suffix: .jsonl .jsonl.gz .json.gz .ndjson are JSON
        lines, .parquet is Parquet, .arrayrecord are token records, everything else is text. A kind
        that is named picks its own suffixes from a folder, and reads a single file whatever its
        suffix. Folders leave out hidden files and, as text, empty and binary ones.
      text_field: field of JSON lines, or column of Parquet, that holds the text.

    Raises:
      ValueError: nothing to read, a file that is missing, empty, unreadable or malformed, several
        kinds in one folder, or an unknown kind. The message names the file.
      ImportError: Parquet without pyarrow.
    """
    kind, paths = list_source(source, kind=kind)
    if kind == "text":
        return TextFiles(paths)
    if kind == "jsonl":
        return JsonLines(paths, text_field=text_field)
    if kind == "parquet":
        return ParquetRows(paths, text_field=text_field)
    return TokenRecords(paths)


def list_source(source: str, *, kind: str = "auto") -> tuple[str, list[Path]]:
    """What `open_source` would read: "text", "jsonl", "parquet" or "arrayrecord", and the files.

    Raises:
      ValueError: see `open_source`, short of what opening the files would show.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}")
    if kind == "python" or (kind == "auto" and source == "python"):
        return "text", _standard_library_files()

    paths = _list_files(source)
    searched = paths != [Path(source)]
    if kind == "auto":
        # Token records have an index beside them, which is no text.
        kinds = {_kind_of(path) for path in paths}
        if "arrayrecord" in kinds:
            kinds = {"arrayrecord"}
        if len(kinds) > 1:
            raise ValueError(
                f"source={source!r} holds files of several kinds ({', '.join(sorted(kinds))}): "
                "name the one to read with kind="
            )
        (kind,) = kinds
    if searched and kind == "text":
        paths = _readable_text_files(source, paths)
    elif searched:
        paths = [path for path in paths if _kind_of(path) == kind]
        if not paths:
            raise ValueError(
                f"source={source!r} holds no file of kind {kind!r} ({' '.join(_SUFFIXES[kind])})"
            )
    return kind, paths


def _list_files(source: str) -> list[Path]:
    """Files of a path, folder or pattern, in an order that depends on names alone."""
    if os.path.isfile(source):
        return [Path(source)]
    if os.path.isdir(source):
        return _walk(Path(source), source)
    if not glob.has_magic(source):
        raise ValueError(
            f"source={source!r} does not exist: it must be 'python', a file, a folder or a pattern"
        )
    paths = []
    for name in sorted(glob.glob(source, recursive=True)):
        if os.path.isfile(name):
            paths.append(Path(name))
    if not paths:
        raise ValueError(f"source={source!r} matches no file")
    return paths


def _walk(root: Path, source: str, *, skip: frozenset[str] = frozenset()) -> list[Path]:
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skip and name[0] != "."]
        paths += [Path(folder, name) for name in names if not name.startswith(".")]
    if not paths:
        raise ValueError(f"source={source!r} is a folder with no files")
    return sorted(paths, key=lambda path: path.relative_to(root).parts)


def _kind_of(path: Path) -> str:
    if path.name == PREPARATION_NAME:  # of token records, of which there may be none yet
        return "arrayrecord"
    for kind, suffixes in _SUFFIXES.items():
        if path.name.endswith(suffixes):
            return kind
    return "text"


def _readable_text_files(source: str, paths: Iterable[Path]) -> list[Path]:
    """The files of a folder that hold text; one that cannot be opened is an error."""
    kept, left_out = [], 0
    for path in paths:
        try:
            with open(path, "rb") as file:
                head = file.read(_BINARY_PROBE)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        if head and b"\0" not in head:
            kept.append(path)
        else:
            left_out += 1
    if not kept:
        raise ValueError(f"source={source!r} holds no text: its files are all empty or binary")
    if left_out:
        logging.info("%s: %d empty or binary files left out", source, left_out)
    return kept


def _standard_library_files() -> list[Path]:
    """Text and source files of the running Python's standard library.

    Left out: packages that were installed on top, the library's own tests (not every installation
    has them), and the tables of `encodings`, which are numbers rather than text.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = [
        path
        for path in _walk(root, str(root), skip=_NO_LIBRARY_TEXT)
        if path.suffix in (".py", ".txt", ".rst")
        and not path.name.startswith("_sysconfigdata")  # paths of this machine's build
        and path.is_file()
        and path.stat().st_size > 0
    ]
    if not paths:
        raise ValueError(
            f"source='python': {root} holds no source files (is the standard library zipped?); "
            "name a file or folder of text instead"
        )
    return paths
