"""Checkpoint folders in the layout of Hugging Face: config.json and safetensors, read and written.

Weights are one file, model.safetensors, or several with an index. Nothing is ever unpickled.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# What else belongs to a checkpoint: its tokenizer, its templates, how its makers sample from it.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


class Tensor(Protocol):
    """What conversion needs of a stored tensor; NumPy arrays have it."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Read a range of the first axis."""


@dataclass(frozen=True)
class TensorToStore:
    """A tensor that is made when it is written, and not before."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; ValueError for a file that holds anything else."""
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__} and not a JSON object")
    return content


@dataclass(frozen=True)
class _StoredTensor:
    """A tensor in an open file, of which nothing is read before it is indexed."""

    stored: Any  # what safetensors calls a slice: of the whole tensor, to be sliced

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.stored.get_shape())

    @property
    def dtype(self) -> np.dtype:
        return self.stored[:0].dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.stored[rows]


@contextlib.contextmanager
def stored_tensors(folder: Path) -> Iterator[dict[str, Tensor]]:
    """Open a checkpoint's files; nothing can be read any more once the context has ended."""
    safetensors = _import_safetensors()
    index_path = folder / INDEX_NAME
    index = None
    if index_path.exists() and (index := read_json(index_path).get("weight_map")) is None:
        raise ValueError(f"{index_path} has no weight_map")
    tensors, misplaced = {}, []
    with contextlib.ExitStack() as stack:
        for name in sorted({WEIGHTS_NAME} if index is None else set(index.values())):
            try:
                opened = safetensors.safe_open(folder / name, framework="numpy")
            except safetensors.SafetensorError as error:
                raise ValueError(f"{folder / name} is no safetensors file: {error}") from error
            file = stack.enter_context(opened)
            for key in file.keys():  # noqa: SIM118 - the file is no mapping
                tensors[key] = _StoredTensor(file.get_slice(key))
                if index is not None and index.get(key) != name:
                    misplaced.append(f"{key} is in {name}, where the index does not have it")
        misplaced += [f"{key} is not in {index[key]}" for key in index or () if key not in tensors]
        if misplaced:
            raise ValueError(f"{index_path} does not fit its files: " + "; ".join(misplaced))
        yield tensors


def check_is_free(folder: Path) -> None:
    """Raise FileExistsError unless `write_checkpoint` may write there."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} is there and not an empty folder; remove it or name another"
        )


def write_checkpoint(
    folder: Path,
    fields: Mapping[str, Any],
    tensors: Mapping[str, TensorToStore],
    *,
    companions: Path | None,
    shard_bytes: int,
) -> None:
    """Write a checkpoint folder beside its place and move it there once it is whole.

    One file's tensors are in memory at a time.

    Args:
      folder: where to; not there yet, or empty.
      fields: content of config.json.
      tensors: by name, in the order of the files.
      companions: a folder whose `COMPANIONS` are copied; None: none are.
      shard_bytes: where the tensors of a file would be more, another file begins.

    Raises:
      FileExistsError: the folder holds something.
      ImportError: the package safetensors is missing.
    """
    check_is_free(folder)
    _import_safetensors()
    from safetensors.numpy import save_file

    shards = _shards(tensors, shard_bytes)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.{os.getpid()}.partial"
    partial.mkdir()
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, partial, ignore_errors=True)
        weight_map = {}
        for number, names in enumerate(shards, start=1):
            file = WEIGHTS_NAME
            if len(shards) > 1:
                file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            arrays = {name: np.ascontiguousarray(tensors[name].make()) for name in names}
            save_file(arrays, partial / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(names, file)
        if len(shards) > 1:
            total = sum(tensor.nbytes for tensor in tensors.values())
            _write_json(
                partial / INDEX_NAME,
                {"metadata": {"total_size": total}, "weight_map": weight_map},
            )
        _write_json(partial / CONFIG_NAME, fields)
        for name in COMPANIONS if companions is not None else ():
            if (companions / name).exists():
                shutil.copyfile(companions / name, partial / name)
        partial.replace(folder)


def _shards(tensors: Mapping[str, TensorToStore], shard_bytes: int) -> list[list[str]]:
    shards, size = [[]], 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _import_safetensors() -> ModuleType:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(
            "checkpoints need the package 'safetensors': pip install 'swr_jax[convert]'"
        ) from error
    return safetensors
