"""From one corpus or several to batches: split by document, shuffle, mix, tokenise, pack."""

import dataclasses
import itertools
import math
from typing import Literal, SupportsIndex

import grain
import numpy as np

from swr_jax.data.packing import PackingOptions, PackIterDataset
from swr_jax.data.sources import DocumentSource, open_source
from swr_jax.data.token_records import JoinedRecords, TokenRecords
from swr_jax.data.tokenizers import Tokenizer, load_tokenizer

Split = Literal["train", "validation"]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to train on, and in which shape.

    Attributes:
      source, kind, text_field: see `open_source`.
      more_sources: folders to mix with `source`; all of them, it included, must hold token records.
      weights: share of the tokens that come from `source` and from each of `more_sources`, in this
        order; they need not sum to 1. () is for `source` alone.
      tokenizer: see `load_tokenizer`.
      verify: whether token records are read through and compared with their SHA-256 before the
        first step. Without it damage shows when a damaged document is read.
      sequence_length: tokens per row, T.
      batch_size: rows per global batch, over all processes.
      seed: of the order of documents and rows. The split does not depend on it, so runs with
        different seeds are measured on the same text.
      validation_fraction: share of the documents held out, in [0, 1): rounded to whole documents
        and at least one unless it is 0.
      shuffle_tokens: rows are shuffled among about so many tokens (after the documents have been
        shuffled as a whole), so that a long document does not fill a batch. Held in memory twice.
      read_threads: threads that read and tokenise.
    """

    source: str = "python"
    kind: str = "auto"
    text_field: str = "text"
    more_sources: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    tokenizer: str = "bytes"
    verify: bool = True
    sequence_length: int = 1024
    batch_size: int = 8
    seed: int = 0
    validation_fraction: float = 0.05
    shuffle_tokens: int = 1 << 22
    read_threads: int = 4

    def __post_init__(self):
        for name in ("sequence_length", "batch_size", "shuffle_tokens", "read_threads"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction={self.validation_fraction} must be at least 0 and below 1"
            )
        expected = 1 + len(self.more_sources) if self.more_sources else 0
        if len(self.weights) != expected or not all(0 < w < math.inf for w in self.weights):
            raise ValueError(
                f"weights={self.weights} must be {expected} positive numbers: one for source and "
                f"one for each of more_sources={self.more_sources}, or () if there are none"
            )


@dataclasses.dataclass(frozen=True)
class Corpus:
    """An opened source with its tokenizer and its split.

    Attributes:
      source: all documents; of several sources one after the other.
      tokenizer: gives their ids.
      train, validation: indices of the documents of each split, int64, ascending.
      first: index of the first document of each source.
      weights: share of the tokens that come from each.
    """

    source: DocumentSource
    tokenizer: Tokenizer
    train: np.ndarray
    validation: np.ndarray
    first: tuple[int, ...] = (0,)
    weights: tuple[float, ...] = (1.0,)

    def tokens(self, document: bytes | np.ndarray) -> np.ndarray:
        """Token ids of a document of `source`, int32 [n], without special tokens."""
        if isinstance(document, np.ndarray):
            return document
        return self.tokenizer.encode(document)

    def indices(self, split: Split) -> np.ndarray:
        """Documents of `split`; ValueError if it is unknown or empty."""
        if split not in ("train", "validation"):
            raise ValueError(f"split={split!r} must be 'train' or 'validation'")
        indices = self.train if split == "train" else self.validation
        if not len(indices):
            raise ValueError(
                f"split={split!r} is empty: validation_fraction shares {len(self.source)} "
                "document(s) between the two splits; change it, or name a source with more"
            )
        return indices

    def by_source(self, split: Split) -> list[np.ndarray]:
        """`indices(split)`, apart for each source."""
        indices = self.indices(split)
        return np.split(indices, np.searchsorted(indices, self.first[1:]))

    def document_weights(self, split: Split) -> list[float]:
        """Share of the documents that come from each source, so that tokens have their weights."""
        if len(self.weights) == 1:
            return [1.0]
        lengths = np.diff(self.source.offsets)
        # A document is one target more than it has tokens, and none if it has no token.
        targets = [(lengths[i] + 1)[lengths[i] > 0].sum() for i in self.by_source(split)]
        documents = [len(indices) for indices in self.by_source(split)]
        parts = zip(self.weights, targets, documents, strict=True)
        shares = np.array([weight * count / max(total, 1) for weight, total, count in parts])
        return (shares / shares.sum()).tolist()


def open_corpus(config: DataConfig) -> Corpus:
    """Opens the source and the tokenizer of `config` and splits the documents.

    Held out are, of each source, the documents whose index hashes lowest, so the split is a
    function of the number of documents and the fraction alone.

    Raises:
      ValueError: see `open_source` and `load_tokenizer`; or the records were made by another
        tokenizer or are damaged; or a source of several has no records; or the training split would
        be empty.
      ImportError: a package that the source or the tokenizer needs is missing.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    sources = [
        _open_checked(name, config, tokenizer) for name in (config.source, *config.more_sources)
    ]
    splits = [_split(len(source), config.validation_fraction) for source in sources]
    first = tuple(itertools.accumulate(map(len, sources[:-1]), initial=0))
    train, validation = (
        np.concatenate([begin + split[part] for begin, split in zip(first, splits, strict=True)])
        for part in range(2)
    )
    source = sources[0] if len(sources) == 1 else JoinedRecords(sources)
    corpus = Corpus(source, tokenizer, train, validation, first, config.weights or (1.0,))
    corpus.indices("train")
    for name, part in zip((config.source, *config.more_sources), splits, strict=True):
        if not len(part[0]):
            raise ValueError(
                f"source={name!r} has no document left to train on: lower validation_fraction="
                f"{config.validation_fraction}, or leave it out"
            )
    return corpus


