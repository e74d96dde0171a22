"""What the text of a compiled XLA program says: cycles, trip counts, kernels, collectives."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator
from operator import attrgetter

_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.<>-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.<>-]+) = (?P<rest>.*)$")
_ESTIMATE = re.compile(r'"estimated_cycles":"?(\d+)')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"?(\d+)')
_CALLED = re.compile(
    r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.<>-]+)"
)
# Branches of a conditional, and what a custom call stands for that a TPU's SparseCores execute.
_CALLED_LISTS = re.compile(r"(?:branch|called)_computations=\{([^}]*)\}")
_CALLS = ("call", "conditional", "async-start", "custom-call", "custom-call-start")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_ARRAY = re.compile(r"(?P<dtype>pred|[a-z]+\d+\w*)\[(?P<shape>[\d,]*)\]")

_DIGEST = re.compile(r'kernel_hash = "((?:[^"\\]|\\.)*)"')
_ORIGIN = re.compile(r'op_name="([^"]*)"')

KERNELS = {"tpu": ("tpu_custom_call",), "gpu": ("mosaic_gpu_v2", "mosaic_gpu")}
_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_NO_ESTIMATE = 2**63 - 1  # cycles, as the TPU's compiler writes it
_SCALAR_BYTES = 8  # counters of loops and the like are not listed
# What moves or computes nothing of its own.
_FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
    "conditional", "after-all", "partition-id", "replica-id", "iota", "opt-barrier",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation of one device's program."""

    name: str
    kind: str
    # Of all arrays that it returns; where it only begins, of the largest; of a reduce-scatter, of
    # those that it is given.
    bytes: int
    calls: int


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """A Pallas kernel of a program.

    Attributes:
        name: of the instruction.
        kernel: name that its author gave it, as the instruction's origin has it.
        calls: how often the program calls it.
        digest: GPU: of the kernel's code, as the program quotes it.
    """

    name: str
    kernel: str
    calls: int
    digest: str = ""


@dataclasses.dataclass(frozen=True)
class Program:
    """What a compiled program says of itself.

    Attributes:
        cycles: the compiler's estimates x known trip counts; kernels are not in it. None: the
            compiler gives none (GPUs).
        kernels: Pallas kernels, in the order of the text.
        others: instructions on arrays that are neither kernels nor free, with how often each runs.
        collectives: in the order of the text.
        unknown_loops: loops whose trip count the compiler does not know; they count once.
        unestimated: calls of operations that the compiler has no estimate for; they count nothing.
    """

    cycles: int | None
    kernels: tuple[KernelCall, ...]
    others: dict[str, int]
    collectives: tuple[Collective, ...]
    unknown_loops: tuple[str, ...]
    unestimated: int = 0


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    text: str
    is_root: bool = False


def parse(text: str, platform: str) -> Program:
    """Reads `compiled.as_text()`.

    Raises:
        ValueError: it has no entry computation.
    """
    computations, entry = _computations(text)
    if entry is None:
        raise ValueError("text: no ENTRY computation in it; give compiled.as_text()")
    times, unknown = _multiplicities(computations, entry)
    cycles, estimates, unestimated = 0, 0, 0
    kernels: list[KernelCall] = []
    others: Counter[str] = Counter()
    collectives: list[Collective] = []
    fused: dict[str, Collective] = {}
    for computation, runs in times.items():
        for instruction in computations[computation]:
            if instruction.opcode == "fusion":
                for channel, found in _fused_collectives(computations, instruction, runs):
                    # One that runs beside others' arithmetic begins, goes on and ends in a fusion
                    # each.
                    before = fused.get(channel)
                    fused[channel] = (
                        found if before is None else max(before, found, key=attrgetter("calls"))
                    )
            estimate = _ESTIMATE.search(instruction.text)
            if estimate:
                estimates += 1
                known = int(estimate[1]) != _NO_ESTIMATE
                cycles += int(estimate[1]) * runs if known else 0
                unestimated += 0 if known else runs
            target = _TARGET.search(instruction.text)
            kind = instruction.opcode.removesuffix("-start")
            if instruction.opcode == "custom-call" and target and target[1] in KERNELS[platform]:
                kernels.append(_kernel_call(instruction, runs))
            elif kind in _COLLECTIVES:
                size = _collective_bytes(computations[computation], instruction, kind)
                collectives.append(Collective(instruction.name, kind, size, runs))
            elif (
                kind not in _FREE
                and not instruction.opcode.endswith("-done")
                and _largest(instruction.type) > _SCALAR_BYTES
            ):
                others[instruction.name] += runs
    return Program(
        cycles=cycles if estimates or platform == "tpu" else None,
        kernels=tuple(kernels),
        others=dict(others),
        collectives=(*collectives, *fused.values()),
        unknown_loops=tuple(unknown),
        unestimated=unestimated,
    )


def _fused_collectives(
    computations: dict[str, list[_Instruction]], fusion: _Instruction, runs: int
) -> Iterator[tuple[str, Collective]]:
    """Collectives inside a fusion, each with what tells it from all others of the program."""
    for name in _CALLED.findall(fusion.text):
        for instruction in computations.get(name, ()):
            if instruction.opcode == "fusion":
                yield from _fused_collectives(computations, instruction, runs)
            kind = instruction.opcode.removesuffix("-start")
            if kind not in _COLLECTIVES:
                continue
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # as the TPU's compiler writes it
            size = _collective_bytes(computations[name], instruction, kind)
            channel = _CHANNEL.search(instruction.text)
            key = channel[1] if channel else instruction.name
            yield key, Collective(instruction.name, kind, size, runs)


