"""Readers of compiled kernels, against texts whose figures can be counted by hand."""

from pathlib import Path

import pytest

from pallas_kernels import targets
from pallas_kernels.targets import gpu, hlo, llo, sass
from pallas_kernels.targets.launch import Launch, launch_for, resolve_trip_counts, turns

H100 = targets.CHIPS["h100"]
TEXTS = Path(__file__).parent / "texts"
SASS = (TEXTS / "toy.sass_ctrl").read_text()
LAUNCH = (TEXTS / "toy.mlir-passes.log").read_text()
BUNDLES = (TEXTS / "toy-final_bundles.txt").read_text()
UTILIZATION = (TEXTS / "toy-utilization.txt").read_text()


# Machine code of GPUs


def test_instructions_belong_to_the_innermost_loop_and_waits_moved_out_of_line_are_no_loops():
    code = sass.parse(SASS)

    outer, inner, wait = code.loops
    assert [hex(loop.address) for loop in code.loops] == ["0x20", "0x40", "0xb0"]
    assert [loop.depth for loop in code.loops] == [1, 2, 2]
    assert [loop.parent for loop in code.loops] == [None, 0, 0]
    assert [loop.waits for loop in code.loops] == [False, False, True]
    # S2R 7, IADD3 1; EXIT 5.
    assert (code.instructions, code.cycles) == (3, 13)
    # SYNCS 1, @!P0 BRA 5; MOV 0 counts 1, @P2 BRA 6; and out of line: BRA back 5.
    assert (outer.instructions, outer.cycles) == (5, 18)
    # LDS 4, FFMA 2, @P1 BRA 3.
    assert (inner.instructions, inner.cycles) == (3, 9)
    assert inner.counts == {"shared load": 1, "fp32 fma": 1, "branch": 1}
    assert (wait.instructions, wait.cycles) == (2, 6)
    assert code.counts["fp32 fma"] == 1
    assert sum(code.counts.values()) == 13


def test_code_that_cannot_be_reached_is_not_counted():
    # Behind the exit the assembler fills up with a branch to itself and NOPs.
    code = sass.parse(SASS)

    assert "nop" not in code.counts
    assert all(loop.address < 0xD0 for loop in code.loops)


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("FFMA", "fp32 fma"),
        ("FADD.FTZ", "fp32 alu"),
        ("HFMA2.MMA", "half"),  # names the unit, not a matrix product
        ("HGMMA.64x64x16.F32.BF16", "mma"),
        ("F2FP.BF16.F32.PACK_AB", "conversion"),
        ("LDS.128", "shared load"),
        ("STSM.16.MT88.4", "shared store"),
        ("LDG.E.128", "global load"),
        ("STG.E", "global store"),
        ("STL.64", "local (spill)"),
        ("LDL", "local (spill)"),
        ("LDC", "constant load"),
        ("UBLKCP.S.G", "tma"),
        ("UTMALDG.3D", "tma"),
        ("UTMASTG.2D", "tma"),
        ("SHFL.BFLY", "shuffle"),
        ("BAR.SYNC.DEFER_BLOCKING", "barrier"),
        ("SYNCS.PHASECHK.TRANS64.TRYWAIT", "barrier"),
        ("BRA.U", "branch"),
        ("IMAD.MOV.U32", "integer"),
        ("ULEA", "uniform"),
        ("MOV", "move"),
        ("QUUX", "other"),
    ],
)
def test_opcodes_are_counted_in_their_class(opcode, expected):
    assert sass.class_of(opcode) == expected


def test_text_without_control_codes_is_refused():
    with pytest.raises(ValueError, match="control codes"):
        sass.parse("        /*0000*/  MOV R1, R2 ;")


def test_ptxas_account():
    used = gpu.resources(
        "ptxas info    : Function properties for k\n"
        "    48 bytes stack frame, 44 bytes spill stores, 36 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 2 barriers, 16 bytes smem"
    )

    assert used == gpu.Resources(
        registers=255,
        spill_store_bytes=44,
        spill_load_bytes=36,
        stack_bytes=48,
        static_shared_bytes=16,
    )


