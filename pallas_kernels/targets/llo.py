"""What a TPU kernel's final schedule says: bundles of every loop, trip counts, spills, units used.

libtpu's text has one VLIW bundle per line or more,

    0x27 LB: >> { %s440_s3 = sshll.u32 %s691_s28, 5  ;;  ... }

where ">" counts the loops around the bundle and "LB" marks the first bundle of a loop's body. A
core issues one bundle a cycle, so bundles x trip counts are the cycles of the schedule. Waits for
DMAs and semaphores do not appear; predicated regions count as if they always ran.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence

_BUNDLE = re.compile(
    r"^\s*(?:0x)?(?P<address>[0-9a-f]+)\s+(?P<keys>(?:[A-Z]{2}[:,]?\s*)*):?\s*(?P<marks>>*)\s*\{"
)
_EXIT_TEST = re.compile(
    r"= scmp\.(?P<comparison>\w+)\.\w+(?:\.totalorder)?(?:\s*\([^)]*\),?)?\s+(?P<counter>%\w+), "
    r"(?P<bound>-?\d+|%\w+) /\* loop exit test"
)
_ALLOCATION = re.compile(
    r"^\s*(?P<name>#allocation\w+) \[.*space=vmem, size = 0x(?P<size>[0-9a-f]+)"
)
_WORD = 1 << 32
REGISTER_BYTES = 8 * 128 * 4  # one vector register


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of the schedule, without the loops inside it.

    Attributes:
        address: of the first bundle of its body.
        parent: index of the loop around it among the kernel's loops; None: outermost.
        depth: 1 for an outermost loop.
        bundles: of one turn.
        known_trip_count: the count that the schedule states; None: it depends on a value.
        used: slots filled in one turn, by unit.
    """

    address: int
    parent: int | None
    depth: int
    bundles: int
    known_trip_count: int | None
    used: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A kernel's final schedule.

    Attributes:
        loops: in order of address.
        bundles: outside all loops.
        used: slots filled outside all loops, by unit.
        capacity: slots of a bundle, by unit.
        spill_slots: vector stores to and loads from spill slots in the text.
        spill_bytes: VMEM of the spill slots.
        scalar_spills: values that the scalar core keeps in its memory for want of registers.
    """

    loops: tuple[Loop, ...]
    bundles: int
    used: dict[str, int]
    capacity: dict[str, int]
    spill_slots: int
    spill_bytes: int
    scalar_spills: int


@dataclasses.dataclass
class _Bundle:
    address: int
    starts_loop: bool
    depth: int
    text: str


def parse(bundles: str, utilization: str) -> Schedule:
    """Reads a kernel's `final_bundles` and `final_hlo-static-per-bundle-utilization` texts.

    Raises:
        ValueError: they are not of one kernel, or not what this module knows.
    """
    schedule = _read(bundles)
    capacity, rows = _read_utilization(utilization)
    if not schedule or len(schedule) != len(rows):
        raise ValueError(
            f"bundles, utilization: {len(schedule)} bundles but utilization of {len(rows)}"
        )
    owners, parents, addresses = _loops(schedule)
    definitions = _scalar_definitions(bundles)

    def used(owner: int | None) -> dict[str, int]:
        owned = [row for row, place in zip(rows, owners, strict=True) if place == owner]
        return {unit: sum(row[column] for row in owned) for column, unit in enumerate(capacity)}

    loops: list[Loop] = []
    for index, parent in enumerate(parents):
        own = [bundle for bundle, owner in zip(schedule, owners, strict=True) if owner == index]
        depth, ancestor = 1, parent
        while ancestor is not None:
            depth, ancestor = depth + 1, parents[ancestor]
        loops.append(
            Loop(
                address=addresses[index],
                parent=parent,
                depth=depth,
                bundles=len(own),
                known_trip_count=_trip_count("\n".join(b.text for b in own), definitions),
                used=used(index),
            )
        )
    spills = [unit for unit in capacity if unit.endswith((":SPILL", ":FILL"))]
    columns = [list(capacity).index(unit) for unit in spills]
    return Schedule(
        loops=tuple(loops),
        bundles=sum(owner is None for owner in owners),
        used=used(None),
        capacity=capacity,
        spill_slots=sum(row[column] for row in rows for column in columns),
        spill_bytes=REGISTER_BYTES
        * len(set(re.findall(r"\[vmem:\[(#allocation\w*_spill)\]", bundles))),
        scalar_spills=len(re.findall(r"sst \[smem:\[#allocation\w*_spill\]", bundles)),
    )


def vmem_bytes(text: str) -> int:
    """Bytes of VMEM for windows and scratch, by a text that lists a kernel's allocations."""
    sizes = {
        match["name"]: int(match["size"], 16)
        for line in text.splitlines()
        if (match := _ALLOCATION.match(line))
    }
    return sum(sizes.values())


