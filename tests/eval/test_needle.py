"""Needle prompts read as the published tasks do, against a plain reading of their text."""

import re

import pytest

from swr_jax.data import ByteTokenizer
from swr_jax.eval.haystack import ADJECTIVES, NOUNS, digest, draw_distinct, prose, shorten
from swr_jax.eval.needle import (
    NOISE,
    VARIANTS,
    fit,
    hits,
    needle_sample,
    passkey_hits,
    passkey_sample,
)

PROSE = [f"Sentence number {word} stands here." for word in ("one", "two", "three", "four", "five")]
NEEDLE = re.compile(r"One of the special magic (\w+) for (\S+) is: (\S+)\.")
NUMBER, UUID = r"[1-9]\d{6}", r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
WORDS = r"[a-z]+-[a-z]+"
# haystack, keys, values, needles that are planted, values that are asked for
TASKS = {
    "single_1": (NOISE, WORDS, NUMBER, 1, 1),
    "single_2": (PROSE[0], WORDS, NUMBER, 1, 1),
    "single_3": (PROSE[0], WORDS, UUID, 1, 1),
    "multikey_1": (PROSE[0], WORDS, NUMBER, 4, 1),
    "multikey_2": (None, WORDS, NUMBER, 1, 1),
    "multikey_3": (None, UUID, UUID, 1, 1),
    "multivalue": (PROSE[0], WORDS, NUMBER, 4, 4),
    "multiquery": (PROSE[0], WORDS, NUMBER, 4, 4),
}


def sample_of(name: str, **options):
    defaults = {"haystack_size": 30, "prose": PROSE, "seed": (0, 7)}
    return needle_sample(VARIANTS[name], **(defaults | options))


def test_there_are_eight_variants():
    assert set(VARIANTS) == set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_the_values_asked_for_are_those_that_the_text_gives_the_keys(name):
    haystack, key_form, value_form, planted, asked = TASKS[name]
    sample = sample_of(name)
    kind = "uuids" if value_form is UUID else "numbers"
    found = NEEDLE.findall(sample.prompt)
    assert len(found) == planted + (30 if haystack is None else 0)
    values = {}
    for told, key, value in found:
        assert told == kind
        assert re.fullmatch(key_form, key)
        assert re.fullmatch(value_form, value)
        values.setdefault(key, []).append(value)
    query = sample.prompt.rsplit(" for ", 1)[1].split(" mentioned in ")[0]
    queried = re.split(r", and |, ", query)
    expected = [value for key in queried for value in values[key]]
    assert sorted(sample.references) == sorted(expected)
    assert len(expected) == asked
    if haystack is not None:
        assert sample.prompt.count(haystack) == (30 if haystack is NOISE else 30 // len(PROSE))


def test_the_prompt_of_one_value_is_the_published_one():
    sample = sample_of("single_1", haystack_size=2, depth=50)
    (key, value), noise = NEEDLE.search(sample.prompt).groups()[1:], NOISE
    assert noise.startswith("The grass is green. The sky is blue. The sun is yellow.")
    assert sample.prompt == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n"
        f"{noise}\nOne of the special magic numbers for {key} is: {value}.\n{noise}\n"
        f"What is the special magic number for {key} mentioned in the provided text? "
        f"The special magic number for {key} mentioned in the provided text is"
    )


def test_the_prompt_of_several_values_is_the_published_one():
    sample = sample_of("multiquery", haystack_size=4)
    head, rest = sample.prompt.split("\n", 1)
    text, question = rest.rsplit("\n", 1)
    keys = [key for _, key, _ in NEEDLE.findall(text)]
    query = re.search("magic numbers for (.*?) mentioned", question)[1]
    first, second, third, fourth = re.split(r", and |, ", query)
    assert {first, second, third, fourth} == set(keys)
    assert head == (
        "Some special magic numbers are hidden within the following text. Make sure to memorize "
        "it. I will quiz you about the numbers afterwards."
    )
    query = f"{first}, {second}, {third}, and {fourth}"
    assert question == (
        f"What are all the special magic numbers for {query} mentioned in the provided text? "
        f"The special magic numbers for {query} mentioned in the provided text are"
    )


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("depth", [0, 30, 100])
def test_the_first_needle_in_question_stands_at_the_depth(name, depth):
    sample = sample_of(name, depth=depth)
    assert sample.depths[0] == depth
    before = sample.prompt.split("afterwards.\n")[1].split(sample.references[0])[0]
    if TASKS[name][0] is None:
        stands_before = len(NEEDLE.findall(before))
    elif TASKS[name][0] is NOISE:
        stands_before = before.count(NOISE)
    else:
        stands_before = before.count("Sentence number")
    assert stands_before == 30 * depth / 100


