"""One stream that can stop anywhere, be saved to a file, and go on in another process."""

import dataclasses
import hashlib
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from swr_jax.generate.sampling import DEFAULT, Sampling, SamplingArrays, check_vocabulary
from swr_jax.generate.streams import (
    Streams,
    check_chunk,
    decode,
    new_streams,
    read_prompts,
    room,
)
from swr_jax.generate.tokens import CHUNK_SIZE
from swr_jax.nn.language_model import LanguageModel

_FORMAT = 1
_HEADER = "header"
_FIELDS = {"config", "weights", "max_length", "length", "dtypes"}
_SAMPLED = 64  # numbers of each parameter that tell one set of weights from another


class SavedStreamError(ValueError):
    """A file of a stream that cannot be continued with this model."""


class TokenStream:
    """Tokens read and generated in turn, with the state of the model between them.

    What is generated after any number of calls, or after saving and loading, is what one call
    would have given: the state stands exactly after the last token that was read or yielded.

    Args:
        model: a language model.
        max_length: tokens that the stream may reach, if the model has full attention; None: 2048.
        chunk_size: tokens that are read at once; a power of two of at least 16.

    Attributes:
        length: tokens read and generated so far.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        max_length: int | None = None,
        chunk_size: int = CHUNK_SIZE,
    ):
        check_chunk(chunk_size)
        max_length = 2048 if max_length is None else max_length
        if max_length < 1:
            raise ValueError(f"max_length={max_length}; it must be at least 1")
        self._model = model
        self._graphdef, self._params = nnx.split(model)
        self._chunk_size = chunk_size
        self._bounded = "attention" in model.config.pattern
        self.max_length = max_length
        self.length = 0
        self._streams = new_streams(model, 1, max_length=room(max_length))

    def reserve(self, max_length: int) -> None:
        """Let the stream reach `max_length` tokens: the caches of full attention grow to it."""
        if max_length <= self.max_length:
            return
        larger = new_streams(self._model, 1, max_length=room(max_length))
        self._streams = jax.tree.map(_at_the_beginning, larger, self._streams)
        self.max_length = max_length

    def read(self, tokens: Sequence[int]) -> None:
        """Read tokens.

        Raises:
            ValueError: full attention has no room for them.
        """
        self._check_room(len(tokens))
        self._streams = read_prompts(
            self._graphdef, self._params, self._streams, [tokens], chunk_size=self._chunk_size
        )
        self.length += len(tokens)

    def generate(
        self,
        *,
        max_tokens: int,
        sampling: Sampling = DEFAULT,
        eos_id: int | None = None,
    ) -> Iterator[int]:
        """Yield up to `max_tokens` ids, each of which the stream has then read.

        Args:
            max_tokens: number of ids.
            sampling: how they are drawn.
            eos_id: the id after which nothing is drawn; it is yielded too.

        Raises:
            ValueError: nothing has been read yet, numbers out of range, or full attention has no
                room for `max_tokens`.
        """
        if self.length == 0:
            raise ValueError("the stream is empty: read the tokenizer's bos_id first")
        if max_tokens < 0:
            raise ValueError(f"max_tokens={max_tokens}; it must be at least 0")
        check_vocabulary(sampling, self._model.config.vocab_size)
        self._check_room(max_tokens)
        return self._tokens(max_tokens, SamplingArrays.of([sampling]), eos_id)

    def _tokens(
        self, max_tokens: int, options: SamplingArrays, eos_id: int | None
    ) -> Iterator[int]:
        for _ in range(max_tokens):
            tokens, self._streams = decode(
                self._graphdef, self._params, self._streams, options, steps=1
            )
            self.length += 1
            token = int(tokens[0, 0])
            yield token
            if token == eos_id:
                return

    def _check_room(self, added: int) -> None:
        if self._bounded and self.length + added > self.max_length:
            raise ValueError(
                f"{added} tokens after {self.length} exceed max_length={self.max_length}, for "
                "which full attention has room; `reserve` makes more"
            )

    def save(self, path: str | Path) -> None:
        """Write the stream to a file, whole or not at all; it holds arrays and JSON, no code."""
        arrays, dtypes = {}, {}
        for name, leaf in _leaves(self._streams):
            array = np.asarray(leaf)
            dtypes[name] = array.dtype.name
            # NumPy's format does not know bfloat16: bytes, and the name of the dtype beside them.
            arrays[name] = array.view(np.uint8) if array.dtype.kind == "V" else array
        header = {
            "format": _FORMAT,
            "config": _config(self._model),
            "weights": _fingerprint(self._params),
            "max_length": self.max_length,
            "length": self.length,
            "dtypes": dtypes,
        }
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                np.savez(file, **{_HEADER: np.array(json.dumps(header))}, **arrays)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(
        cls, path: str | Path, model: LanguageModel, *, chunk_size: int = CHUNK_SIZE
    ) -> "TokenStream":
        """Read a stream that `save` wrote, to go on with the same model.

        Raises:
            FileNotFoundError: no such file.
            SavedStreamError: the file is damaged, or of another model or other weights.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                header = json.loads(str(file[_HEADER]))
                arrays = {name: file[name] for name in file.files if name != _HEADER}
        except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
            raise SavedStreamError(f"{path} is no stream that was saved: {error}") from error
        if not isinstance(header, dict) or header.get("format") != _FORMAT:
            raise SavedStreamError(f"{path} is not of format {_FORMAT}, which this version reads")
        if missing := _FIELDS - set(header):
            raise SavedStreamError(f"the header of {path} lacks {', '.join(sorted(missing))}")
        ours, theirs = _config(model), header["config"]
        if changed := sorted(k for k in ours | theirs if ours.get(k) != theirs.get(k)):
            shown = ", ".join(f"{k}: {theirs.get(k)!r}, not {ours.get(k)!r}" for k in changed)
            raise SavedStreamError(f"{path} is of another model ({shown})")
        stream = cls(model, max_length=header["max_length"], chunk_size=chunk_size)
        if header["weights"] != _fingerprint(stream._params):
            raise SavedStreamError(
                f"{path} is of a model of the same sizes with other weights: its state means "
                "nothing to these; load it with the checkpoint that it was saved with"
            )
        stream.length = header["length"]
        stream._streams = _filled(path, stream._streams, arrays, header["dtypes"])
        return stream


