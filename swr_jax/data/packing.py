"""Documents of any length to batches of one shape, with an exact position that can be saved.

The pairs (input, target) of all documents are laid end to end and cut into rows:

    document  d e f      inputs   BOS d e f      targets  d e f EOS

so every token of the corpus, and one end per document, is a target exactly once. A document that
does not fit goes on in the next rows. Rows of one document would stand together in a batch; to
mix them, rows are shuffled within a window of many batches.
"""

import concurrent.futures
import dataclasses
import sys
from typing import Any

import grain
import numpy as np

_ALL_EMPTY = "every document is empty: there is nothing to train on"


@dataclasses.dataclass(frozen=True)
class PackingOptions:
    """Shape and order of the batches.

    Attributes:
      batch_size: rows of a global batch, over all processes.
      sequence_length: pairs per row, T.
      window: global batches per shuffle window; rows are shuffled within it.
      seed: of the shuffle within windows; None keeps the order.
      process_index, process_count: rows process_index·b … (process_index + 1)·b − 1 of each global
        batch are given, b = batch_size / process_count.
      pad_id: fills rows beyond the last document.
      num_documents: documents per epoch; a window takes no more, rounded up to whole batches.
      content: what tells the corpus from others of as many documents, where it is known.
    """

    batch_size: int
    sequence_length: int
    window: int
    seed: int | None
    process_index: int
    process_count: int
    pad_id: int
    num_documents: int
    content: str | None = None


class PackIterDataset(grain.IterDataset):
    """Batches [b, T] packed from documents.

    Args:
      parent: documents as int32 [n + 2]: BOS, n token ids, EOS. Those with n = 0 are passed over.
      options: shape and order.
      token_bytes: int32 [V], bytes of text per id.

    The iterator gives dicts of arrays [b, T]: `tokens`, `targets`, `segment_ids` (1, 2, … along a
    row, 0 is padding), `positions` (from 0 in each segment of a row), all int32; `loss_weights`
    float32 (0 at padding, otherwise 1); `target_bytes` int32. The last batch of a finite dataset is
    padded, not dropped. Every process sees the same documents and keeps its own rows, so all have
    equally many batches and their batches stacked are the batch of a single process.

    Its state is a few integers and the parent's state; restoring packs one window anew, and refuses
    a state of another shape, order or number of documents.
    The next window is packed in a thread while the current one is used.
    """

    def __init__(self, parent: grain.IterDataset, options: PackingOptions, token_bytes: np.ndarray):
        super().__init__(parent)
        self._options = options
        self._token_bytes = token_bytes

    def __iter__(self) -> "_PackIterator":
        return _PackIterator(self._parent.__iter__(), self._options, self._token_bytes)


@dataclasses.dataclass(frozen=True)
class _Window:
    """This process's rows of some consecutive global batches, each array [batches, b, T]."""

    cursor: dict[str, Any]  # where in the documents it begins
    tokens: np.ndarray
    targets: np.ndarray
    starts: np.ndarray  # bool: first pair of a document, or of its rest
    weights: np.ndarray  # bool: not padding