def _collective_bytes(computation: list[_Instruction], instruction: _Instruction, kind: str) -> int:
    if kind == "reduce-scatter":
        given = set(_operands(instruction))
        return sum(_largest(other.type) for other in computation if other.name in given)
    begins = instruction.opcode.endswith("-start")
    return (max if begins else sum)(_sizes(instruction.type))


def _kernel_call(instruction: _Instruction, runs: int) -> KernelCall:
    digest = _DIGEST.search(instruction.text)
    origin = _ORIGIN.search(instruction.text)
    # "jit(fn)/transpose(jvp(kernel's name))/pallas_call"
    path = origin[1].split("/") if origin else []
    kernel = path[-2] if len(path) > 1 else re.sub(r"\.\d+$", "", instruction.name)
    kernel = kernel.rsplit("(", 1)[-1].rstrip(")")
    return KernelCall(instruction.name, kernel, runs, digest[1] if digest else "")


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str | None]:
    computations: dict[str, list[_Instruction]] = {}
    entry = current = None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = match["name"]
            computations[current] = []
            entry = current if match["entry"] else entry
        elif line.rstrip() == "}":
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)):
            kind, rest = _split_type(match["rest"])
            opcode = rest.split("(", 1)[0].strip()
            computations[current].append(
                _Instruction(match["name"], kind, opcode, rest, match["root"] is not None)
            )
        elif current is not None and computations[current]:
            # The rest of an instruction whose attributes hold line breaks, as some kernels' do.
            last = computations[current][-1]
            computations[current][-1] = dataclasses.replace(last, text=f"{last.text}\n{line}")
    return computations, entry


def _split_type(text: str) -> tuple[str, str]:
    """Splits "(f32[2]{0}, s32[]) while(...)" and "f32[2]{0} add(...)" behind the type."""
    if not text.startswith("("):
        kind, _, rest = text.partition(" ")
        return kind, rest
    depth = 0
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[: index + 1], text[index + 2 :]
    return text, ""


def _multiplicities(
    computations: dict[str, list[_Instruction]], entry: str
) -> tuple[Counter[str], list[str]]:
    """How often each computation runs that is not part of one instruction."""
    times: Counter[str] = Counter({entry: 1})
    unknown: list[str] = []
    pending = [(entry, 1)]
    while pending:
        computation, runs = pending.pop()
        for instruction in computations[computation]:
            trips = 1
            if instruction.opcode == "while":
                known = _TRIPS.search(instruction.text)
                count = int(known[1]) if known else _counted(computations, computation, instruction)
                if count is None:
                    unknown.append(instruction.name)
                trips = 1 if count is None else count
            elif instruction.opcode not in _CALLS:
                continue
            called = _CALLED.findall(instruction.text)
            for names in _CALLED_LISTS.findall(instruction.text):
                called += re.findall(r"%?([\w.<>-]+)", names)
            for target in called:
                if target in computations:
                    times[target] += runs * trips
                    pending.append((target, runs * trips))
    return times, unknown


def _counted(
    computations: dict[str, list[_Instruction]], around: str, loop: _Instruction
) -> int | None:
    """Turns of a loop whose counter goes up from a constant by a constant to a constant."""
    outside = {instruction.name: instruction for instruction in computations[around]}
    parts = {
        key: {instruction.name: instruction for instruction in computations[match[1]]}
        for key in ("condition", "body")
        if (match := re.search(rf"{key}=%?([\w.<>-]+)", loop.text)) and match[1] in computations
    }
    if len(parts) != 2:
        return None
    condition, body = parts["condition"], parts["body"]
    # The last one, as a rule; the compiler may move others behind it.
    test, result = (next(i for i in part.values() if i.is_root) for part in (condition, body))
    start = outside.get(_operands(loop)[0])
    if test.opcode != "compare" or "direction=LT" not in test.text or start is None:
        return None
    counter, limit = (condition.get(name) for name in _operands(test))
    index = re.search(r"index=(\d+)", counter.text) if counter else None
    if index is None or limit is None or start.opcode != "tuple" or result.opcode != "tuple":
        return None
    first = _constant(outside, _operands(start)[int(index[1])])
    bound = _constant(condition, limit.name)
    following = body.get(_operands(result)[int(index[1])])
    if first is None or bound is None or following is None or following.opcode != "add":
        return None
    step = next(
        (c for name in _operands(following) if (c := _constant(body, name)) is not None), None
    )
    return None if not step or step < 0 else max(0, -(-(bound - first) // step))


def _operands(instruction: _Instruction) -> list[str]:
    """Names of an instruction's operands."""
    inside = instruction.text[len(instruction.opcode) + 1 :].split(")", 1)[0]
    return re.findall(r"%([\w.<>-]+)", inside)


def _constant(instructions: dict[str, _Instruction], name: str) -> int | None:
    """The integer that a value is, through copies; None: it is none."""
    instruction = instructions.get(name)
    while instruction is not None and instruction.opcode in ("copy", "bitcast"):
        instruction = instructions.get(_operands(instruction)[0])
    if instruction is None or instruction.opcode != "constant":
        return None
    value = re.match(r"constant\((-?\d+)\)", instruction.text)
    return int(value[1]) if value else None


def _largest(kind: str) -> int:
    return max(_sizes(kind))


def _sizes(kind: str) -> list[int]:
    """Bytes of the arrays of a type; 0 first, for one without."""
    sizes = [0]
    for match in _ARRAY.finditer(kind):
        bits = re.search(r"\d+", match["dtype"])
        shape = [int(size) for size in match["shape"].split(",") if size]
        sizes.append(math.prod(shape) * (8 if bits is None else int(bits[0])) // 8)
    return sizes