def _at_the_beginning(larger: jax.Array, array: jax.Array) -> jax.Array:
    """The array in the first places of a larger one: full attention has token n in slot n."""
    if larger.shape == array.shape:
        return array
    return jax.lax.dynamic_update_slice(larger, array, (0,) * array.ndim)


def _filled(path: Any, streams: Streams, arrays: dict, dtypes: dict) -> Streams:
    leaves = []
    for name, leaf in _leaves(streams):
        found = arrays.get(name)
        if found is not None and dtypes.get(name) != found.dtype.name:
            found = found.view(jnp.dtype(dtypes[name]))
        if found is None or found.shape != leaf.shape or found.dtype != leaf.dtype:
            what = "nothing" if found is None else f"{found.dtype.name} {found.shape}"
            raise SavedStreamError(
                f"{path} has {what} as {name}, which must be {leaf.dtype.name} {leaf.shape}"
            )
        leaves.append(jnp.asarray(found))
    return jax.tree.unflatten(jax.tree.structure(streams), leaves)


def _leaves(streams: Streams) -> list[tuple[str, jax.Array]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(streams)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in flat]


def _config(model: LanguageModel) -> dict[str, Any]:
    """The model's configuration as JSON has it."""
    return json.loads(json.dumps(dataclasses.asdict(model.config), default=str))


def _fingerprint(params: nnx.State) -> str:
    """Digest of the beginnings of all parameters: enough to tell weights apart."""
    digest = hashlib.sha256()
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    for path, leaf in flat:
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        digest.update(np.asarray(leaf.ravel()[:_SAMPLED]).tobytes())
    return digest.hexdigest()