def _read(text: str) -> list[_Bundle]:
    found: list[_Bundle] = []
    for line in text.splitlines():
        match = _BUNDLE.match(line)
        if match:
            found.append(
                _Bundle(
                    address=int(match["address"], 16),
                    starts_loop="LB" in match["keys"],
                    depth=len(match["marks"]),
                    text=line[match.end() :],
                )
            )
        elif found:
            found[-1].text += "\n" + line
    for before, bundle in itertools.pairwise(found):
        if re.match(r"\s*\}", bundle.text) and not bundle.starts_loop:
            bundle.depth = before.depth  # an empty bundle has no marks: a branch's delay slot
    return found


def _read_utilization(text: str) -> tuple[dict[str, int], list[list[int]]]:
    _, names, capacities, _, *rows = (line for line in text.splitlines() if line.strip())
    units = [name.strip() for name in names.split(",")]
    return (
        dict(zip(units, map(int, capacities.split()), strict=True)),
        [[int(cell) for cell in row.split()] for row in rows],
    )


def _loops(
    schedule: Sequence[_Bundle],
) -> tuple[list[int | None], list[int | None], list[int]]:
    """The innermost loop of every bundle; every loop's parent and address.

    A body reaches to its last marked bundle: bundles in between may hold nothing but instructions
    that were moved in from outside, and then have fewer marks.
    """
    owners: list[int | None] = [None] * len(schedule)
    parents: list[int | None] = []
    addresses: list[int] = []
    for start, head in enumerate(schedule):
        if not head.starts_loop:
            continue
        end = start
        for position in range(start, len(schedule)):
            bundle = schedule[position]
            if position > start and bundle.starts_loop and bundle.depth <= head.depth:
                break
            if bundle.depth >= head.depth:
                end = position
        parents.append(owners[start])
        addresses.append(head.address)
        owners[start : end + 1] = [len(addresses) - 1] * (end + 1 - start)
    return owners, parents, addresses


def _scalar_definitions(text: str) -> dict[str, str]:
    """What scalar values are defined as, by the number that a value keeps through its copies.

    A value read from a spill slot is defined as what was stored there, if only one value was.
    """
    definitions = {
        match[1]: match[2].strip()
        for match in re.finditer(r"(%s\d+)(?:_s\d+)? = ((?:smov|sadd|sphi)\.?\w* [^;/\n}]*)", text)
    }
    stored: dict[str, set[str]] = {}
    for slot, value in re.findall(r"sst \[smem:\[(#\w+_spill)\]\] (%s\d+)", text):
        stored.setdefault(slot, set()).add(value)
    for name, slot in re.findall(r"(%s\d+)(?:_s\d+)? = sld \[smem:\[(#\w+_spill)\]\]", text):
        values = stored.get(slot, set())
        if len(values) == 1:
            definitions[name] = definitions.get(next(iter(values)), "")
    return definitions


def _trip_count(body: str, definitions: dict[str, str]) -> int | None:
    """Turns of a loop that counts up by a constant from a constant to a constant; else None."""

    def defined(value: str) -> str:
        return definitions.get(value.split("_")[0], "")

    def constant(value: str) -> int | None:
        if value.startswith("%"):
            move = re.fullmatch(r"smov\.u32 (?:\(!?%\w+\), )?(-?\d+)", defined(value))
            if move is None:
                return None
            value = move[1]
        number = int(value)
        return number - _WORD if number >= _WORD // 2 else number

    tests = list(_EXIT_TEST.finditer(body))
    if len(tests) != 1 or tests[0]["comparison"] != "ge":
        return None
    step = re.match(r"sadd\.s32 (?:\(!?%\w+\), )?(-?\d+), (%\w+)", defined(tests[0]["counter"]))
    merge = re.match(r"sphi (%\w+), %\w+", defined(step[2])) if step else None
    if step is None or merge is None:
        return None
    start, by, bound = constant(merge[1]), int(step[1]), constant(tests[0]["bound"])
    if start is None or bound is None or by <= 0:
        return None
    return max(1, math.ceil((bound - start) / by))
