"""Every story has the answer that a reader who keeps account of it gives."""

import re

import pytest

from swr_jax.eval.babilong import PLACES, PROMPTS, babilong_sample, is_right, story

MOVE = re.compile(r"(\w+) (?:moved|went|journeyed|travelled|went back) to the (\w+)\.")
TAKE = re.compile(r"(\w+) (?:got|took|grabbed|picked up) the (\w+) there\.")
DROP = re.compile(r"(\w+) (?:dropped|discarded|left|put down) the (\w+)\.")
PROSE = [f"Nothing of note happened on day {number}." for number in range(50)]


def read(facts: list[str]) -> tuple[dict, dict]:
    """Where persons are, and in which places objects were since they were taken, told anew."""
    where: dict[str, list[str]] = {}
    moves = []  # (time, person, place), (time, object, its holder or None)
    holds = []
    for time, fact in enumerate(facts):
        if match := MOVE.fullmatch(fact):
            moves.append((time, match[1], match[2]))
            where.setdefault(match[1], []).append(match[2])
        elif match := TAKE.fullmatch(fact):
            holds.append((time, match[2], match[1]))
        else:
            match = DROP.fullmatch(fact)
            holds.append((time, match[2], None))
    traces: dict[str, list[str]] = {}
    for item in {item for _, item, _ in holds}:
        changes = [(time, holder) for time, name, holder in holds if name == item]
        trace = traces[item] = []
        for (begin, holder), end in zip(
            changes, [time for time, _ in changes[1:]] + [len(facts)], strict=True
        ):
            if holder is None:
                continue
            before = [place for time, who, place in moves if who == holder and time < begin]
            after = [place for time, who, place in moves if who == holder and begin < time < end]
            for place in (before[-1], *after):
                if not trace or trace[-1] != place:
                    trace.append(place)
    return {who: places[-1] for who, places in where.items()}, traces


def answer_of(facts: list[str], question: str) -> str:
    persons, traces = read(facts)
    if match := re.fullmatch(r"Where was the (\w+) before the (\w+)\?", question):
        trace = traces[match[1]]
        assert trace.count(match[2]) == 1  # else there are two "before"
        assert trace[-1] == match[2]
        return trace[-2]
    match = re.fullmatch(r"Where is (the )?(\w+)\?", question)
    return traces[match[2]][-1] if match[1] else persons[match[2]]


@pytest.mark.parametrize("task", ["qa1", "qa2", "qa3"])
def test_the_answer_is_that_of_an_attentive_reader(task):
    seen = set()
    for seed in range(300):
        facts, question, answer = story(task, seed=seed)
        assert question.startswith("Where was the" if task == "qa3" else "Where is")
        assert ("the " in question) == (task != "qa1")
        assert answer == answer_of(facts, question)
        seen.add(answer)
    assert seen == set(PLACES)


def test_qa1_is_told_in_moves_alone():
    assert all(MOVE.fullmatch(fact) for seed in range(50) for fact in story("qa1", seed=seed)[0])


@pytest.mark.parametrize("task", ["qa1", "qa2", "qa3"])
@pytest.mark.parametrize("size", [0, 40])
def test_facts_are_scattered_in_order(task, size):
    sample = babilong_sample(task, haystack_size=size, prose=PROSE, seed=(3, 5))
    facts, question, answer = story(task, seed=(3, 5))
    instruction, rest = sample.prompt.split("\n<context>\n")
    context, asked = rest.split("\n</context>\nQuestion: ")
    parts = [PROMPTS[task][name] for name in ("instruction", "examples", "post_prompt")]
    assert instruction == "\n".join(parts)
    assert (asked, sample.references) == (question, (answer,))
    sentences = re.split(r"(?<=\.) ", context)
    told = [sentence for sentence in sentences if sentence not in PROSE]
    assert told == facts
    assert len(sentences) == size + len(facts)
    if size:
        places = [i for i, sentence in enumerate(sentences) if sentence not in PROSE]
        assert places[-1] - places[0] >= len(facts)  # other text between them


def test_samples_differ_and_come_back():
    prompts = [
        babilong_sample("qa2", haystack_size=9, prose=PROSE, seed=(0, n)).prompt for n in range(20)
    ]
    assert len(set(prompts)) == 20
    assert prompts[4] == babilong_sample("qa2", haystack_size=9, prose=PROSE, seed=(0, 4)).prompt


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("The most recent location of Mary is Kitchen. Then the garden.", True),
        ("kitchen", True),
        ("kitchen or garden", False),
        ("I do not know", False),
        ("bathroom", False),
        ("kitchen<example>garden", True),
        ("Before the office the apple was in the kitchen", True),  # the question names the office
    ],
)
def test_right_answers_name_the_place_and_no_other(answer, right):
    assert is_right(answer, "kitchen", "Where was the apple before the office?") == right


def test_unknown_tasks_are_refused():
    with pytest.raises(ValueError, match="task='qa4'; it must be one of qa1, qa2, qa3"):
        story("qa4", seed=0)
