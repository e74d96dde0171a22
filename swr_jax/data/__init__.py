"""Text to batches: tokenizers, document sources, and the packed, shuffled, resumable pipeline."""

from swr_jax.data.pipeline import (
    Corpus,
    CorpusStatistics,
    DataConfig,
    corpus_statistics,
    make_dataset,
    open_corpus,
)
from swr_jax.data.sources import DocumentSource, open_source
from swr_jax.data.tokenizers import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    StreamDecoder,
    Tokenizer,
    load_tokenizer,
)

__all__ = [
    "ByteTokenizer",
    "Corpus",
    "CorpusStatistics",
    "DataConfig",
    "DocumentSource",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "corpus_statistics",
    "load_tokenizer",
    "make_dataset",
    "open_corpus",
    "open_source",
]
