"""A conversation is one document, of which nothing is read twice."""

import pytest
from generation_models import make_model

from swr_jax.data import ByteTokenizer
from swr_jax.generate import GREEDY, Conversation, Sampling, SavedStreamError, generate_text

TOKENIZER = ByteTokenizer()
SAMPLING = Sampling(temperature=0.9, seed=0)


def model():
    return make_model("phalanx", "attention")


def say(conversation: Conversation, text: str, **options) -> str:
    conversation.read(text)
    return "".join(conversation.answer(**({"max_tokens": 12, "sampling": GREEDY} | options)))


def test_the_first_answer_is_that_of_generate_text():
    expected = "".join(generate_text(model(), TOKENIZER, "def", max_tokens=12, temperature=0.9))
    assert say(Conversation(model(), TOKENIZER), "def", sampling=SAMPLING) == expected


def test_later_turns_continue_the_whole_document():
    # Ids, not text: what a model has written need not be the encoding of its text.
    conversation = Conversation(model(), TOKENIZER)
    say(conversation, "one two", max_tokens=5)
    assert conversation.length == 1 + 7 + 5
    say(conversation, "three", max_tokens=4)
    assert conversation.length == 22


def test_an_answer_can_be_cut_short_between_two_tokens():
    conversation = Conversation(model(), TOKENIZER)
    conversation.read("ab")
    counts = iter([False, False, True])
    list(conversation.answer(max_tokens=50, sampling=GREEDY, is_over=lambda: next(counts)))
    assert conversation.length == 3 + 3


def test_saved_it_goes_on_where_it_stopped(tmp_path):
    whole = Conversation(model(), TOKENIZER)
    first = say(whole, "def main(", sampling=SAMPLING)
    expected = say(whole, "x", sampling=SAMPLING)
    before = Conversation(model(), TOKENIZER, max_length=60)
    assert say(before, "def main(", sampling=SAMPLING) == first
    before.save(tmp_path / "talk.npz")
    after = Conversation(model(), TOKENIZER, max_length=70, saved=tmp_path / "talk.npz")
    after.reserve(60)
    assert say(after, "x", sampling=SAMPLING) == expected
    other = make_model("phalanx", "attention", seed=9)
    with pytest.raises(SavedStreamError, match="other weights"):
        Conversation(other, TOKENIZER, saved=tmp_path / "talk.npz")


def test_it_says_when_there_is_no_more_room():
    conversation = Conversation(model(), TOKENIZER, max_length=16)
    with pytest.raises(ValueError, match="exceed max_length=16"):
        say(conversation, "0123456789", max_tokens=12)