class _PackIterator(grain.DatasetIterator):
    def __init__(self, parent, options: PackingOptions, token_bytes: np.ndarray):
        super().__init__(parent)
        self._options = options
        self._token_bytes = token_bytes
        self._executor = concurrent.futures.ThreadPoolExecutor(1, "swr-pack")
        # Where packing goes on (the window being packed, not the one in use): in `_document` if
        # there is one, else before the next.
        self._cursor = {"documents": parent.get_state(), "offset": 0, "window": 0}
        self._document: np.ndarray | None = None
        self._start_at(self._cursor, batch=0)

    def _start_at(self, cursor: dict[str, Any], batch: int) -> None:
        self._window: _Window | None = None
        self._next: concurrent.futures.Future | None = None
        self._window_cursor = dict(cursor)
        self._batch = batch

    def __next__(self) -> dict[str, np.ndarray]:
        self._assert_not_closed()
        while self._window is None or self._batch == len(self._window.tokens):
            if self._window is not None and not self._batch:
                raise StopIteration
            ahead = self._next or self._executor.submit(self._pack_window)
            self._next = None
            window = ahead.result()
            # Nothing changes before the next window is there: if packing it failed, the state is
            # still that of the last batch. A restored position keeps its batch.
            self._batch = 0 if self._window is not None else self._batch
            self._window, self._window_cursor = window, window.cursor
            if len(window.tokens):
                self._next = self._executor.submit(self._pack_window)
        self._batch += 1
        return self._assemble(self._window, self._batch - 1)

    def get_state(self) -> dict[str, Any]:
        """Where the current window begins and how many of its batches were given; plain JSON."""
        return {**self._window_cursor, "batch": self._batch, "layout": self._layout()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues after the batch that was last given when `state` was taken.

        Raises:
          ValueError: the state belongs to batches of another shape, order or corpus.
        """
        if state["layout"] != self._layout():
            raise ValueError(
                f"state was taken with {state['layout']}, this dataset has {self._layout()}: they "
                "must be equal to go on exactly; restore the same data configuration, or start "
                "the data anew"
            )
        if self._next is not None and not self._next.cancel():
            # The thread that packs ahead owns the parent until it is done; its window is dropped,
            # and so would be its error.
            concurrent.futures.wait([self._next])
        self._cursor = {key: state[key] for key in ("documents", "offset", "window")}
        self._parent.set_state(state["documents"])
        self._document = None
        self._start_at(self._cursor, state["batch"])

    def _layout(self) -> dict[str, Any]:
        """What decides which batch comes where; the number of processes does not."""
        names = ("batch_size", "sequence_length", "window", "seed", "num_documents", "content")
        return {name: getattr(self._options, name) for name in names}

    def start_prefetch(self) -> None:
        """Begins to pack the first window in the background."""
        if self._window is None and self._next is None:
            self._next = self._executor.submit(self._pack_window)

    def close(self) -> None:
        """Stops the packing thread and the reading threads."""
        if not self._closed and not sys.is_finalizing():
            self._executor.shutdown(wait=False, cancel_futures=True)
        super().close()

    def _pack_window(self) -> _Window:
        o = self._options
        batch = o.batch_size * o.sequence_length
        capacity = o.window * batch
        tokens, targets = np.full((2, capacity), o.pad_id, np.int32)
        starts = np.zeros(capacity, bool)
        begin = dict(self._cursor)
        filled = documents = 0
        while filled < capacity:
            if self._document is None:
                self._document = self._next_document(limit=2 * o.num_documents)
                if self._document is None:
                    break
            offset = self._cursor["offset"]
            stop = min(offset + capacity - filled, len(self._document) - 1)
            pairs = slice(filled, filled + stop - offset)
            tokens[pairs] = self._document[offset:stop]
            targets[pairs] = self._document[offset + 1 : stop + 1]
            starts[filled] = True
            filled = pairs.stop
            self._cursor["offset"] = stop
            if stop == len(self._document) - 1:
                self._to_next_document()
                documents += 1
                if documents == o.num_documents:
                    capacity = -(-filled // batch) * batch
        if not filled and begin["window"] == 0:
            raise ValueError(_ALL_EMPTY)
        self._cursor["window"] += 1
        rows = self._row_order(-(-filled // o.sequence_length), begin["window"])
        weights = np.arange(len(tokens)) < filled
        window = (tokens, targets, starts, weights)
        return _Window(begin, *(x.reshape(-1, o.sequence_length)[rows] for x in window))

    def _next_document(self, limit: int) -> np.ndarray | None:
        """The next document that is not empty, None at the end; refuses `limit` empty ones."""
        for _ in range(limit):
            try:
                document = next(self._parent)
            except StopIteration:
                return None
            if len(document) > 2:
                return document
            self._to_next_document()
        raise ValueError(_ALL_EMPTY)

    def _to_next_document(self) -> None:
        self._document = None
        self._cursor["documents"] = self._parent.get_state()
        self._cursor["offset"] = 0

    def _row_order(self, num_rows: int, window: int) -> np.ndarray:
        """Rows that make up this process's batches, [batches, b]; padding rows come last."""
        o = self._options
        order = np.arange(-(-num_rows // o.batch_size) * o.batch_size)
        if o.seed is not None:
            order[:num_rows] = np.random.default_rng([o.seed, window]).permutation(num_rows)
        rows = o.batch_size // o.process_count
        return order.reshape(-1, o.process_count, rows)[:, o.process_index]

    def _assemble(self, window: _Window, batch: int) -> dict[str, np.ndarray]:
        valid, starts = window.weights[batch], window.starts[batch].copy()
        starts[:, 0] = True
        columns = np.arange(starts.shape[1], dtype=np.int32)
        segment_start = np.maximum.accumulate(np.where(starts, columns, 0), axis=1)
        targets = window.targets[batch]
        return {
            "tokens": window.tokens[batch],
            "targets": targets,
            "segment_ids": np.where(valid, np.cumsum(starts, axis=1, dtype=np.int32), 0),
            "positions": np.where(valid, columns - segment_start, 0),
            "loss_weights": valid.astype(np.float32),
            "target_bytes": np.where(valid, self._token_bytes[targets], 0),
        }
