"""A text ends before its stop string, in whatever pieces it comes, and shows nothing of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swr_jax.data import ByteTokenizer
from swr_jax.generate import Answer, StopStrings


def shown(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    watcher = StopStrings(stops)
    out = [watcher.push(piece) for piece in pieces]
    return [*out, watcher.flush()], watcher.found


def test_nothing_of_a_stop_string_leaks_over_borders():
    assert shown(["END"], ["ab", "cE", "N", "Dxy", "z"]) == (["ab", "c", "", "", "", ""], True)
    assert shown(["END"], ["ab", "cE", "N", "Exy"]) == (["ab", "c", "", "ENExy", ""], False)
    assert shown(["END"], ["abEN"]) == (["ab", "EN"], False)
    assert shown([], ["ab", "c"]) == (["ab", "c", ""], False)
    # What is held may begin a stop string anew.
    assert shown(["aab"], ["aa", "ab", "c"]) == (["", "a", "", ""], True)


alphabet = st.text("ab.", max_size=12)


@given(
    stops=st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3), pieces=st.lists(alphabet)
)
def test_pieces_do_not_matter(stops, pieces):
    text = "".join(pieces)
    # The first end of a stop string decides; of several that end there, the longest.
    ends = [n for n in range(1, len(text) + 1) if any(text[:n].endswith(s) for s in stops)]
    expected = text
    if ends:
        found = text[: ends[0]]
        expected = found[: -max(len(s) for s in stops if found.endswith(s))]
    out, was_found = shown(stops, pieces)
    assert "".join(out) == expected
    assert was_found == bool(ends)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="stop holds an empty string"):
        StopStrings(["a", ""])


def answered(ids: list[int], **options) -> tuple[str, str | None, int]:
    answer = Answer(ByteTokenizer(), [256], **({"max_tokens": 100} | options))
    text = ""
    for token in ids:
        text += answer.push(token)
        if answer.finish:
            break
    return text, answer.finish, answer.tokens


def test_an_answer_knows_why_it_ended():
    eos = ByteTokenizer().eos_id
    assert answered([*b"ab", eos, *b"c"]) == ("ab", "stop", 3)
    assert answered([*b"abc"], max_tokens=2) == ("ab", "length", 2)
    assert answered([*b"a\nb\nc"], stop=["b\n"]) == ("a\n", "stop", 4)
    assert answered([*b"ab"]) == ("ab", None, 2)
    # What is held back when it ends is shown, characters that were cut as such.
    assert answered([*b"aEN"], stop=["END"], max_tokens=3) == ("aEN", "length", 3)
    assert answered([*b"a\xe7\xaa", eos]) == ("a\N{REPLACEMENT CHARACTER}", "stop", 4)
    assert answered([*b"a\xc3", eos], stop=["\N{REPLACEMENT CHARACTER}"]) == ("a", "stop", 3)
