"""What a GPU's machine code says: instructions by class, loops, and the cycles of one warp.

The text is nvdisasm's with control codes, as Mosaic GPU writes it:

    wait : read barrier : write barrier : yield : stall   /*address*/   instruction

The compiler puts into `stall` how many cycles the warp must let pass before its next instruction,
which covers every latency that is known beforehand. What is not (memory, shuffles, conversions, the
special function unit) is waited for through barriers and does not appear here, so a sum of stalls
is what the code takes if data is always there.
"""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Sequence

_INSTRUCTION = re.compile(
    r"^\s*[^\s:]*:[^\s:]*:[^\s:]*:[^\s:]*:(?P<stall>[0-9a-fA-F]+)\s+/\*(?P<address>[0-9a-f]+)\*/\s+(?P<text>.*?)\s*;?\s*$"
)
_LABEL = re.compile(r"^\s*(?P<label>\.\w+|\w+):\s*$")
_TARGET = re.compile(r"`\((?P<label>[^)]+)\)")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")

# Opcode families by their first letters; the first match counts.
_CLASSES = (
    ("mma", r"[HIQBDO]?G?MMA|[HIQBDO]MMA|UTC\w*MMA"),
    ("fp32 fma", r"FFMA\w*"),
    ("fp32 alu", r"FADD\w*|FMUL\w*|FMNMX\w*|FSEL|FSETP?|FCHK|FSWZADD"),
    ("half", r"H[A-Z]+2\w*"),
    ("double", r"D(ADD|MUL|FMA|SETP|MNMX)"),
    ("special function", r"MUFU"),
    ("conversion", r"F2F\w*|F2I\w*|I2F\w*|I2I\w*|F2IP|I2IP|FRND"),
    ("shared load", r"LDSM?|LDTM"),
    ("shared store", r"STSM?|STTM|ATOMS\w*|REDS"),
    ("local (spill)", r"LDL|STL"),
    ("constant load", r"LDCU?|ULDC|LDC"),
    ("global load", r"LDG\w*|LD"),
    ("global store", r"STG|ST|ATOMG?|RED\w?|REDG"),
    ("tma", r"UTMA\w*|UBLK\w*"),
    ("shuffle", r"SHFL|VOTEU?|MATCH|U?REDUX|ELECT|CREDUX"),
    (
        "barrier",
        r"BAR|SYNCS\w*|MEMBAR|\w*DEPBAR|FENCE|ERRBAR|WARPSYNC|UCGABAR\w*|BSSY|BSYNC|ARRIVES|CCTL\w*"
        r"|NANOSLEEP|WARPGROUP|ACQBULK|B2R|R2B|UTCBAR|YIELD",
    ),
    ("branch", r"BRA|BRXU?|JMPX?|EXIT|CALL|RET|BREAK|KILL|BPT"),
    ("nop", r"NOP"),
    ("uniform", r"U[A-Z0-9]+|R2UR|S2UR"),
    (
        "integer",
        r"IADD\w*|IMAD|I?LEA|LOP3?|SHF|SH[LR]|ISETP|IMNMX|PRMT|I?SEL|IABS|POPC|FLO|VIADD\w*"
        r"|VIMNMX\w*|PLOP3|P2R|R2P|SGXT|BMSK|BREV|IDP\w*|VABSDIFF\w*|IMUL",
    ),
    ("move", r"MOV\w*|CS2R|S2R|PMTRIG|SETMAXREG|USETMAXREG"),
)
_CLASS_PATTERNS = tuple((name, re.compile(rf"(?:{pattern})$")) for name, pattern in _CLASSES)

# A loop of a few instructions around one of these only waits.
_WAITS = ("TRYWAIT", "NANOSLEEP")
_WAIT_LOOP_INSTRUCTIONS = 12


@functools.cache
def class_of(opcode: str) -> str:
    """The class that an opcode such as "LDS.128" is counted in."""
    family = opcode.split(".")[0]
    return next((name for name, pattern in _CLASS_PATTERNS if pattern.match(family)), "other")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One machine instruction."""

    address: int
    text: str  # without its predicate
    predicated: bool
    stall: int  # cycles until the warp's next instruction, at least 1

    @property
    def opcode(self) -> str:
        """Opcode with its modifiers."""
        return self.text.split()[0]


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of the machine code, without the loops inside it.

    Attributes:
        address: of the loop's head.
        parent: index of the loop around it among the kernel's loops; None: outermost.
        depth: 1 for an outermost loop.
        instructions, cycles: of one turn: issue slots, and sum of stall counts, per warp.
        counts: instructions of one turn by class.
        waits: the loop only waits for a barrier; it counts as one turn, and callers give no trip
            count for it.
    """

    address: int
    parent: int | None
    depth: int
    instructions: int
    cycles: int
    counts: dict[str, int]
    waits: bool = False


@dataclasses.dataclass(frozen=True)
class MachineCode:
    """A kernel's machine code, reachable parts only.

    Attributes:
        counts: instructions of the text by class, each counted once.
        loops: in order of the addresses of their heads.
        instructions, cycles: issue slots and stall counts of what is outside all loops, per warp.
        straight_counts: the same by class.
    """

    counts: dict[str, int]
    loops: tuple[Loop, ...]
    instructions: int
    cycles: int
    straight_counts: dict[str, int]


def parse(text: str) -> MachineCode:
    """Reads one kernel's disassembly with control codes.

    Raises:
        ValueError: no instruction with control codes was found.
    """
    instructions, labels = _read(text)
    if not instructions:
        raise ValueError("text: no instruction with control codes (nvdisasm's output) found in it")
    successors = _successors(instructions, labels)
    blocks = _blocks(len(instructions), successors)
    loops = _natural_loops(blocks)
    return _summary(instructions, blocks, loops)


