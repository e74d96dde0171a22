"""Needles in haystacks: the eight variants of RULER (arXiv 2404.06654), and passkey retrieval.

A needle is a sentence that gives a key its value. The prompt shows needles amid a haystack, asks
for the values of one key or of several, and begins the answer. RULER's templates, variants, depths
and score (the share of the right values that the answer contains) are the published ones, and so is
the passkey's prompt (arXiv 2305.16300). Ours are the words of the keys, the prose (local text), and
three rules: keys differ from each other, haystacks are as long as fits to the sentence, and prose
that is too short begins again.

Depth is the share of the haystack, in per cent, that stands before a needle. Where a depth is asked
for, the first needle that the question is about stands there; all others are drawn as RULER does.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np

from swr_jax.data import Tokenizer
from swr_jax.eval.errors import TaskError
from swr_jax.eval.haystack import draw, draw_distinct

NEEDLE = "One of the special magic {type} for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_QUESTION = (
    "Some special magic {type} are hidden within the following text. Make sure to memorize it. I "
    "will quiz you about the {type} afterwards.\n{context}\nWhat are all the special magic {type} "
    "for {query} mentioned in the provided text?"
)
_ANSWER = " The special magic {type} for {query} mentioned in the provided text are"
_QUESTION_OF_ONE = (
    "A special magic {type} is hidden within the following text. Make sure to memorize it. I "
    "will quiz you about the {type} afterwards.\n{context}\nWhat is the special magic {type} "
    "for {query} mentioned in the provided text?"
)
_ANSWER_OF_ONE = " The special magic {type} for {query} mentioned in the provided text is"
# Tokens of the answer, as published.
ANSWER_TOKENS = 128
DEPTHS = np.round(np.linspace(0, 100, num=40)).astype(int)

_PASSKEY = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n{before}\nThe pass key is {key}. "
    "Remember it. {key} is the pass key.\n{after}\nWhat is the pass key? The pass key is"
)
PASSKEY_ANSWER_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class Variant:
    """One of RULER's tasks.

    haystack: "noise", "prose" or "needles". keys, values: kinds, as `haystack.draw` has them.
    num_keys: keys with needles of their own. num_values: needles per key. num_queries: keys asked
    for.
    """

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1

    @property
    def num_needles(self) -> int:
        """Needles that answer somebody's question, here or not; distractors of a haystack apart."""
        return self.num_keys * self.num_values


