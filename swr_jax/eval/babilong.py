"""BABILong (arXiv 2406.10149), qa1 to qa3: facts about a small world scattered in other text.

Instructions, template, labels and score are the published ones. The worlds are those of bAbI (arXiv
1502.05698): four persons walk between six places; in qa2 and qa3 they pick up, carry and put down
three objects. Questions:

    qa1  Where is Mary?                             her last place: one supporting fact
    qa2  Where is the football?                     of who has it, or left it there: two facts
    qa3  Where was the apple before the office?     the place before its present one: three facts

Stories are drawn here and not taken from bAbI's files. Every answer follows from what is told; in
qa3 the object has been in its present place only once, so that there is one "before".
"""

from collections.abc import Sequence

import numpy as np

from swr_jax.eval.needle import Sample

PERSONS = ("Mary", "John", "Daniel", "Sandra")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = ("apple", "football", "milk")
_MOVE = ("moved", "went", "journeyed", "travelled", "went back")
_TAKE = ("got", "took", "grabbed", "picked up")
_DROP = ("dropped", "discarded", "left", "put down")
# Sentences of a story, drawn evenly; more are told until there is something to ask.
_FACTS = {"qa1": (2, 10), "qa2": (4, 20), "qa3": (8, 40)}
# Published: 20 tokens of subwords. Only the first sentence counts, for which bytes need more.
ANSWER_TOKENS = 80

_TEMPLATE = (
    "{instruction}\n{examples}\n{post_prompt}\n"
    "<context>\n{context}\n</context>\nQuestion: {question}"
)
_CARRYING = (
    "If a person got an item in the first location and travelled to the second location the item "
    "is also in the second location. If a person dropped an item in the first location and moved "
    "to the second location the item remains in the first location"
)
PROMPTS = {
    "qa1": {
        "instruction": "I will give you context with the facts about positions of different "
        "persons hidden in some random text and a question. You need to answer the question based "
        "only on the information from the facts. If a person was in different locations, use the "
        "latest location to answer the question.",
        "examples": "<example>\nCharlie went to the hallway. Judith come back to the kitchen. "
        "Charlie travelled to balcony. Where is Charlie?\n"
        "Answer: The most recent location of Charlie is balcony.\n</example>\n\n"
        "<example>\nAlan moved to the garage. Charlie went to the beach. Alan went to the shop. "
        "Rouse travelled to balcony. Where is Alan?\n"
        "Answer: The most recent location of Alan is shop.\n</example>",
        "post_prompt": "Always return your answer in the following format: The most recent "
        "location of \u2019person\u2019 is \u2019location\u2019. Do not write anything else after "
        "that. ",
    },
    "qa2": {
        "instruction": "I give you context with the facts about locations and actions of different "
        "persons hidden in some random text and a question."
        "You need to answer the question based only on the information from the facts.\n"
        + _CARRYING
        + ".",
        "examples": "<example>\nCharlie went to the kitchen. Charlie got a bottle. Charlie moved "
        "to the balcony. Where is the bottle?\nAnswer: The bottle is in the balcony.\n</example>\n"
        "<example>\nAlan moved to the garage. Alan got a screw driver. Alan moved to the kitchen. "
        "Where is the screw driver?\nAnswer: The screw driver is in the kitchen.\n</example>",
        "post_prompt": "Always return your answer in the following format: The \u2019item\u2019 is "
        "in \u2019location\u2019. Do not write anything else after that.",
    },
    "qa3": {
        "instruction": "I give you context with the facts about locations and actions of different "
        "persons hidden in some random text and a question. "
        "You need to answer the question based only on the information from the facts.\n"
        + _CARRYING,
        "examples": "<example>\nJohn journeyed to the bedroom.Mary grabbed the apple. Mary went "
        "back to the bathroom. Daniel journeyed to the bedroom. Daniel moved to the garden. Mary "
        "travelled to the kitchen. Where was the apple before the kitchen?\n"
        "Answer: Before the kitchen the apple was in the bathroom.\n</example>\n"
        "<example>\nJohn went back to the bedroom. John went back to the garden. John went back to "
        "the kitchen. Sandra took the football. Sandra travelled to the garden. Sandra journeyed "
        "to the bedroom. Where was the football before the bedroom?\n"
        "Answer: Before the kitchen the football was in the garden.\n</example>",
        "post_prompt": "Always return your answer in the following format: Before the $location_1& "
        "the $item$ was in the $location_2$. Do not write anything else after that.",
    },
}