def _read(text: str) -> tuple[list[Instruction], dict[str, int]]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            body = match["text"]
            bare = _PREDICATE.sub("", body)
            instructions.append(
                Instruction(
                    address=int(match["address"], 16),
                    text=bare,
                    predicated=bare != body,
                    stall=max(1, int(match["stall"])),
                )
            )
        elif match := _LABEL.match(line):
            labels[match["label"]] = len(instructions)
    return instructions, labels


def _successors(
    instructions: Sequence[Instruction], labels: dict[str, int]
) -> list[tuple[int, ...]]:
    """Indices of the instructions that can come after each."""
    successors: list[tuple[int, ...]] = []
    for index, instruction in enumerate(instructions):
        following = (index + 1,) if index + 1 < len(instructions) else ()
        family, *modifiers = instruction.opcode.split(".")
        target = _TARGET.search(instruction.text)
        if family == "BRA" and target is not None and "DIV" not in modifiers:
            # A branch that only diverged warps take (DIV) leads to code that emulates a shuffle.
            operands = instruction.text[len(instruction.opcode) : target.start()].strip()
            conditional = instruction.predicated or bool(operands)
            jump = (labels[target["label"]],)
            successors.append(jump + following if conditional else jump)
        elif family in ("EXIT", "RET", "KILL") and not instruction.predicated:
            successors.append(())
        elif family == "CALL" and target is not None and target["label"] in labels:
            successors.append((*following, labels[target["label"]]))
        else:
            successors.append(following)
    return successors


@dataclasses.dataclass
class _Block:
    indices: range
    successors: list[int]


def _blocks(size: int, successors: list[tuple[int, ...]]) -> list[_Block]:
    """Basic blocks that can be reached; the first is the entry."""
    leaders = {0}
    for index, targets in enumerate(successors):
        if targets != (index + 1,):
            leaders.update(targets)
            leaders.add(index + 1)
    starts = sorted(leader for leader in leaders if leader < size)
    ends = [*starts[1:], size]
    number = {start: block for block, start in enumerate(starts)}
    blocks = [
        _Block(range(start, end), [number[target] for target in successors[end - 1]])
        for start, end in zip(starts, ends, strict=True)
    ]
    reached, pending = {0}, [0]
    while pending:
        for target in blocks[pending.pop()].successors:
            if target not in reached:
                reached.add(target)
                pending.append(target)
    kept = sorted(reached)
    renumbered = {old: new for new, old in enumerate(kept)}
    return [
        _Block(blocks[old].indices, [renumbered[target] for target in blocks[old].successors])
        for old in kept
    ]


def _natural_loops(blocks: list[_Block]) -> dict[int, frozenset[int]]:
    """Blocks of every loop, by the loop's head: an edge back to a block that dominates its source.

    A backward jump alone is no loop: waits on barriers are moved out of line and jump back.
    """
    predecessors: list[list[int]] = [[] for _ in blocks]
    for source, block in enumerate(blocks):
        for target in block.successors:
            predecessors[target].append(source)
    everything = set(range(len(blocks)))
    dominators = [everything.copy() for _ in blocks]
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in range(1, len(blocks)):
            common = set.intersection(*(dominators[source] for source in predecessors[block]))
            updated = common | {block}
            if updated != dominators[block]:
                dominators[block] = updated
                changed = True
    loops: dict[int, set[int]] = {}
    for source, block in enumerate(blocks):
        for head in block.successors:
            if head in dominators[source]:
                body = loops.setdefault(head, {head})
                pending = [source]
                while pending:
                    member = pending.pop()
                    if member not in body:
                        body.add(member)
                        pending.extend(predecessors[member])
    return {head: frozenset(body) for head, body in loops.items()}


def _summary(
    instructions: list[Instruction], blocks: list[_Block], loops: dict[int, frozenset[int]]
) -> MachineCode:
    heads = sorted(loops)  # blocks are numbered by address

    def innermost(block: int, without: int | None = None) -> int | None:
        around = [head for head in heads if block in loops[head] and head != without]
        return min(around, key=lambda head: len(loops[head])) if around else None

    owned: dict[int | None, list[Instruction]] = {head: [] for head in [*heads, None]}
    for number, block in enumerate(blocks):
        owned[innermost(number)].extend(instructions[index] for index in block.indices)

    parents = {head: innermost(head, without=head) for head in heads}
    found: list[Loop] = []
    for head in heads:
        depth, ancestor = 1, parents[head]
        while ancestor is not None:
            depth, ancestor = depth + 1, parents[ancestor]
        body = owned[head]
        waits = (
            len(body) <= _WAIT_LOOP_INSTRUCTIONS
            and head not in parents.values()
            and any(mark in instruction.opcode for instruction in body for mark in _WAITS)
        )
        parent = parents[head]
        found.append(
            Loop(
                address=instructions[blocks[head].indices[0]].address,
                parent=None if parent is None else heads.index(parent),
                depth=depth,
                instructions=len(body),
                cycles=sum(instruction.stall for instruction in body),
                counts=_by_class(body),
                waits=waits,
            )
        )
    straight = owned[None]
    return MachineCode(
        counts=_by_class([instruction for body in owned.values() for instruction in body]),
        loops=tuple(found),
        instructions=len(straight),
        cycles=sum(instruction.stall for instruction in straight),
        straight_counts=_by_class(straight),
    )


def _by_class(instructions: Sequence[Instruction]) -> dict[str, int]:
    counts = Counter(class_of(instruction.opcode) for instruction in instructions)
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