VARIANTS = {
    "single_1": Variant("noise"),
    "single_2": Variant("prose"),
    "single_3": Variant("prose", values="uuids"),
    "multikey_1": Variant("prose", num_keys=4),
    "multikey_2": Variant("needles"),
    "multikey_3": Variant("needles", keys="uuids", values="uuids"),
    "multivalue": Variant("prose", num_values=4),
    "multiquery": Variant("prose", num_keys=4, num_queries=4),
}


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt, the values that its answer should contain, and the depth of each, in per cent."""

    prompt: str
    references: tuple[str, ...]
    depths: tuple[float, ...]


def needle_sample(
    variant: Variant,
    *,
    haystack_size: int,
    prose: Sequence[str],
    depth: float | None = None,
    seed: int | Sequence[int],
) -> Sample:
    """Draw a prompt; the same for the same arguments, on every machine.

    Args:
        variant: the task.
        haystack_size: sentences of the haystack, at least as many as there are needles.
        prose: sentences, of which haystacks of prose take the first, again and again.
        depth: where the first needle in question stands, in per cent; None: drawn like the others.
        seed: of NumPy's generator; a sequence such as (seed, number) names one of many samples.

    Raises:
        ValueError: fewer sentences than needles, or a depth out of range.
    """
    rng = np.random.default_rng(seed)
    count = variant.num_needles
    if haystack_size < count:
        raise ValueError(
            f"haystack_size={haystack_size}; it must be at least {count}, the number of needles: "
            "choose a longer context"
        )
    if depth is not None and not 0 <= depth <= 100:
        raise ValueError(f"depth={depth}; it must be between 0 and 100 per cent")
    keys = draw_distinct(variant.keys, variant.num_keys, rng)
    values = draw_distinct(variant.values, count, rng)
    owners = np.repeat(np.arange(variant.num_keys), variant.num_values)
    asked = rng.permutation(variant.num_keys)[: variant.num_queries]

    if variant.haystack == "prose":
        sentences = [prose[i % len(prose)] for i in range(haystack_size)]
        places = haystack_size * rng.choice(DEPTHS, count, replace=False) // 100
    elif variant.haystack == "noise":
        sentences = [NOISE] * haystack_size
        places = rng.choice(haystack_size, count, replace=False)
    else:
        others = draw_distinct(variant.keys, haystack_size, rng, besides=keys)
        sentences = [
            NEEDLE.format(type=variant.values, key=key, value=draw(variant.values, rng))
            for key in others
        ]
        places = rng.choice(haystack_size, count, replace=False)
    rng.shuffle(places)
    first = int(np.flatnonzero(owners == asked[0])[0])
    if depth is not None:
        places[first] = round(haystack_size * depth / 100)

    hidden: dict[int, list[str]] = {}
    for owner, value, place in zip(owners, values, places, strict=True):
        needle = NEEDLE.format(type=variant.values, key=keys[owner], value=value)
        hidden.setdefault(int(place), []).append(needle)
    shown = [
        sentence
        for place in range(haystack_size + 1)
        for sentence in (*hidden.get(place, ()), *sentences[place : place + 1])
    ]
    context = (" " if variant.haystack == "prose" else "\n").join(shown)

    one = variant.num_queries * variant.num_values == 1
    template = _QUESTION_OF_ONE + _ANSWER_OF_ONE if one else _QUESTION + _ANSWER
    queries = [keys[owner] for owner in asked]
    query = queries[0] if len(queries) == 1 else f"{', '.join(queries[:-1])}, and {queries[-1]}"
    wanted = [n for owner in asked for n in np.flatnonzero(owners == owner)]
    return Sample(
        prompt=template.format(
            type=variant.values[:-1] if one else variant.values, context=context, query=query
        ),
        references=tuple(values[n] for n in wanted),
        depths=tuple(100 * float(places[n]) / haystack_size for n in wanted),
    )


def passkey_sample(*, haystack_size: int, depth: float | None = None, seed) -> Sample:
    """Draw a passkey prompt with `haystack_size` repetitions of the filler; as `needle_sample`."""
    rng = np.random.default_rng(seed)
    key = str(rng.integers(1, 50_001))
    before = rng.integers(haystack_size + 1) if depth is None else haystack_size * depth / 100
    before = round(before)
    filler = [" ".join([NOISE] * n) for n in (before, haystack_size - before)]
    prompt = _PASSKEY.format(key=key, before=filler[0], after=filler[1])
    return Sample(prompt, (key,), (100 * before / haystack_size,))


def fit(
    make: Callable[[int], Sample], tokenizer: Tokenizer, *, tokens: int, smallest: int = 1
) -> Sample:
    """Return the longest sample that `make` gives of at most `tokens` tokens, bos included.

    Args:
        make: a sample from the size of its haystack, longer with size.
        tokenizer: counts.
        tokens: bound of the prompt.
        smallest: least size that `make` takes.

    Raises:
        TaskError: not even the smallest haystack fits; the message says how long that is.
    """

    def size_of(sample: Sample) -> int:
        return 1 + len(tokenizer.encode(sample.prompt))

    best, low, high = make(smallest), smallest, 2 * smallest + 1
    if size_of(best) > tokens:
        raise TaskError(
            f"the shortest prompt has {size_of(best)} tokens, and tokens={tokens} are left for it: "
            "choose a longer context"
        )
    while size_of(sample := make(high)) <= tokens:
        best, low, high = sample, high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if size_of(sample := make(middle)) <= tokens:
            best, low = sample, middle
        else:
            high = middle
    return best


def hits(answer: str, references: Sequence[str]) -> list[bool]:
    """Which references an answer contains, in upper or lower case; their share is RULER's score."""
    return [reference.lower() in answer.lower() for reference in references]


def passkey_hits(answer: str, references: Sequence[str]) -> list[bool]:
    """Whether the first number of an answer is the pass key."""
    number = re.search(r"\d+", answer)
    return [number is not None and number[0] == reference for reference in references]
