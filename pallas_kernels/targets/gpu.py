"""What one Mosaic GPU kernel takes: resources from ptxas, issue time from the machine code.

Issue time has two figures; the larger is the prediction.
    issue-bound     an SM's four schedulers issue one instruction a cycle each, with enough warps to
                    choose from: instructions of the SM's CTAs / 4 / clock.
    latency-like    no overlap within a warp, perfect overlap between those that an SM holds at a
                    time: waves of CTAs x the longest warp's sum of stall counts / clock.
Neither knows of waits for memory, of bank conflicts, or of units that take less than one warp's
instruction per cycle and scheduler (integer multiply, conversions, shuffles, shared memory).
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pallas_kernels.targets import sass
from pallas_kernels.targets.chips import GPU_SCHEDULERS, Chip
from pallas_kernels.targets.hlo import KernelCall
from pallas_kernels.targets.launch import Launch, launch_for, resolve_trip_counts, turns

WARP = 32
WARPGROUP = 4  # warps
_CTA_OVERHEAD_BYTES = 1024  # of shared memory, taken by the system for every resident CTA
_REGISTER_UNIT = 256  # registers are handed out to warps in this many


@dataclasses.dataclass(frozen=True)
class GpuKernel:
    """What one launch of a kernel takes.

    Attributes:
        name: the kernel's.
        calls: how often the program launches it.
        grid, cluster: CTAs, and CTAs of a cluster, along x, y and z.
        threads_per_cta: threads.
        registers: per thread.
        spill_store_bytes, spill_load_bytes, stack_bytes: per thread, as ptxas counts them.
        static_shared_bytes, dynamic_shared_bytes: per CTA.
        ctas_per_sm: how many CTAs one SM can hold at a time.
        counts: instructions of the text by class, each counted once.
        executed: instructions that one CTA's warps issue, by class; None: trip counts unknown.
        loops: of the machine code, those that only wait for a barrier included.
        trip_counts: of the other loops, in their order; None: unknown.
        straight_instructions, straight_cycles: outside all loops, per warp.
        instructions_per_cta: issue slots of one CTA.
        cycles_per_warp: sum of stall counts of the longest warp.
        issue_bound_seconds, latency_seconds: of one launch; see the module.
        bytes_in_flight: of loads, per SM; None: not declared.
    """

    name: str
    calls: int
    grid: tuple[int, ...]
    cluster: tuple[int, ...]
    threads_per_cta: int
    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    stack_bytes: int
    static_shared_bytes: int
    dynamic_shared_bytes: int
    ctas_per_sm: int
    counts: dict[str, int]
    executed: dict[str, int] | None
    loops: tuple[sass.Loop, ...]
    trip_counts: tuple[int, ...] | None
    straight_instructions: int
    straight_cycles: int
    instructions_per_cta: int | None
    cycles_per_warp: int | None
    issue_bound_seconds: float | None
    latency_seconds: float | None
    bytes_in_flight: int | None

    @property
    def spills(self) -> int:
        """Bytes spilled per thread, stores and loads."""
        return self.spill_store_bytes + self.spill_load_bytes

    @property
    def issue_seconds(self) -> float | None:
        """Predicted issue time of one launch: the larger figure."""
        if self.issue_bound_seconds is None or self.latency_seconds is None:
            return None
        return max(self.issue_bound_seconds, self.latency_seconds)


def ctas_per_sm(chip: Chip, *, threads: int, registers: int, shared_bytes: int) -> int:
    """How many CTAs an SM can hold, by threads, registers and shared memory (occupancy)."""
    warps = math.ceil(threads / WARP)
    registers_per_warp = math.ceil(registers * WARP / _REGISTER_UNIT) * _REGISTER_UNIT
    # Registers belong to a scheduler's quarter of the SM, so whole warps must fit there.
    warps_by_registers = (chip.registers // GPU_SCHEDULERS // registers_per_warp) * GPU_SCHEDULERS
    return min(
        chip.ctas,
        chip.threads // (warps * WARP),
        warps_by_registers // warps,
        chip.shared_bytes // (shared_bytes + _CTA_OVERHEAD_BYTES),
    )


@dataclasses.dataclass(frozen=True)
class Listing:
    """A compiled kernel's code, ptxas' account of it, and how it is launched."""

    code: sass.MachineCode
    resources: "Resources"
    launch: "LaunchShape"


# A process compiles the same kernel only once, so what was written then is kept, by digest.
_listings: dict[str, Listing] = {}


def read_kernels(
    files: Sequence[Path], chip: Chip, launches: tuple[Launch, ...], calls: Sequence[KernelCall]
) -> tuple[GpuKernel, ...]:
    """Reports on a program's kernels from Mosaic GPU's dumps.

    Different kernels of one name are told apart by the order in which they are compiled, which is
    the program's.

    Raises:
        FileNotFoundError: a kernel was compiled before in this process, with no dump.
    """
    unclaimed = sorted(
        (path for path in files if path.suffix == ".sass_ctrl"),
        key=lambda path: int(path.stem.rsplit("_", 1)[1]),
    )
    kernels: list[GpuKernel] = []
    for call in calls:
        if call.digest not in _listings:
            matching = [path for path in unclaimed if path.stem.rsplit("_", 1)[0] == call.kernel]
            if not matching:
                raise FileNotFoundError(
                    f"no machine code of the kernel {call.kernel!r} was written: this process "
                    "compiled it before, outside pallas_kernels.targets; use a new process"
                )
            unclaimed.remove(matching[0])
            _listings[call.digest] = _listing(matching[0])
        kernels.append(_report(call, _listings[call.digest], chip, launches))
    return tuple(kernels)


def _listing(path: Path) -> Listing:
    return Listing(
        code=sass.parse(path.read_text()),
        resources=resources(path.with_suffix(".ptxas").read_text()),
        launch=launch_shape(path.with_suffix(".mlir-passes.log").read_text()),
    )


def _report(
    call: KernelCall, listing: Listing, chip: Chip, launches: tuple[Launch, ...]
) -> GpuKernel:
    name, code, used, shape = call.kernel, listing.code, listing.resources, listing.launch
    launch = launch_for(name, launches)
    grid = launch.grid or shape.grid
    resident = ctas_per_sm(
        chip,
        threads=shape.threads,
        registers=used.registers,
        shared_bytes=used.static_shared_bytes + shape.dynamic_shared_bytes,
    )

    working = [index for index, loop in enumerate(code.loops) if not loop.waits]
    trips = resolve_trip_counts(
        name, launch, [code.loops[index] for index in working], [None] * len(working)
    )
    executed = instructions = cycles = issue_bound = latency = None
    if trips is not None:
        every_trip = [1] * len(code.loops)
        groups = _all_groups(shape.threads, len(code.loops))
        for position, index in enumerate(working):
            every_trip[index] = trips[position]
            if launch.warpgroups is not None:
                groups[index] = tuple(launch.warpgroups[position])
        executed, instructions, cycles = _totals(code, every_trip, groups, shape.threads)
        per_sm = math.ceil(math.prod(grid) / chip.cores)
        issue_bound = per_sm * instructions / GPU_SCHEDULERS / chip.clock_hz
        latency = math.ceil(per_sm / max(1, resident)) * cycles / chip.clock_hz
    in_flight = launch.bytes_in_flight
    return GpuKernel(
        name=name,
        calls=call.calls,
        grid=grid,
        cluster=shape.cluster,
        threads_per_cta=shape.threads,
        registers=used.registers,
        spill_store_bytes=used.spill_store_bytes,
        spill_load_bytes=used.spill_load_bytes,
        stack_bytes=used.stack_bytes,
        static_shared_bytes=used.static_shared_bytes,
        dynamic_shared_bytes=shape.dynamic_shared_bytes,
        ctas_per_sm=resident,
        counts=code.counts,
        executed=executed,
        loops=code.loops,
        trip_counts=trips,
        straight_instructions=code.instructions,
        straight_cycles=code.cycles,
        instructions_per_cta=instructions,
        cycles_per_warp=cycles,
        issue_bound_seconds=issue_bound,
        latency_seconds=latency,
        bytes_in_flight=None if in_flight is None else in_flight * resident,
    )


def _all_groups(threads: int, loops: int) -> list[tuple[int, ...]]:
    everyone = tuple(range(math.ceil(threads / (WARP * WARPGROUP))))
    return [everyone] * loops


def _totals(
    code: sass.MachineCode,
    trip_counts: list[int],
    groups: list[tuple[int, ...]],
    threads: int,
) -> tuple[dict[str, int], int, int]:
    """Instructions of a CTA by class and in all, and cycles of its longest warp."""
    number_of_groups = math.ceil(threads / (WARP * WARPGROUP))
    warps = min(WARPGROUP, math.ceil(threads / WARP))  # of one group
    executed: Counter[str] = Counter()
    cycles = [code.cycles] * number_of_groups
    for name, count in code.straight_counts.items():
        executed[name] += count * warps * number_of_groups
    for loop, total, running in zip(
        code.loops, turns(code.loops, trip_counts), groups, strict=True
    ):
        for name, count in loop.counts.items():
            executed[name] += count * total * warps * len(running)
        for group in running:
            cycles[group] += loop.cycles * total
    return dict(executed.most_common()), executed.total(), max(cycles)


@dataclasses.dataclass(frozen=True)
class Resources:
    """What ptxas says of a kernel."""

    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    stack_bytes: int
    static_shared_bytes: int


def resources(text: str) -> Resources:
    """Reads ptxas' verbose output for one kernel.

    Raises:
        ValueError: it does not say how many registers are used.
    """

    def number(pattern: str) -> int:
        match = re.search(pattern, text)
        return int(match[1]) if match else 0

    if not re.search(r"Used \d+ registers", text):
        raise ValueError(f"text: ptxas states no registers in {text!r}")
    return Resources(
        registers=number(r"Used (\d+) registers"),
        spill_store_bytes=number(r"(\d+) bytes spill stores"),
        spill_load_bytes=number(r"(\d+) bytes spill loads"),
        stack_bytes=number(r"(\d+) bytes stack frame"),
        static_shared_bytes=number(r"(\d+) bytes smem"),
    )


@dataclasses.dataclass(frozen=True)
class LaunchShape:
    """How a kernel is launched."""

    grid: tuple[int, ...]
    cluster: tuple[int, ...]
    threads: int
    dynamic_shared_bytes: int


def launch_shape(text: str) -> LaunchShape:
    """Reads the launch from MLIR text with a `gpu.launch_func`.

    Raises:
        ValueError: there is none, or its sizes are not constants.
    """
    start = text.rfind("gpu.launch_func")
    if start < 0:
        raise ValueError("text: no gpu.launch_func in the compiler's output")
    end = text.index("\n", start)
    line = text[start:end]
    before = text[:start]

    def value(name: str) -> int:
        pattern = rf"^\s*{re.escape(name)} = (?:arith|llvm\.mlir)\.constant\(?\s*\(?(\d+) :"
        definitions = re.findall(pattern, before, re.MULTILINE)
        if not definitions:
            raise ValueError(f"text: {name} of {line[:200]!r} is not a constant")
        return int(definitions[-1])

    def sizes(keyword: str) -> tuple[int, ...]:
        match = re.search(rf"{keyword} in \(([^)]*)\)", line)
        if match is None:
            return (1, 1, 1)
        return tuple(value(name.split(":")[0].strip()) for name in match[1].split(","))

    shared = re.search(r"dynamic_shared_memory_size (%[\w#]+)", line)
    return LaunchShape(
        grid=sizes("blocks"),
        cluster=sizes("clusters"),
        threads=math.prod(sizes("threads")),
        dynamic_shared_bytes=0 if shared is None else value(shared[1]),
    )