def test_launch_sizes_are_those_of_the_constants():
    assert gpu.launch_shape(LAUNCH) == gpu.LaunchShape(
        grid=(32, 8, 1), cluster=(2, 1, 1), threads=256, dynamic_shared_bytes=32776
    )


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "expected"),
    [
        (1024, 64, 0, 1),  # registers: 65536 / 64
        (256, 32, 0, 8),  # threads: 2048 / 256
        (128, 255, 0, 2),  # 256 x 32 registers a warp: 2 warps in each quarter of 16384
        (128, 40, 32777, 6),  # shared memory: 233472 / (32777 + 1024)
        (32, 16, 0, 32),  # CTAs
        (384, 168, 100_000, 1),  # registers: 3 warps in each quarter, so 12 in all
    ],
)
def test_occupancy_of_an_h100(threads, registers, shared, expected):
    assert (
        gpu.ctas_per_sm(H100, threads=threads, registers=registers, shared_bytes=shared) == expected
    )


def write_dumps(folder, name="toy"):
    (folder / f"{name}_0.sass_ctrl").write_text(SASS)
    (folder / f"{name}_0.ptxas").write_text("0 bytes stack frame\nUsed 40 registers, 1 bytes smem")
    (folder / f"{name}_0.mlir-passes.log").write_text(LAUNCH)
    return sorted(folder.iterdir())


def test_issue_time_of_a_launch(tmp_path):
    launch = Launch(trip_counts=(10, 4), bytes_in_flight=8192)
    call = hlo.KernelCall("toy.1", "toy", calls=3, digest="issue time")

    (kernel,) = gpu.read_kernels(write_dumps(tmp_path), H100, (launch,), [call])

    # Per warp: 3 outside; 10 turns of 5 instructions, each with 4 turns of 3 and a wait of 2.
    instructions = 3 + 10 * (5 + 4 * 3 + 2)
    cycles = 13 + 10 * (18 + 4 * 9 + 6)
    assert kernel.instructions_per_cta == 8 * instructions  # 256 threads
    assert kernel.executed["fp32 fma"] == 8 * 10 * 4
    assert kernel.cycles_per_warp == cycles
    # 256 CTAs on 132 SMs: 2 for the busiest; 6 fit at a time, by shared memory, so one wave.
    assert kernel.ctas_per_sm == 6
    assert kernel.issue_bound_seconds == pytest.approx(2 * 8 * instructions / 4 / 1.98e9)
    assert kernel.latency_seconds == pytest.approx(cycles / 1.98e9)
    assert kernel.issue_seconds == max(kernel.issue_bound_seconds, kernel.latency_seconds)
    assert kernel.bytes_in_flight == 6 * 8192
    assert kernel.calls == 3


def test_warp_groups_that_run_different_loops_are_alternatives(tmp_path):
    launch = Launch(trip_counts=(10, 4), warpgroups=((0, 1), (1,)))
    call = hlo.KernelCall("toy.1", "toy", calls=1, digest="warp groups")

    (kernel,) = gpu.read_kernels(write_dumps(tmp_path), H100, (launch,), [call])

    # The second group alone runs the inner loop; the wait inside the outer loop, both.
    both = 3 + 10 * (5 + 2)
    assert kernel.instructions_per_cta == 4 * both + 4 * (both + 10 * 4 * 3)
    assert kernel.cycles_per_warp == 13 + 10 * (18 + 4 * 9 + 6)


def test_without_trip_counts_there_is_no_issue_time(tmp_path):
    call = hlo.KernelCall("toy.1", "toy", calls=1, digest="no trip counts")

    (kernel,) = gpu.read_kernels(write_dumps(tmp_path), H100, (), [call])

    assert kernel.trip_counts is None
    assert kernel.issue_seconds is None
    assert kernel.registers == 40


def test_a_kernel_that_was_compiled_without_dumps_is_an_error():
    call = hlo.KernelCall("toy.1", "toy", calls=1, digest="elsewhere")

    with pytest.raises(FileNotFoundError, match="use a new process"):
        gpu.read_kernels([], H100, (), [call])


# What callers say


def test_trip_counts_come_in_the_order_of_addresses_or_from_a_function():
    loops = sass.parse(SASS).loops[:2]
    given = Launch(trip_counts=(10, 4))
    computed = Launch(trip_counts=lambda loops: [10 - 6 * (loop.depth - 1) for loop in loops])

    assert resolve_trip_counts("k", given, loops, [None, None]) == (10, 4)
    assert resolve_trip_counts("k", computed, loops, [None, None]) == (10, 4)
    assert turns(loops, (10, 4)) == (10, 40)