def _open_checked(name: str, config: DataConfig, tokenizer: Tokenizer) -> DocumentSource:
    source = open_source(name, kind=config.kind, text_field=config.text_field)
    if not isinstance(source, TokenRecords):
        if config.more_sources:
            raise ValueError(
                f"source={name!r} is text, and sources are mixed by their tokens, which only token "
                "records know: prepare each with experiments/prepare_data.py first"
            )
        return source
    if source.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"tokenizer={config.tokenizer!r} is not the one that made the token records of "
            f"source={name!r}: train with tokenizer={source.tokenizer!r}, or prepare "
            "the records anew"
        )
    if source.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"source={name!r} was prepared for a vocabulary of {source.vocab_size}, "
            f"tokenizer={config.tokenizer!r} has {tokenizer.vocab_size}: prepare the records anew"
        )
    if config.verify:
        source.verify(threads=config.read_threads)
    return source


def _split(num_documents: int, validation_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train on, and those held out."""
    held_out = round(validation_fraction * num_documents)
    if validation_fraction:
        held_out = max(held_out, 1)
    is_validation = np.zeros(num_documents, bool)
    if held_out:
        order = _hash(np.arange(num_documents, dtype=np.uint64))
        is_validation[np.argpartition(order, held_out - 1)[:held_out]] = True
    return np.flatnonzero(~is_validation), np.flatnonzero(is_validation)


def make_dataset(
    config: DataConfig,
    *,
    split: Split = "train",
    process_index: int = 0,
    process_count: int = 1,
    epochs: int | None = None,
    corpus: Corpus | None = None,
) -> grain.IterDataset:
    """Batches of one split: shuffled without end for training, in order and once for validation.

    Args:
      config: what and in which shape.
      split: "train" or "validation".
      process_index, process_count: this process among all. Each reads every document and keeps its
        own rows of every global batch, so processes agree on the number of batches and the global
        batch does not depend on their number. Where tokenising everything in every process is too
        slow, tokenise once with `experiments/prepare_data.py`.
      epochs: passes over the documents; None is no end for "train" and 1 for "validation". Every
        pass has another order. Several sources are each gone through so often, and end together
        with the one that ends first.
      corpus: what `open_corpus(config)` gave, if it is open already.

    Returns:
      A dataset of dicts of NumPy arrays [batch_size / process_count, T], see `PackIterDataset`.
      Its iterators have `get_state` and `set_state` (plain JSON, exact) and go into an orbax
      checkpoint through `grain.checkpoint`.

    Raises:
      ValueError: an argument out of its range, an empty split, or what `open_corpus` raises.
    """
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} must be in [0, {process_count})")
    if config.batch_size % process_count:
        raise ValueError(
            f"batch_size={config.batch_size} must be a multiple of process_count={process_count}"
        )
    if epochs is not None and epochs < 1:
        raise ValueError(f"epochs={epochs} must be at least 1, or None")
    corpus = open_corpus(config) if corpus is None else corpus
    shuffled = split == "train"
    # One seed for each use: neighbouring seeds of a user must not share orders.
    document_seed, row_seed = map(int, np.random.SeedSequence(config.seed).generate_state(2))
    more = np.random.SeedSequence(config.seed, spawn_key=(0,))
    document_seeds = [document_seed, *map(int, more.generate_state(len(config.more_sources)))]
    parts = []
    for number, indices in enumerate(corpus.by_source(split)):
        part = grain.MapDataset.source(_Subset(corpus.source, indices))
        if shuffled:
            part = part.shuffle(seed=document_seeds[number]).repeat(epochs)
        else:
            part = part.repeat(epochs or 1)
        parts.append(part)
    documents = parts[0]
    if len(parts) > 1:
        documents = grain.MapDataset.mix(parts, corpus.document_weights(split))

    begin, end = corpus.tokenizer.bos_id, corpus.tokenizer.eos_id

    def with_ends(document: bytes | np.ndarray) -> np.ndarray:
        ids = corpus.tokens(document)
        pairs = np.empty(len(ids) + 2, np.int32)
        pairs[0], pairs[1:-1], pairs[-1] = begin, ids, end
        return pairs

    read_options = grain.ReadOptions(
        num_threads=config.read_threads, prefetch_buffer_size=4 * config.read_threads
    )
    options = PackingOptions(
        batch_size=config.batch_size,
        sequence_length=config.sequence_length,
        window=max(1, config.shuffle_tokens // (config.batch_size * config.sequence_length))
        if shuffled
        else 1,
        seed=row_seed if shuffled else None,
        process_index=process_index,
        process_count=process_count,
        pad_id=corpus.tokenizer.pad_id,
        num_documents=len(corpus.indices(split)),
        content=getattr(corpus.source, "content", None),
    )
    return PackIterDataset(
        documents.map(with_ends).to_iter_dataset(read_options),
        options,
        corpus.tokenizer.token_bytes,
    )


@dataclasses.dataclass(frozen=True)
class CorpusStatistics:
    """Sizes of the splits, and what a model without context reaches.

    Attributes:
      train_documents, train_tokens, train_bytes: of the documents that were read; tokens count one
        end per document, bytes are bytes of text (`Tokenizer.token_bytes`).
      validation_documents, validation_tokens, validation_bytes: likewise.
      unigram_bits_per_byte: −Σ log₂ p(t) over all targets t of the validation documents (tokens
        and ends), divided by their bytes; p(t) = (n(t) + 1) / (n + V), where t is n(t) of the n
        targets of the training documents and there are V ids. Float64. A model's loss summed over
        the same targets and divided by the same bytes is comparable.
    """

    train_documents: int
    train_tokens: int
    train_bytes: int
    validation_documents: int
    validation_tokens: int
    validation_bytes: int
    unigram_bits_per_byte: float


def corpus_statistics(
    config: DataConfig, *, max_documents: int | None = None, corpus: Corpus | None = None
) -> CorpusStatistics:
    """Counts tokens and bytes, and scores a unigram model fitted on train on validation.

    Args:
      config: which corpus.
      max_documents: read at most so many of each split, evenly spread; None reads all.
      corpus: what `open_corpus(config)` gave, if it is open already.

    Raises:
      ValueError: a split is empty, or its documents are.
    """
    if max_documents is not None and max_documents < 1:
        raise ValueError(f"max_documents={max_documents} must be at least 1, or None")
    corpus = open_corpus(config) if corpus is None else corpus
    train_documents, train = _target_counts(corpus, "train", max_documents)
    validation_documents, validation = _target_counts(corpus, "validation", max_documents)
    token_bytes = corpus.tokenizer.token_bytes.astype(np.int64)
    validation_bytes = int(validation @ token_bytes)
    if not validation_bytes:
        raise ValueError("the validation documents hold no text: bits per byte have no meaning")
    probability = (train + 1.0) / (train.sum() + len(train))
    return CorpusStatistics(
        train_documents=train_documents,
        train_tokens=int(train.sum()),
        train_bytes=int(train @ token_bytes),
        validation_documents=validation_documents,
        validation_tokens=int(validation.sum()),
        validation_bytes=validation_bytes,
        unigram_bits_per_byte=float(-(validation @ np.log2(probability)) / validation_bytes),
    )


class _Subset:
    """Some documents of a source."""

    def __init__(self, source: DocumentSource, indices: np.ndarray):
        self._source, self._indices = source, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: SupportsIndex) -> bytes | np.ndarray:
        return self._source[int(self._indices[index])]


def _target_counts(
    corpus: Corpus, split: Split, max_documents: int | None
) -> tuple[int, np.ndarray]:
    """Documents read, and how often each id is a target in them, int64 [V]."""
    indices = corpus.indices(split)
    if max_documents is not None and max_documents < len(indices):
        indices = indices[np.arange(max_documents) * len(indices) // max_documents]
    counts = np.zeros(corpus.tokenizer.vocab_size, np.int64)
    for index in indices:
        ids = corpus.tokens(corpus.source[int(index)])
        if len(ids):
            counts += np.bincount(ids, minlength=len(counts))
            counts[corpus.tokenizer.eos_id] += 1
    return len(indices), counts


def _hash(values: np.ndarray) -> np.ndarray:
    """Finaliser of SplitMix64 (Steele, Lea & Flood 2014): uint64 to well mixed uint64."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
