"""What one Mosaic TPU kernel takes: cycles of its schedule, spills, VMEM, bytes moved."""

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pallas_kernels.targets import llo
from pallas_kernels.targets.blocks import Transfers
from pallas_kernels.targets.chips import Chip
from pallas_kernels.targets.hlo import KernelCall
from pallas_kernels.targets.launch import Launch, launch_for, resolve_trip_counts, turns

_FILE = re.compile(r"^\d+-(?P<name>.*)-\d+-(?P<kind>[^/]+)\.txt$")
_BUNDLES = "final_bundles"
_UTILIZATION = "final_hlo-static-per-bundle-utilization"
_ALLOCATIONS = "pre-finalize-registers-and-allocations"


@dataclasses.dataclass(frozen=True)
class TpuKernel:
    """What one call of a kernel takes.

    Attributes:
        name: the kernel's, as the HLO instruction has it.
        calls: how often the program calls it.
        grid: of the `pallas_call`; None: not found among those of the traced function.
        loops: of the final schedule.
        trip_counts: of the loops, in order; None: unknown. The grid's loop has two turns more than
            steps of the grid, since fetching, computing and writing back overlap.
        straight_bundles: outside all loops.
        cycles: bundles x trip counts, of one core; cores that share a parallel axis run at once.
        utilization: share of the cycles' slots that are filled, by unit.
        spill_slots: vector stores to and loads from spill slots in the text.
        scalar_spills: scalar values kept in memory for want of registers.
        vmem_bytes: windows, scratch and spill slots.
        read_bytes, written_bytes: by the pipeline, to and from HBM; None: unknown.
        moved_bytes: as declared, else their sum; None: unknown.
        issue_seconds: cycles / clock; None: trip counts unknown.
        memory_seconds: moved_bytes / HBM bandwidth; None: unknown.
    """

    name: str
    calls: int
    grid: tuple[int, ...] | None
    loops: tuple[llo.Loop, ...]
    trip_counts: tuple[int, ...] | None
    straight_bundles: int
    cycles: int | None
    utilization: dict[str, float] | None
    spill_slots: int
    scalar_spills: int
    vmem_bytes: int
    read_bytes: int | None
    written_bytes: int | None
    moved_bytes: int | None
    issue_seconds: float | None
    memory_seconds: float | None

    @property
    def spills(self) -> int:
        """Vector spill slots used."""
        return self.spill_slots


def read_kernels(
    files: list[Path],
    chip: Chip,
    launches: tuple[Launch, ...],
    moved: list[Transfers],
    calls: Sequence[KernelCall],
) -> tuple[TpuKernel, ...]:
    """Reports on a program's kernels from libtpu's dumps.

    Raises:
        FileNotFoundError: libtpu wrote no schedule for one of them.
    """
    texts: dict[tuple[str, str], Path] = {}
    for path in files:
        if match := _FILE.match(path.name):
            texts[match["name"], match["kind"]] = path
    unclaimed = list(moved)
    kernels: list[TpuKernel] = []
    for call in calls:
        name = call.name
        missing = [kind for kind in (_BUNDLES, _UTILIZATION) if (name, kind) not in texts]
        if missing:
            raise FileNotFoundError(f"libtpu wrote no {missing[0]} for the kernel {name!r}")
        claimed = next((block for block in unclaimed if block.name == call.kernel), None)
        if claimed is not None:
            unclaimed.remove(claimed)
        allocations = texts.get((name, _ALLOCATIONS))
        kernels.append(
            _report(
                name,
                call.calls,
                llo.parse(texts[name, _BUNDLES].read_text(), texts[name, _UTILIZATION].read_text()),
                0 if allocations is None else llo.vmem_bytes(allocations.read_text()),
                claimed,
                chip,
                launch_for(call.kernel, launches),
            )
        )
    return tuple(kernels)


def _report(
    name: str,
    calls: int,
    schedule: llo.Schedule,
    vmem_bytes: int,
    moved: Transfers | None,
    chip: Chip,
    launch: Launch,
) -> TpuKernel:
    known = [loop.known_trip_count for loop in schedule.loops]
    trips = resolve_trip_counts(name, launch, schedule.loops, known)
    cycles = utilization = None
    if trips is not None:
        cycles = schedule.bundles
        used = Counter(schedule.used)
        for loop, total in zip(schedule.loops, turns(schedule.loops, trips), strict=True):
            cycles += loop.bundles * total
            for unit, slots in loop.used.items():
                used[unit] += slots * total
        utilization = {
            unit: round(used[unit] / slots / cycles, 4) for unit, slots in schedule.capacity.items()
        }
    read = None if moved is None else moved.read_bytes
    written = None if moved is None else moved.written_bytes
    total_bytes = launch.bytes_moved
    if total_bytes is None and read is not None and written is not None:
        total_bytes = read + written
    return TpuKernel(
        name=name,
        calls=calls,
        grid=None if moved is None else moved.grid,
        loops=schedule.loops,
        trip_counts=trips,
        straight_bundles=schedule.bundles,
        cycles=cycles,
        utilization=utilization,
        spill_slots=schedule.spill_slots,
        scalar_spills=schedule.scalar_spills,
        vmem_bytes=vmem_bytes + schedule.spill_bytes,
        read_bytes=read,
        written_bytes=written,
        moved_bytes=total_bytes,
        issue_seconds=None if cycles is None else cycles / chip.clock_hz,
        memory_seconds=None if total_bytes is None else total_bytes / chip.hbm_bytes_per_second,
    )
