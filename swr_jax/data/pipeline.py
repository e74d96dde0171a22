"""From a corpus to batches: split by document, shuffle, tokenise, pack."""

import dataclasses
from typing import Literal, SupportsIndex

import grain
import numpy as np

from swr_jax.data.packing import PackingOptions, PackIterDataset
from swr_jax.data.sources import DocumentSource, open_source
from swr_jax.data.token_records import TokenRecords
from swr_jax.data.tokenizers import Tokenizer, load_tokenizer

Split = Literal["train", "validation"]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to train on, and in which shape.

    Attributes:
      source, kind, text_field: see `open_source`.
      tokenizer: see `load_tokenizer`.
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
    tokenizer: str = "bytes"
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


@dataclasses.dataclass(frozen=True)
class Corpus:
    """An opened source with its tokenizer and its split.

    Attributes:
      source: all documents.
      tokenizer: gives their ids.
      train, validation: indices of the documents of each split, int64, ascending.
    """

    source: DocumentSource
    tokenizer: Tokenizer
    train: np.ndarray
    validation: np.ndarray

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


def open_corpus(config: DataConfig) -> Corpus:
    """Opens the source and the tokenizer of `config` and splits the documents.

    Held out are the documents whose index hashes lowest, so the split is a function of the number
    of documents and the fraction alone.

    Raises:
      ValueError: see `open_source` and `load_tokenizer`; or the records were made by another
        tokenizer; or the training split would be empty.
      ImportError: a package that the source or the tokenizer needs is missing.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    source = open_source(config.source, kind=config.kind, text_field=config.text_field)
    if isinstance(source, TokenRecords) and source.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"tokenizer={config.tokenizer!r} is not the one that made the token records of "
            f"source={config.source!r}: train with tokenizer={source.tokenizer!r}, or prepare "
            "the records anew"
        )
    num_documents = len(source)
    held_out = round(config.validation_fraction * num_documents)
    if config.validation_fraction:
        held_out = max(held_out, 1)
    is_validation = np.zeros(num_documents, bool)
    if held_out:
        order = _hash(np.arange(num_documents, dtype=np.uint64))
        is_validation[np.argpartition(order, held_out - 1)[:held_out]] = True
    corpus = Corpus(
        source, tokenizer, np.flatnonzero(~is_validation), np.flatnonzero(is_validation)
    )
    corpus.indices("train")
    return corpus


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
        pass has another order.
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
    indices = corpus.indices(split)
    documents = grain.MapDataset.source(_Subset(corpus.source, indices))
    shuffled = split == "train"
    # One seed for each use: neighbouring seeds of a user must not share orders.
    document_seed, row_seed = map(int, np.random.SeedSequence(config.seed).generate_state(2))
    if shuffled:
        documents = documents.shuffle(seed=document_seed)
        documents = documents.repeat(epochs)
    else:
        documents = documents.repeat(epochs or 1)

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
        num_documents=len(indices),
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