def test_without_a_depth_needles_stand_anywhere():
    depths = {sample_of("single_2", haystack_size=200, seed=s).depths[0] for s in range(300)}
    assert len(depths) > 30  # of forty
    assert min(depths) == 0
    assert max(depths) == 100


def test_a_seed_names_a_sample():
    assert sample_of("multikey_2") == sample_of("multikey_2")
    prompts = {sample_of("multikey_2", seed=(0, n)).prompt for n in range(20)}
    assert len(prompts) == 20


@pytest.mark.parametrize("name", TASKS)
def test_the_haystack_is_as_long_as_fits(name):
    tokenizer = ByteTokenizer()

    def make(size: int):
        return sample_of(name, haystack_size=size, depth=50)

    sample = fit(make, tokenizer, tokens=4000, smallest=4)
    assert 1 + len(tokenizer.encode(sample.prompt)) <= 4000
    sentence = max(len(NOISE), 130)
    assert 1 + len(tokenizer.encode(sample.prompt)) > 4000 - sentence
    with pytest.raises(ValueError, match="tokens=300 are left for it: choose a longer context"):
        fit(make, tokenizer, tokens=300, smallest=4)


def test_the_score_is_the_share_of_references_in_the_answer():
    assert hits(" 1234567, and 89.", ["1234567", "7654321", "89"]) == [True, False, True]
    assert hits("it is ABCD-ef", ["abcd-EF"]) == [True]


def test_passkey_is_the_published_prompt():
    sample = passkey_sample(haystack_size=4, depth=25, seed=1)
    (key,) = sample.references
    assert 1 <= int(key) <= 50_000
    assert sample.prompt == (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
        "them. I will quiz you about the important information there.\n"
        f"{NOISE}\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
        f"{NOISE} {NOISE} {NOISE}\nWhat is the pass key? The pass key is"
    )
    assert sample.depths == (25.0,)
    assert passkey_hits(f" {key}. Or 1", [key]) == [True]
    assert passkey_hits(f" {key}0", [key]) == [False]
    assert passkey_hits("none", [key]) == [False]


def test_words_are_words_and_enough():
    for words, least in ((ADJECTIVES, 150), (NOUNS, 200)):
        assert len(words) == len(set(words)) > least
        assert all(re.fullmatch("[a-z]+", word) for word in words)


def test_shortened_prose_does_not_depend_on_what_it_was_shortened_from():
    for characters in (1, 31, 32, 100, 10_000):
        short = shorten(PROSE, characters=characters)
        assert short == PROSE[: len(short)]
        assert shorten(PROSE[: len(short) + 1], characters=characters) == short
        assert len(short) == 5 or sum(len(s) + 1 for s in short) >= characters
        assert sum(len(s) + 1 for s in short[:-1]) < characters


def test_prose_is_sentences_of_docstrings_and_texts(tmp_path):
    (tmp_path / "a.py").write_text(
        'def f(x):\n    """Return what was given, unchanged and whole.\n\n    >>> f(1) == 1\n    '
        'True\n    """\n    return x  # A comment is no part of the prose here.\n'
    )
    (tmp_path / "b.txt").write_text(
        "A first sentence is here\nand goes on. Short one. The last sentence ends with it!\n\n"
        "x = y[0] is no sentence at all, and no prose.\n"
    )
    sentences = prose(str(tmp_path))
    assert sentences == [
        "Return what was given, unchanged and whole.",
        "A first sentence is here and goes on.",
        "The last sentence ends with it!",
    ]
    assert prose(str(tmp_path), characters=10) == sentences[:1]
    assert digest(sentences) != digest(sentences[:1])
    (tmp_path / "b.txt").write_text("x = 1")
    (tmp_path / "a.py").unlink()
    with pytest.raises(ValueError, match="holds no sentence of plain English"):
        prose(str(tmp_path))


def test_errors_name_argument_and_rule():
    with pytest.raises(ValueError, match="haystack_size=3; it must be at least 4"):
        sample_of("multivalue", haystack_size=3)
    with pytest.raises(ValueError, match="depth=101"):
        sample_of("single_1", depth=101)
    with pytest.raises(ValueError, match="kind='colours'"):
        draw_distinct("colours", 1, None)
    with pytest.raises(ValueError, match="there are 34,720 words"):
        draw_distinct("words", 20_000, None)
