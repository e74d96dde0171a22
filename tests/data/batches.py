"""What the tests of the data pipeline share: small corpora, and a packer made of Python lists."""

import itertools
import json

import numpy as np

BOS, EOS, PAD = 256, 257, 258  # of the byte tokenizer
KEYS = ("tokens", "targets", "segment_ids", "positions", "loss_weights", "target_bytes")


def write_corpus(folder, documents) -> str:
    path = folder / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return str(path)


def random_documents(count, longest, seed=0) -> list[str]:
    rng = np.random.default_rng(seed)
    alphabet = list("abcdefghijklmnopqrstuvwxyz 中é👍")
    return ["".join(rng.choice(alphabet, rng.integers(1, longest))) for _ in range(count)]


def oracle_batches(documents: list[bytes], batch_size: int, length: int) -> list[dict]:
    """Concatenate the pairs of all documents, cut into rows, pad the last batch."""
    pairs = []
    for number, document in enumerate(d for d in documents if d):
        ids = [BOS, *document, EOS]
        pairs += [(a, b, number) for a, b in itertools.pairwise(ids)]
    while len(pairs) % (batch_size * length):
        pairs.append((PAD, PAD, None))
    rows = []
    for begin in range(0, len(pairs), length):
        row = {key: [] for key in KEYS}
        seen = []
        for token, target, number in pairs[begin : begin + length]:
            if number is not None and number not in seen:
                seen.append(number)
                position = 0
            row["tokens"].append(token)
            row["targets"].append(target)
            row["segment_ids"].append(0 if number is None else len(seen))
            row["positions"].append(0 if number is None else position)
            row["loss_weights"].append(0.0 if number is None else 1.0)
            row["target_bytes"].append(int(target < 256))
            position += 1
        rows.append(row)
    return [
        {key: [row[key] for row in rows[begin : begin + batch_size]] for key in KEYS}
        for begin in range(0, len(rows), batch_size)
    ]


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert set(batch) == set(KEYS)
        for key in KEYS:
            np.testing.assert_array_equal(batch[key], other[key], err_msg=key)


def take(iterator, count):
    return list(itertools.islice(iterator, count))
