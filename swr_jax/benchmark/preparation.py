"""How much of a tokenizer's own speed the preparation of a corpus keeps.

The text is that of the Python packages installed here, in Parquet files of FineWeb-Edu's schema;
the tokenizer is a byte-level BPE of 32,768 ids, trained on Python's standard library. In each round
three contestants take turns on the same text, in an order drawn anew:

threads     the tokenizer alone: its own batch call with all cores, on text in memory, ids dropped
processes   the tokenizer alone: a process per core, likewise, from the moment when all are ready
prepare     `swr_jax.data.prepare` from the Parquet files to the finished folder, with the start of
            its workers, reading, compression, checksums and waiting for the disk

Ratios are taken within a round; reported are medians and quartiles. Time on the clock depends on
what else the machine does, processor time hardly, so that both are compared.
"""

import dataclasses
import hashlib
import multiprocessing
import os
import random
import resource
import shutil
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from swr_jax.benchmark.timing import spread
from swr_jax.data import open_source
from swr_jax.data.prepare import Preparation, usable_cores

_FILES = 8
_ROW_GROUP = 100  # rows: fewer than FineWeb-Edu's 1000, as the corpus is smaller
_BATCH = 256  # documents per call of the tokenizer alone
ALONE = ("threads", "processes")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is measured: bytes of text, ids of the tokenizer, rounds."""

    text_bytes: int
    vocab_size: int
    rounds: int


FULL = Sizes(text_bytes=64 << 20, vocab_size=1 << 15, rounds=3)
TINY = Sizes(text_bytes=1 << 18, vocab_size=300, rounds=1)


def run(sizes: Sizes, folder: Path) -> Iterator[dict]:
    """Makes corpus and tokenizer in `folder`, then yields the measurements of each round."""
    texts = installed_text(sizes.text_bytes)
    corpus = write_parquet(texts, folder / "corpus")
    tokenizer = train_tokenizer(sizes.vocab_size, folder / "tokenizer.json")
    cores = usable_cores()
    contestants = {
        "threads": lambda: _threads(tokenizer, texts),
        "processes": lambda: _processes(tokenizer, texts, cores),
        "prepare": lambda: _prepare(corpus, tokenizer, folder / "tokens", cores),
    }
    order = random.Random(0)
    for _ in range(sizes.rounds):
        names = order.sample(list(contestants), len(contestants))
        yield {name: contestants[name]() for name in names}


def summary(rounds: list[dict], texts: dict) -> dict:
    """Speeds of the contestants, and what `prepare` keeps of each of those that only tokenise.

    Args:
      rounds: what `run` gave.
      texts: "documents", "text_bytes", "tokens" of the corpus.
    """
    speeds = {
        name: dataclasses.asdict(spread([texts["tokens"] / r[name]["seconds"] for r in rounds]))
        for name in rounds[0]
    }
    ratios = {
        clock: {
            name: dataclasses.asdict(spread([r[name][key] / r["prepare"][key] for r in rounds]))
            for name in ALONE
        }
        for clock, key in (("time", "seconds"), ("processor_time", "cpu_seconds"))
    }
    return {"corpus": texts, "tokens_per_second": speeds, "prepare_over_alone": ratios}


def installed_text(num_bytes: int) -> list[str]:
    """Source files of installed packages, then of the standard library: `num_bytes` or all."""
    library = Path(sysconfig.get_path("stdlib"))
    packages = Path(sysconfig.get_path("purelib"))
    texts: list[str] = []
    total = 0
    for folder in (packages, library):
        for path in sorted(folder.rglob("*.py")):
            text = path.read_bytes().decode("utf-8", "ignore")
            if text:
                texts.append(text)
                total += len(text.encode())
            if total >= num_bytes:
                return texts
    return texts


def write_parquet(texts: list[str], folder: Path) -> Path:
    """The texts in files of FineWeb-Edu's columns."""
    import pyarrow
    from pyarrow import parquet

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number in range(_FILES):
        part = texts[len(texts) * number // _FILES : len(texts) * (number + 1) // _FILES]
        count = len(part)
        names = [hashlib.sha256(text.encode()).hexdigest() for text in part]
        table = pyarrow.table(
            {
                "text": part,
                "id": names,
                "dump": ["python"] * count,
                "url": names,
                "file_path": names,
                "language": ["en"] * count,
                "language_score": [1.0] * count,
                "token_count": [len(text) // 4 for text in part],
                "score": [3.0] * count,
                "int_score": [3] * count,
            }
        )
        parquet.write_table(table, folder / f"{number:03}_00000.parquet", row_group_size=_ROW_GROUP)
    return folder


def train_tokenizer(vocab_size: int, path: Path) -> Path:
    """A byte-level BPE trained on the standard library."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    source = open_source("python")
    documents = (source[index].decode("utf-8", "replace") for index in range(len(source)))
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.save(str(path))
    return path


def _timed(call: Callable[[], object]) -> dict[str, float]:
    def cpu() -> float:
        usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    began, cpu_began = time.perf_counter(), cpu()
    call()
    return {"seconds": time.perf_counter() - began, "cpu_seconds": cpu() - cpu_began}


def _encode_all(tokenizer, texts: list[str]) -> None:
    for begin in range(0, len(texts), _BATCH):
        tokenizer.encode_batch_fast(texts[begin : begin + _BATCH], add_special_tokens=False)


def _threads(path: Path, texts: list[str]) -> dict[str, float]:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    return _timed(lambda: _encode_all(tokenizer, texts))


def _processes(path: Path, texts: list[str], count: int) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    connections, processes = [], []
    for index in range(count):
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_encode_when_told, args=(theirs, path, texts[index::count]), daemon=True
        )
        process.start()
        connections.append(ours)
        processes.append(process)
    for connection in connections:
        connection.recv()  # ready
    began = time.perf_counter()
    for connection in connections:
        connection.send("go")
    cpu_seconds = sum(connection.recv() for connection in connections)
    seconds = time.perf_counter() - began
    for process in processes:
        process.join()
    return {"seconds": seconds, "cpu_seconds": cpu_seconds}


def _encode_when_told(connection, path: Path, texts: list[str]) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    connection.send("ready")
    connection.recv()
    connection.send(_timed(lambda: _encode_all(tokenizer, texts))["cpu_seconds"])


def _prepare(corpus: Path, tokenizer: Path, output: Path, workers: int) -> dict[str, float]:
    shutil.rmtree(output, ignore_errors=True)

    def prepare() -> None:
        with Preparation(str(corpus), output, tokenizer=str(tokenizer)) as preparation:
            preparation.run(workers=workers)

    return _timed(prepare)