def test_a_wrong_number_of_trip_counts_names_the_loops():
    loops = sass.parse(SASS).loops[:2]

    with pytest.raises(ValueError, match=r"2 loops, at 0x20 \(depth 1\), 0x40 \(depth 2\)"):
        resolve_trip_counts("k", Launch(trip_counts=(10,)), loops, [None, None])


def test_known_trip_counts_stand_unless_the_caller_gives_others():
    loops = sass.parse(SASS).loops[:2]

    assert resolve_trip_counts("k", Launch(), loops, [7, 8]) == (7, 8)
    assert resolve_trip_counts("k", Launch(), loops, [7, None]) is None
    assert resolve_trip_counts("k", Launch(trip_counts=(1, 2)), loops, [7, 8]) == (1, 2)


def test_launches_are_found_by_a_part_of_the_name():
    forward, backward = Launch("forward"), Launch("backward")

    assert launch_for("swr_backward", [forward, backward]) is backward
    assert launch_for("reduce", [forward, backward]) == Launch()
    with pytest.raises(ValueError, match="at most one"):
        launch_for("swr_forward", [forward, Launch("swr")])


# Schedules of TPUs


def test_bundles_belong_to_the_innermost_loop():
    schedule = llo.parse(BUNDLES, UTILIZATION)

    outer, inner = schedule.loops
    assert [loop.address for loop in schedule.loops] == [2, 4]
    assert (outer.parent, outer.depth) == (None, 1)
    assert (inner.parent, inner.depth) == (0, 2)
    # 0x0, 0x1 before; 0xc behind. 0x6 was moved into the inner loop from outside; 0x8 and 0xb are
    # delay slots of the branches before them.
    assert schedule.bundles == 3
    assert outer.bundles == 2 + 3
    assert inner.bundles == 5
    assert inner.used == {"VALU": 6, "VLOAD": 2, "VLOAD:FILL": 1, "VSTORE": 1, "VSTORE:SPILL": 0}
    assert outer.used["VALU"] == 1
    assert schedule.capacity["VALU"] == 4


def test_trip_counts_of_counted_loops_are_known_also_when_the_counter_was_spilled():
    outer, inner = llo.parse(BUNDLES, UTILIZATION).loops

    assert outer.known_trip_count == 34
    assert inner.known_trip_count == 5  # from 0 to 10 by 2


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("%s20_s2, 10 /* loop", "%s20_s2, %s99_s9 /* loop"),  # bound known at run time only
        ("%s11_s2 = smov.u32 0", "%s11_s2 = sld [smem:[#allocation0]]"),  # start
        ("scmp.ge.s32.totalorder %s20", "scmp.lt.s32.totalorder %s20"),  # another kind of loop
    ],
)
def test_a_trip_count_that_depends_on_a_value_is_unknown(before, after):
    assert before in BUNDLES

    outer, inner = llo.parse(BUNDLES.replace(before, after), UTILIZATION).loops

    assert inner.known_trip_count is None
    assert outer.known_trip_count == 34


def test_spills_are_counted():
    schedule = llo.parse(BUNDLES, UTILIZATION)

    assert schedule.spill_slots == 2  # one store, one load
    assert schedule.spill_bytes == 4096
    assert schedule.scalar_spills == 1


def test_utilization_of_another_kernel_is_refused():
    with pytest.raises(ValueError, match="13 bundles but utilization of 12"):
        llo.parse(BUNDLES, UTILIZATION.strip().rsplit("\n", 1)[0])


def test_vmem_is_what_is_allocated_there():
    text = """
  #allocation0 [shape = 'u32[]', space=smem, size = 0x4, offset = 0x4, fixed_abs, tag = 'core']
  #allocation2 [shape = 'u32[72,128]{1,0:T(1,128)}', space=vmem, size = 0x9000, scoped, tag = 's']
    #allocation3 [shape = 'u8[2097152]{0}', space=vmem, size = 0x200000, scoped, tag = 'window']
"""
    assert llo.vmem_bytes(text) == 0x9000 + 0x200000
