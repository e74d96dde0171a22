"""What needles are hidden in and made of: prose from local text, word pairs, numbers, UUIDs."""

import ast
import hashlib
import re
import uuid
import warnings
from collections.abc import Sequence

import numpy as np

from swr_jax.data import open_source
from swr_jax.data.tokenizers import text_to_bytes
from swr_jax.eval.errors import TaskError

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
# A sentence: begins with a capital, ends as sentences do, and holds words and their punctuation.
_SENTENCE = re.compile(r"[A-Z][A-Za-z0-9 ,;:'\"()\-]*[.!?]")
_SHORTEST, _LONGEST = 30, 300  # characters

_ADJECTIVES = """
able ancient autumn bitter black blue bold brave brief bright broad bronze calm careful cheerful
clean clear clever cloudy cold cool crimson crisp curious damp dark deep distant dry early easy
empty even fair faint fast fierce fine firm flat fond free fresh full gentle giant glad golden
good grand gray great green happy hard hidden high hollow honest huge humble icy idle jolly keen
kind large late lazy light little lively lone long loud low loyal lucky main mellow mild misty
modern narrow neat new nimble noble odd old open orange pale patient plain polite proud purple
quick quiet rapid rare red rich ripe rough round royal rural rusty sandy secret sharp short shy
silent silver simple slim slow small smooth snowy soft solid spare steady steep still stormy
strange strong sturdy sunny sweet swift tall tame tender thick thin tidy tiny tough vast violet
vivid warm wary weary wet white whole wide wild windy wise wooden yellow young
"""
_NOUNS = """
acorn anchor angle apple apron arch arrow badge baker banner barn barrel basin basket beach beacon
bell bench berry bird blanket boat book bottle bowl branch brick bridge brook broom bucket butter
button cabin candle canyon carpet castle cave cedar chair chalk chapel cherry circle cliff clock
cloud coast coin comet copper coral corner cotton cradle crane creek crown curtain daisy desert
desk door dragon dream drum eagle ember engine falcon farm feather fence ferry field fig finch
flame flute forest fountain fox garden garlic gate giraffe glacier glove goose grape grove guitar
hammer harbor hat hawk hazel hill honey horn horse island ivory jacket jar jewel kettle key kite
ladder lagoon lake lamp lantern leaf lemon letter lion lizard lock maple marble market meadow
melon mill mirror moon moss mountain needle nest oak oasis ocean olive onion orchard otter owl
paddle palace panda paper parrot path peach pearl pebble pencil pepper piano pillow pine planet
plate pond poplar pumpkin quilt rabbit raft rain ribbon ridge river road robin rocket roof root
rope rose saddle sail salmon shadow shell shore shovel sparrow spoon spring square stone storm
street summit swan table teapot temple thimble thunder tiger tower trail tree trumpet tulip tunnel
turtle valley velvet village violin wagon walnut watch wave well wheel whistle willow window wolf
"""
ADJECTIVES, NOUNS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split())


def prose(source: str = "python", *, characters: int = 1 << 20) -> list[str]:
    """Return sentences of local text, in order, until they have `characters` (fewer if it ends).

    Args:
        source: as for `swr_jax.data.open_source`; of Python files the docstrings are read. "python"
            is what Python's own library says of itself.
        characters: of all sentences together.

    Raises:
        ValueError: no sentence there, or what `open_source` raises.
    """
    documents = open_source(source)
    sentences, total, seen = [], 0, set()
    for number in range(len(documents)):
        for paragraph in _paragraphs(documents[number], source):
            for sentence in _SENTENCE_END.split(" ".join(paragraph.split())):
                length = len(sentence)
                if not _SHORTEST <= length <= _LONGEST or not _SENTENCE.fullmatch(sentence):
                    continue
                if sentence not in seen:
                    seen.add(sentence)
                    sentences.append(sentence)
                    total += length + 1
        if total >= characters:
            break
    if not sentences:
        raise ValueError(f"prose={source!r} holds no sentence of plain English: name other text")
    return sentences


def _paragraphs(document: bytes | np.ndarray, source: str) -> list[str]:
    if isinstance(document, np.ndarray):
        raise ValueError(f"prose={source!r} holds token ids; a haystack needs text")
    text = text_to_bytes(document).decode("utf-8", "replace")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes in other people's sources
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return text.split("\n\n")
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [paragraph for text in found if text for paragraph in text.split("\n\n")]


def shorten(sentences: Sequence[str], *, characters: int) -> list[str]:
    """Return the first sentences that have `characters` together (all if they have fewer)."""
    ends = np.cumsum([len(sentence) + 1 for sentence in sentences])
    return list(sentences[: int(np.searchsorted(ends, characters)) + 1])


def digest(sentences: Sequence[str]) -> str:
    """Tell haystacks apart: Python versions, and users, have different text."""
    return hashlib.sha256("\n".join(sentences).encode()).hexdigest()[:12]


def draw(kind: str, rng: np.random.Generator) -> str:
    """Draw "words" (adjective-noun), "numbers" (7 digits) or "uuids" (version 4).

    Raises:
        ValueError: another kind.
    """
    if kind == "words":
        adjective, noun = rng.integers(len(ADJECTIVES)), rng.integers(len(NOUNS))
        return f"{ADJECTIVES[adjective]}-{NOUNS[noun]}"
    if kind == "numbers":
        return str(rng.integers(10**6, 10**7))
    if kind == "uuids":
        return str(uuid.UUID(bytes=rng.bytes(16), version=4))
    raise ValueError(f"kind={kind!r}; it must be words, numbers or uuids")


def draw_distinct(
    kind: str, count: int, rng: np.random.Generator, *, besides: Sequence[str] = ()
) -> list[str]:
    """Draw `count` different ones, none of them in `besides`.

    Raises:
        TaskError: there are not so many.
        ValueError: another kind.
    """
    most = {"words": len(ADJECTIVES) * len(NOUNS), "numbers": 9 * 10**6}.get(kind)
    if most is not None and 2 * (count + len(besides)) > most:
        raise TaskError(
            f"count={count}; there are {most:,} {kind} and at most half of them are drawn: choose "
            "uuids, or a shorter context"
        )
    found: dict[str, None] = {}
    while len(found) < count:
        one = draw(kind, rng)
        if one not in besides:
            found[one] = None
    return list(found)
