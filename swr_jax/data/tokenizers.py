"""Text to token ids and back: bytes, Hugging Face `tokenizer.json`, SentencePiece `.model`.

Every tokenizer here knows the text bytes that each of its ids stands for. That one table gives
decoding, streaming that never prints half a character, and exact bits per byte.
"""

import codecs
import hashlib
import importlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

# Names that published tokenizers give to the token before and after a document.
_BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]", "[CLS]")
_EOS_NAMES = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[EOS]", "[SEP]")
_PAD_NAMES = ("<pad>", "<|pad|>", "<|finetune_right_pad_id|>", "[PAD]")
_ROLES = {"bos": _BOS_NAMES, "eos": _EOS_NAMES, "pad": _PAD_NAMES}
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer(Protocol):
    """What the data pipeline, the trainer and the generator need of a tokenizer.

    Attributes:
      vocab_size: number of ids, special tokens included; ids are 0 … vocab_size − 1.
      bos_id, eos_id, pad_id: the ids before a document, after it, and where there is none.
      token_bytes: int32 [vocab_size], bytes of UTF-8 text that each id stands for; 0 for special
        tokens. Over an encoded document they sum to its length wherever the round trip is exact.
      fingerprint: equal for two tokenizers only if they give the same ids.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    token_bytes: np.ndarray
    fingerprint: str

    def encode(self, text: str | bytes) -> np.ndarray:
        """Token ids of `text`, int32 [n], with no special tokens added."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens give nothing, undecodable bytes give U+FFFD."""

    def stream_decoder(self) -> "StreamDecoder":
        """A decoder that is fed one id at a time."""


class StreamDecoder:
    """Turns ids into text as they come, holding back the bytes of unfinished characters.

    What `push` and the final `flush` return, joined, is what `decode` gives for the same ids.
    To continue a prompt, push the prompt's ids first and drop what they return.
    """

    def __init__(self, pieces: Sequence[bytes], *, strip_first_space: bool = False):
        self._pieces = pieces
        self._at_start = strip_first_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Whole characters that became certain with `token_id`; U+FFFD for an id out of range."""
        token_id = int(token_id)
        known = 0 <= token_id < len(self._pieces)
        piece = self._pieces[token_id] if known else _REPLACEMENT.encode()
        if self._at_start and piece:
            piece = piece.removeprefix(b" ")
            self._at_start = False
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """What is still held back, as U+FFFD; call once, at the end."""
        return self._utf8.decode(b"", final=True)


class _PieceTokenizer:
    """Decoding and byte counts from the bytes of each id; `encode` is left to the subclasses."""

    def __init__(
        self,
        pieces: list[bytes],
        *,
        special: Sequence[int | None],
        fingerprint: str,
        strip_first_space: bool = False,
    ):
        bos_id, eos_id, pad_id = special
        if bos_id is None and eos_id is None:
            # A vocabulary with no special token gets one after its own ids.
            bos_id = len(pieces)
            pieces = [*pieces, b""]
        self.bos_id = eos_id if bos_id is None else bos_id
        self.eos_id = bos_id if eos_id is None else eos_id
        # Padding has zero weight and segment 0, so an id that is in use elsewhere does no harm.
        self.pad_id = self.eos_id if pad_id is None else pad_id
        self.vocab_size = len(pieces)
        self.token_bytes = np.array([len(piece) for piece in pieces], np.int32)
        self.fingerprint = fingerprint
        self._pieces = pieces
        self._strip_first_space = strip_first_space

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens give nothing, undecodable bytes give U+FFFD."""
        stream = self.stream_decoder()
        return "".join([stream.push(token_id) for token_id in ids]) + stream.flush()

    def stream_decoder(self) -> StreamDecoder:
        """A decoder that is fed one id at a time."""
        return StreamDecoder(self._pieces, strip_first_space=self._strip_first_space)