class _World:
    """Who is where and has what, as far as a reader of the story knows."""

    def __init__(self, rng: np.random.Generator, *, with_objects: bool):
        self._rng = rng
        self.place: dict[str, str] = {}
        self.holder: dict[str, str] = {}
        # Places in which each object is known to have been, in order, since it was first taken.
        self.trace: dict[str, list[str]] = {}
        self._lying = {}
        if with_objects:
            self._lying = {item: str(rng.choice(PLACES)) for item in OBJECTS}

    def tell(self) -> str:
        """Let somebody do something, and return the sentence that says so."""
        person = str(self._rng.choice(PERSONS))
        held = [item for item, holder in self.holder.items() if holder == person]
        here = [item for item, place in self._lying.items() if place == self.place.get(person)]
        actions = ["move"] + ["take"] * bool(here) + ["drop"] * bool(held)
        action = str(self._rng.choice(actions))
        if action == "move":
            places = [place for place in PLACES if place != self.place.get(person)]
            place = self.place[person] = str(self._rng.choice(places))
            for item in held:
                self.trace[item].append(place)
            return f"{person} {self._rng.choice(_MOVE)} to the {place}."
        item = str(self._rng.choice(here if action == "take" else held))
        if action == "take":
            del self._lying[item]
            self.holder[item] = person
            self.trace.setdefault(item, [self.place[person]])
            return f"{person} {self._rng.choice(_TAKE)} the {item} there."
        del self.holder[item]
        self._lying[item] = self.place[person]
        return f"{person} {self._rng.choice(_DROP)} the {item}."

    def questions(self, task: str) -> list[tuple[str, str]]:
        """Every question of the task that has an answer by now, with that answer."""
        if task == "qa1":
            return [(f"Where is {who}?", place) for who, place in self.place.items()]
        if task == "qa2":
            return [(f"Where is the {item}?", trace[-1]) for item, trace in self.trace.items()]
        return [
            (f"Where was the {item} before the {trace[-1]}?", trace[-2])
            for item, trace in self.trace.items()
            if len(trace) > 1 and trace.count(trace[-1]) == 1
        ]


def story(task: str, *, seed: int | Sequence[int]) -> tuple[list[str], str, str]:
    """Draw the facts of a story, a question about it and the answer, a place.

    Raises:
        ValueError: a task other than qa1, qa2, qa3.
    """
    if task not in _FACTS:
        raise ValueError(f"task={task!r}; it must be one of {', '.join(_FACTS)}")
    rng = np.random.default_rng(seed)
    world = _World(rng, with_objects=task != "qa1")
    low, high = _FACTS[task]
    facts = [world.tell() for _ in range(rng.integers(low, high + 1))]
    while not (questions := world.questions(task)):
        facts.append(world.tell())
    question, answer = questions[rng.integers(len(questions))]
    return facts, question, answer


def babilong_sample(
    task: str, *, haystack_size: int, prose: Sequence[str], seed: int | Sequence[int]
) -> Sample:
    """Draw a prompt; the same for the same arguments, on every machine.

    Args:
        task: "qa1", "qa2" or "qa3".
        haystack_size: sentences of other text, at least 0.
        prose: where they come from, from a sentence drawn at random onwards.
        seed: of NumPy's generator; a sequence such as (seed, number) names one of many samples.

    Returns:
        The prompt, the right place, and the depth of the last fact in per cent of the text.
    """
    facts, question, answer = story(task, seed=seed)
    rng = np.random.default_rng([*np.atleast_1d(seed), 1])
    first = rng.integers(len(prose))
    # The same share of the text stands before each fact, whatever the size of the haystack.
    places = np.sort((rng.random(len(facts)) * (haystack_size + 1)).astype(int))
    shown, told = [], 0
    for number in range(haystack_size + 1):
        while told < len(facts) and places[told] == number:
            shown.append(facts[told])
            told += 1
        if number < haystack_size:
            shown.append(prose[(first + number) % len(prose)])
    prompt = _TEMPLATE.format(**PROMPTS[task], context=" ".join(shown), question=question)
    depth = 100 * float(places[-1]) / max(haystack_size, 1)
    return Sample(prompt, (answer,), (depth,))


def is_right(answer: str, place: str, question: str) -> bool:
    """Whether the first sentence of an answer names the right place and no other.

    Places that the question names do not count, since they never are its answer. What follows a
    repeated <context> or <example> is left out with what follows the first full stop.
    """
    said = answer.lower().split(".")[0].split("<context>")[0].split("<example>")[0]
    named = {label for label in PLACES if label in said}
    asked = {label for label in PLACES if label in question.lower()}
    return named - asked == {place}
