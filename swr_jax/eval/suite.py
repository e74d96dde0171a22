"""Every task at every length as a case that can be done, kept and passed over the next time."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from swr_jax.data import Corpus, Tokenizer
from swr_jax.eval import babilong, haystack, needle
from swr_jax.eval.intervals import wilson
from swr_jax.eval.mqar import MQARConfig, accuracy_by_distance, mqar_batch
from swr_jax.eval.perplexity import cut_streams, perplexity_by_position, text_stream
from swr_jax.eval.streaming import Progress, Streamer

TASKS = ("perplexity", "needle", "passkey", "babilong", "mqar")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What to test. Lengths are tokens of the model's tokenizer, answers included.

    tasks: names in `TASKS`. lengths: of the contexts. text_lengths: those of perplexity; none: the
    same. text_tokens: of perplexity, at each length.
    variants: of needles, names in `needle.VARIANTS`. depths: number of depths of needles and
    passkeys, from 0 to 100 per cent. samples: at each length, depth and variant. prose: what hides
    needles and facts, see `haystack.prose`. seed: of all that is drawn.

    Raises:
        ValueError: unknown names, or numbers out of range.
    """

    tasks: tuple[str, ...] = TASKS
    lengths: tuple[int, ...] = (512, 2048, 8192)
    text_lengths: tuple[int, ...] = ()
    text_tokens: int = 1 << 18
    variants: tuple[str, ...] = tuple(needle.VARIANTS)
    depths: int = 5
    samples: int = 4
    prose: str = "python"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("tasks", TASKS), ("variants", tuple(needle.VARIANTS))):
            for value in getattr(self, name):
                if value not in known:
                    raise ValueError(
                        f"{name} has {value!r}; each must be one of {', '.join(known)}"
                    )
        for name, least in (("text_tokens", 1), ("depths", 2), ("samples", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}; it must be at least {least}")
        if not self.lengths or min(self.lengths + self.text_lengths) < 16:
            raise ValueError(
                f"lengths={self.lengths}, text_lengths={self.text_lengths}; there must be some "
                "lengths, and each must be at least 16"
            )

    def lengths_of(self, task: str) -> list[int]:
        """Contexts of a task, short ones first."""
        is_text = task == "perplexity" and self.text_lengths
        return sorted(self.text_lengths if is_text else self.lengths)


@dataclasses.dataclass(frozen=True)
class Case:
    """One number of the report, with its interval.

    Attributes:
        name: tells it from all others of a record.
        settings: what its result depends on besides model and name; JSON.
        tokens: read or written, roughly; what a progress bar counts.
        run: returns the result, JSON; raises TaskError where the task cannot be set.
    """

    name: str
    settings: dict
    tokens: int
    run: Callable[[Progress], dict]


class Suite:
    """The cases of `settings` for a model.

    Args:
        streamer: the model.
        tokenizer: its own.
        corpus: whose held-out documents perplexity is measured on.
        split: of the corpus, "validation" or "train".
        settings: what to test.
    """

    def __init__(
        self,
        streamer: Streamer,
        tokenizer: Tokenizer,
        *,
        corpus: Corpus,
        split: str,
        settings: Settings,
    ):
        self.streamer = streamer
        self.tokenizer = tokenizer
        self.corpus = corpus
        self.split = split
        self.settings = settings

    def cases(self) -> Iterator[Case]:
        """Yield the cases, short contexts first within each task."""
        for task in self.settings.tasks:
            for length in self.settings.lengths_of(task):
                yield from getattr(self, f"_{task}")(length)

    @functools.cached_property
    def _sentences(self) -> list[str]:
        # Five bytes a token are more than tokenizers reach on English.
        return haystack.prose(self.settings.prose, characters=5 * max(self.settings.lengths))

    def prose(self, length: int) -> list[str]:
        """Sentences of the haystacks of a length, whatever other lengths are tested."""
        return haystack.shorten(self._sentences, characters=5 * length)

    @functools.cached_property
    def _stream(self) -> np.ndarray:
        longest = max(self.settings.lengths_of("perplexity"))
        tokens = max(self.settings.text_tokens, longest) + 1
        return text_stream(self.corpus, split=self.split, tokens=tokens)

    def _perplexity(self, length: int) -> Iterator[Case]:
        tokens = max(self.settings.text_tokens, length)
        count = tokens // length

        def run(progress: Progress) -> dict:
            rows = cut_streams(self._stream, length=length, count=count)
            sizes = self.tokenizer.token_bytes
            found = perplexity_by_position(self.streamer, rows, sizes, progress=progress)
            width = min(self.streamer.batch_size, len(rows))
            return {**found, "memory": self.streamer.memory(width, length)}

        yield Case(f"perplexity/{length}", {"text_tokens": tokens}, count * length, run)

    def _needle(self, length: int) -> Iterator[Case]:
        for name in self.settings.variants:
            variant = needle.VARIANTS[name]
            prose = self.prose(length)

            def make(size: int, depth: float, seed: Sequence[int], variant=variant, prose=prose):
                return needle.needle_sample(
                    variant, haystack_size=size, prose=prose, depth=depth, seed=seed
                )

            yield from self._retrieval(
                f"needle/{name}",
                length,
                make,
                hits=needle.hits,
                answer_tokens=needle.ANSWER_TOKENS,
                smallest=variant.num_needles,
            )

    def _passkey(self, length: int) -> Iterator[Case]:
        def make(size: int, depth: float, seed: Sequence[int]) -> needle.Sample:
            return needle.passkey_sample(haystack_size=size, depth=depth, seed=seed)

        yield from self._retrieval(
            "passkey",
            length,
            make,
            hits=needle.passkey_hits,
            answer_tokens=needle.PASSKEY_ANSWER_TOKENS,
        )

    def _retrieval(
        self, name: str, length: int, make, *, hits, answer_tokens: int, smallest: int = 1
    ) -> Iterator[Case]:
        grid = np.linspace(0, 100, self.settings.depths).round().astype(int).tolist()
        asked = [(depth, n) for depth in grid for n in range(self.settings.samples)]

        def run(progress: Progress) -> dict:
            samples = [
                needle.fit(
                    functools.partial(
                        make, depth=depth, seed=(self.settings.seed, length, depth, number)
                    ),
                    self.tokenizer,
                    tokens=length - answer_tokens,
                    smallest=smallest,
                )
                for depth, number in asked
            ]
            answers = self._answers(samples, answer_tokens, progress)
            found = [hits(a, s.references) for a, s in zip(answers, samples, strict=True)]
            return {
                **_share([hit for row in found for hit in row]),
                "grid": grid,
                "hits": found,
                "depths": [[round(d, 1) for d in sample.depths] for sample in samples],
                "example": {"references": samples[0].references, "answer": answers[0]},
            }

        yield Case(f"{name}/{length}", self._drawn(length), len(asked) * length, run)

    def _babilong(self, length: int) -> Iterator[Case]:
        count, seed = self.settings.samples * self.settings.depths, self.settings.seed
        prose = self.prose(length)
        for task in babilong.PROMPTS:

            def run(progress: Progress, task=task) -> dict:
                def make(size: int, number: int) -> needle.Sample:
                    return babilong.babilong_sample(
                        task, haystack_size=size, prose=prose, seed=(seed, length, number)
                    )

                samples = [
                    needle.fit(
                        functools.partial(make, number=number),
                        self.tokenizer,
                        tokens=length - babilong.ANSWER_TOKENS,
                        smallest=0,
                    )
                    for number in range(count)
                ]
                answers = self._answers(samples, babilong.ANSWER_TOKENS, progress)
                found = [
                    babilong.is_right(answer, sample.references[0], question_of(sample))
                    for answer, sample in zip(answers, samples, strict=True)
                ]
                example = {"references": samples[0].references, "answer": answers[0]}
                return {**_share(found), "example": example}

            yield Case(f"babilong/{task}/{length}", self._drawn(length), count * length, run)

    def _mqar(self, length: int) -> Iterator[Case]:
        count, seed = self.settings.samples * self.settings.depths, self.settings.seed
        vocab_size = self.streamer.model.config.vocab_size
        length -= length % 2

        def run(progress: Progress) -> dict:
            # One pair in sixteen tokens, as published, while there are keys enough.
            pairs = max(1, min(length // 16, vocab_size // 4))
            task = MQARConfig(vocab_size=vocab_size, sequence_length=length, pairs=pairs)
            batch = mqar_batch(task, batch_size=count, seed=(seed, length))
            scores = self.streamer.score(list(batch["tokens"]), progress=progress)
            predicted = np.stack([row.predicted for row in scores])
            given = np.take_along_axis(predicted, batch["query_positions"], axis=1)
            right = given == batch["answers"]
            edges = [1, *(16 << n for n in range(length.bit_length() - 3))]
            by_distance = accuracy_by_distance(right, batch["distances"], edges=edges)
            asked = [found for found in by_distance if found["queries"]]
            return {**_share(right.reshape(-1).tolist()), "pairs": pairs, "by_distance": asked}

        yield Case(f"mqar/{length}", self._drawn(length), count * length, run)

    def _drawn(self, length: int) -> dict:
        """What the samples of a case depend on."""
        values = self.settings
        return {
            "samples": values.samples,
            "depths": values.depths,
            "seed": values.seed,
            "prose": haystack.digest(self.prose(length)),
        }

    def _answers(
        self, samples: Sequence[needle.Sample], tokens: int, progress: Progress
    ) -> list[str]:
        begin, end = self.tokenizer.bos_id, self.tokenizer.eos_id
        prompts = [[begin, *self.tokenizer.encode(sample.prompt).tolist()] for sample in samples]
        answers = self.streamer.generate(
            prompts, max_tokens=tokens, is_over=lambda ids: end in ids, progress=progress
        )
        return [
            self.tokenizer.decode(ids[: ids.index(end)] if end in ids else ids) for ids in answers
        ]


def question_of(sample: needle.Sample) -> str:
    """The question at the end of a BABILong prompt."""
    return sample.prompt.rsplit("Question: ", 1)[1]


def _share(right: Sequence[bool]) -> dict:
    count = int(sum(right))
    return {
        "right": count,
        "trials": len(right),
        "share": count / len(right),
        "interval": wilson(count, len(right)),
    }