class ByteTokenizer(_PieceTokenizer):
    """One id per byte: 0 … 255, then beginning of document 256, end 257, padding 258."""

    def __init__(self):
        pieces = [bytes([byte]) for byte in range(256)] + [b"", b"", b""]
        super().__init__(pieces, special=(256, 257, 258), fingerprint="bytes")

    def encode(self, text: str | bytes) -> np.ndarray:
        """Byte values of `text`, int32 [n]; `bytes` need not be valid UTF-8."""
        return np.frombuffer(text_to_bytes(text), np.uint8).astype(np.int32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of `ids`, special tokens left out; inverse of `encode`."""
        ids = np.asarray(ids)
        return ids[ids < 256].astype(np.uint8).tobytes()


class HuggingFaceTokenizer(_PieceTokenizer):
    """A Hugging Face `tokenizer.json`, read by the `tokenizers` package.

    Args:
      path: the file.
      special: tokens or ids to choose "bos", "eos" and "pad" from, the first that the vocabulary
        has; None: none.

    What `special` leaves open is found by the usual names, such as `<s>` or `<|endoftext|>`, among
    the special tokens, or among all of them where no special one has such a name. One of the two
    serves as both if it is alone, and a vocabulary that has neither gets one more id at its end.

    `token_bytes` is exact for byte-level vocabularies. Others stand for the text that they decode
    to in the middle of a document; what a normalizer changed cannot be known from ids.
    The names of special tokens inside a text are text.

    Raises:
      ValueError: the file is not a `tokenizer.json`.
      ImportError: the package `tokenizers` is missing.
    """

    def __init__(
        self, path: str | Path, *, special: Mapping[str, Sequence[str | int]] | None = None
    ):
        package = _import_package("tokenizers", needed_for="tokenizer.json files")
        content = _read_file(path)
        try:
            tokenizer = package.Tokenizer.from_str(content.decode())
        except Exception as error:  # the package raises nothing more precise
            raise ValueError(
                f"tokenizer={str(path)!r} is not a Hugging Face tokenizer.json: {error}"
            ) from error
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        pieces, strip_first_space = _hugging_face_pieces(tokenizer, vocabulary)
        usual = _special_ids(tokenizer, vocabulary, {})
        chosen = usual if special is None else _special_ids(tokenizer, vocabulary, special)
        # Ids of text are the same whatever stands between documents.
        between = "" if chosen == usual else str(chosen)
        super().__init__(
            pieces,
            special=chosen,
            fingerprint=_fingerprint(content + between.encode()),
            strip_first_space=strip_first_space,
        )

    def encode(self, text: str | bytes) -> np.ndarray:
        """Token ids of `text`, int32 [n]; undecodable bytes are read as U+FFFD."""
        batch = self._tokenizer.encode_batch_fast([_as_text(text)], add_special_tokens=False)
        return np.array(batch[0].ids, np.int32)


class SentencePieceTokenizer(_PieceTokenizer):
    """A SentencePiece `.model` file, read by the `sentencepiece` package.

    Args:
      path: the file. SentencePiece normalizes text as its model says (by default it joins spaces),
        so a round trip is exact only for models trained without normalization.

    Raises:
      ValueError: the file is not a SentencePiece model.
      ImportError: the package `sentencepiece` is missing.
    """

    def __init__(self, path: str | Path):
        package = _import_package("sentencepiece", needed_for="SentencePiece models")
        content = _read_file(path)
        model = package.SentencePieceProcessor()
        try:
            model.LoadFromSerializedProto(content)
        except RuntimeError as error:
            raise ValueError(
                f"tokenizer={str(path)!r} is not a SentencePiece model: {error}"
            ) from error
        self._model = model

        def piece_bytes(token_id: int) -> bytes:
            if model.IsControl(token_id):
                return b""
            if model.IsUnknown(token_id):
                return _REPLACEMENT.encode()
            return _metaspace_bytes(model.IdToPiece(token_id))

        ids = range(model.GetPieceSize())
        pieces = [piece_bytes(token_id) for token_id in ids]
        spaced = [i for i in ids if pieces[i].startswith(b" ") and not pieces[i].startswith(b"  ")]
        special = (model.bos_id(), model.eos_id(), model.pad_id())
        super().__init__(
            pieces,
            special=[None if token_id < 0 else token_id for token_id in special],
            fingerprint=_fingerprint(content),
            strip_first_space=any(not model.Decode([i]).startswith(" ") for i in spaced),
        )
        # How much text an unknown token hides is not known: count none, never too much.
        self.token_bytes[model.unk_id()] = 0

    def encode(self, text: str | bytes) -> np.ndarray:
        """Token ids of `text`, int32 [n]; undecodable bytes are read as U+FFFD."""
        return np.array(self._model.EncodeAsIds(_as_text(text)), np.int32)


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """Opens a tokenizer by name or file.

    Args:
      name_or_path: "bytes", a Hugging Face `*.json` or a SentencePiece `*.model`, or the folder of
        a checkpoint that has a tokenizer.json or a tokenizer.model. In a folder, the tokens before
        and after a document are those that tokenizer_config.json names, else config.json by id;
        of several ends the first. Qwen has no beginning of its own: its documents begin with the
        <|endoftext|> that ends the one before, as in its pretraining.

    Raises:
      ValueError: another name, or a file that is missing or of another format.
      ImportError: the package that reads the file is missing.
    """
    if str(name_or_path) == "bytes":
        return ByteTokenizer()
    if Path(name_or_path).is_dir():
        folder = Path(name_or_path)
        if (folder / "tokenizer.json").exists():
            return HuggingFaceTokenizer(folder / "tokenizer.json", special=_named_in(folder))
        if (folder / "tokenizer.model").exists():
            return SentencePieceTokenizer(folder / "tokenizer.model")
        raise ValueError(
            f"tokenizer={str(name_or_path)!r} is a folder without tokenizer.json and without "
            "tokenizer.model; it must have one of them"
        )
    suffix = Path(name_or_path).suffix
    if suffix == ".json":
        return HuggingFaceTokenizer(name_or_path)
    if suffix == ".model":
        return SentencePieceTokenizer(name_or_path)
    raise ValueError(
        f"tokenizer={str(name_or_path)!r} must be 'bytes', a Hugging Face tokenizer.json "
        "(*.json), a SentencePiece model (*.model) or the folder of one of them"
    )


def text_to_bytes(text: str | bytes) -> bytes:
    """UTF-8 of `text`; lone surrogates, which JSON may hold and UTF-8 may not, become U+FFFD."""
    if isinstance(text, bytes):
        return text
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def _as_text(text: str | bytes) -> str:
    return text_to_bytes(text).decode("utf-8", "replace")


def _import_package(name: str, *, needed_for: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{needed_for} need the package {name!r}: pip install 'swr_jax[text]'"
        ) from error


def _read_file(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"tokenizer={str(path)!r} cannot be read: {error.strerror}") from error


def _fingerprint(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def _named_in(folder: Path) -> dict[str, list[str | int]]:
    """What a checkpoint's own files call its special tokens, the most certain first."""
    found: dict[str, list[str | int]] = {role: [] for role in _ROLES}
    for name, key in (
        ("tokenizer_config.json", "token"),
        ("special_tokens_map.json", "token"),
        ("config.json", "token_id"),
        ("generation_config.json", "token_id"),
    ):
        if not (folder / name).exists():
            continue
        try:
            fields = json.loads(_read_file(folder / name))
        except ValueError as error:
            raise ValueError(f"{folder / name} is not JSON: {error}") from error
        for role, candidates in found.items():
            value = fields.get(f"{role}_{key}")
            value = value.get("content") if isinstance(value, dict) else value
            candidates += value if isinstance(value, list) else [value]
    return found


def _special_ids(
    tokenizer: Any, vocabulary: dict[str, int], named: Mapping[str, Sequence[str | int | None]]
) -> list[int | None]:
    """Ids of "bos", "eos" and "pad", None for one that there is not."""
    special = {
        token.content: token_id
        for token_id, token in tokenizer.get_added_tokens_decoder().items()
        if token.special
    }
    # Ordinary tokens may be called the same: Gemma has an <s> of HTML.
    if special.keys().isdisjoint((*_BOS_NAMES, *_EOS_NAMES)):
        special = vocabulary
    usual = {
        role: next((special[name] for name in names if name in special), None)
        for role, names in _ROLES.items()
    }
    if usual["bos"] is None:
        usual["bos"] = usual["eos"]
    ids = set(vocabulary.values())

    def first(role: str) -> int | None:
        candidates = (vocabulary.get(x, x) for x in named.get(role, ()) if x is not None)
        return next((x for x in candidates if x in ids), usual[role])

    return [first(role) for role in _ROLES]


def _metaspace_bytes(piece: str) -> bytes:
    """Bytes of a SentencePiece-style piece: `▁` is a space, `<0x0A>` one byte."""
    byte = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("\u2581", " ").encode()


def _byte_level_alphabet() -> dict[str, int]:
    """Character to byte of GPT-2's byte-level vocabularies.

    Bytes that are printable in Latin-1 stand for themselves; the others take, in order, the
    characters from U+0100.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + offset): byte for offset, byte in enumerate(others)
    }


def _hugging_face_pieces(tokenizer: Any, vocabulary: dict[str, int]) -> tuple[list[bytes], bool]:
    """Bytes of every id, and whether decoding drops a document's first space."""
    added = tokenizer.get_added_tokens_decoder()
    pieces = [b""] * (max(vocabulary.values()) + 1)
    for token_id, token in added.items():
        pieces[token_id] = b"" if token.special else token.content.encode()
    ordinary = {name: i for name, i in vocabulary.items() if i not in added}

    settings = json.loads(tokenizer.to_str())
    if '"ByteLevel"' in json.dumps([settings["decoder"], settings["pre_tokenizer"]]):
        alphabet = _byte_level_alphabet()
        for name, token_id in ordinary.items():
            pieces[token_id] = bytes([alphabet[character] for character in name])
        return pieces, False

    # Any other decoder is asked what each id adds after a token that stands for plain text.
    texts = {i: tokenizer.decode([i]) for i in ordinary.values()}
    anchor = next(i for i, text in texts.items() if text.strip() and _REPLACEMENT not in text)
    after_anchor = tokenizer.decode_batch([[anchor, i] for i in ordinary.values()])
    strip_first_space = False
    for (name, token_id), text in zip(ordinary.items(), after_anchor, strict=True):
        byte = _BYTE_PIECE.fullmatch(name)
        added_text = text[len(texts[anchor]) :]
        pieces[token_id] = bytes([int(byte[1], 16)]) if byte else added_text.encode()
        if added_text.startswith(" ") and not added_text.startswith("  "):
            strip_first_space |= not texts[token_id].startswith(" ")
    return pieces, strip_first_space
