"""Bytes, whole programs, budgets and the command line, against figures counted by hand."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from pallas_kernels import catalogue, targets
from pallas_kernels.targets import __main__ as command_line
from pallas_kernels.targets import blocks, gpu, hlo

H100 = targets.CHIPS["h100"]
V5E = targets.CHIPS["v5e"]
HLO = (Path(__file__).parent / "texts" / "program_hlo.txt").read_text()


# Bytes that a TPU's pipeline moves


def moved(shape, block, grid, index_map, dtype=jnp.float32, out=None):
    out_shape, out_block, out_map = out or (shape, block, index_map)

    def copy(x):
        def body(x_ref, o_ref):
            o_ref[...] = jnp.zeros_like(o_ref)

        return pl.pallas_call(
            body,
            grid=grid,
            in_specs=[pl.BlockSpec(block, index_map)],
            out_specs=pl.BlockSpec(out_block, out_map),
            out_shape=jax.ShapeDtypeStruct(out_shape, dtype),
            name="copy",
        )(x)

    traced = jax.jit(copy).trace(jax.ShapeDtypeStruct(shape, dtype))
    (found,) = blocks.transfers(traced.jaxpr.jaxpr)
    assert found.name == "copy"
    assert found.grid == grid
    return found.read_bytes, found.written_bytes


def test_every_block_once():
    once = 1024 * 256 * 4
    assert moved((1024, 256), (128, 128), (8, 2), lambda i, j: (i, j)) == (once, once)


def test_a_block_that_stays_is_not_fetched_again():
    read, written = moved(
        (1024, 128),
        (128, 128),
        (8, 4),
        lambda i, _: (i, 0),
        out=((128, 128), (128, 128), lambda *_: (0, 0)),
    )
    assert read == 1024 * 128 * 4
    assert written == 128 * 128 * 4


def test_a_block_that_comes_back_is_fetched_again():
    read, _ = moved((1024, 128), (128, 128), (4, 8), lambda _, j: (j, 0))

    assert read == 4 * 1024 * 128 * 4


def test_a_ragged_last_block_moves_what_is_there():
    read, written = moved((1000, 128), (128, 128), (8,), lambda i: (i, 0))

    assert read == written == 1000 * 128 * 4


def test_narrow_arrays_move_whole_tiles():
    read, _ = moved((64, 1024, 16), (1, 1024, 16), (64,), lambda i: (i, 0, 0), jnp.bfloat16)

    assert read == 64 * 1024 * 128 * 2


def test_no_grid_is_one_step():
    assert moved((16, 128), (16, 128), (), lambda: (0, 0)) == (16 * 128 * 4, 16 * 128 * 4)


def test_copies_by_hand_are_unknown():
    def copy(x):
        def body(x_ref, o_ref):
            o_ref[...] = jnp.zeros_like(o_ref)

        spec = pl.BlockSpec(memory_space=pl.ANY)
        return pl.pallas_call(body, in_specs=[spec], out_shape=x, name="by_hand")(x)

    shape = jax.ShapeDtypeStruct((16, 128), jnp.float32)
    (found,) = blocks.transfers(jax.jit(copy).trace(shape).jaxpr.jaxpr)

    assert found.read_bytes is None
    assert found.written_bytes == 16 * 128 * 4


# Whole programs


def test_estimates_count_by_the_trip_counts_of_the_loops_around_them():
    program = hlo.parse(HLO, "tpu")

    # 100 outside, 10 in the outer loop of 3 turns, 7 in the inner one of 5 turns.
    assert program.cycles == 100 + 3 * (10 + 5 * 7)
    assert program.unknown_loops == ()


def test_kernels_and_collectives_of_a_program():
    program = hlo.parse(HLO, "tpu")

    assert program.kernels == (hlo.KernelCall("jvp_scan_.1", "scan", calls=3),)
    assert program.collectives == (
        hlo.Collective("all-reduce.7", "all-reduce", bytes=8 * 128 * 2, calls=15),
    )
    assert set(program.others) == {"fusion.1", "copy.4", "multiply.2"}


def test_a_loop_of_unknown_length_is_named_and_counts_once():
    text = HLO.replace("constant(5)", "parameter(1)")

    program = hlo.parse(text, "tpu")

    assert program.unknown_loops == ("while.2",)
    assert program.cycles == 100 + 3 * (10 + 7)


SPLIT = """HloModule split

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %y = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(f)/while/body/attention/pallas_call"}
  ROOT %out = (s32[], f32[8]{0}) tuple(%next, %z)
  %z = f32[8]{0} fusion(%y), backend_config={"estimated_cycles":"9223372036854775807"}
}

%condition (p.1: (s32[], f32[8])) -> pred[] {
  %p.1 = (s32[], f32[8]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %limit = s32[] constant(12)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (x.1: f32[8]) -> f32[8] {
  %x.1 = f32[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8]{0}) tuple(%zero, %x.1)
  %loop = (s32[], f32[8]{0}) while(%start), condition=%condition, body=%body
  %sums = (f32[8]{0}, f32[4]{0}) all-reduce(%x.1, %x.1), replica_groups={}
  ROOT %result = f32[8]{0} get-tuple-element(%loop), index=1
}
"""


def test_line_breaks_in_attributes_roots_that_are_not_last_and_missing_estimates():
    program = hlo.parse(SPLIT, "tpu")

    assert program.unknown_loops == ()
    assert program.kernels == (hlo.KernelCall("y", "attention", calls=12),)
    assert (program.cycles, program.unestimated) == (0, 12)


def test_a_collective_of_several_arrays_moves_them_all():
    (found,) = hlo.parse(SPLIT, "tpu").collectives
    assert found == hlo.Collective("sums", "all-reduce", bytes=48, calls=1)


ON_SPARSECORES = """HloModule on_sparsecores

%gather (a: bf16[1,8]) -> bf16[4,8] {
  %a = bf16[1,8]{1,0} parameter(0)
  ROOT %whole = bf16[4,8]{1,0} all-gather(%a), channel_id=7, dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (x: bf16[1,8]) -> bf16[4,8] {
  %x = bf16[1,8]{1,0} parameter(0)
  %begun = ((), (), (s32[64]{0})) custom-call-start(), called_computations={%gather}
  %given = ((bf16[1,8]{1,0}), bf16[4,8]{1,0}, (s32[64]{0})) custom-call-update(%begun, %x)
  ROOT %ended = bf16[4,8]{1,0} custom-call-done(%given)
}
"""


def test_collectives_that_sparsecores_execute_are_counted():
    (found,) = hlo.parse(ON_SPARSECORES, "tpu").collectives
    assert found == hlo.Collective("whole", "all-gather", bytes=64, calls=1)


BESIDE = """HloModule beside

%begin (a: bf16[1,8]) -> bf16[4,8] {
  %a = bf16[1,8]{1,0} parameter(0)
  %whole.1 = bf16[4,8]{1,0} all-gather(%a), channel_id=7, dimensions={0}
  ROOT %begun = bf16[4,8]{1,0} custom-call(%whole.1), custom_call_target="AsyncStart"
}

%end (b: bf16[1,8]) -> bf16[4,8] {
  %b = bf16[1,8]{1,0} parameter(0)
  %whole.2 = bf16[4,8]{1,0} all-gather(%b), channel_id=7, dimensions={0}
  ROOT %ended = bf16[4,8]{1,0} custom-call(%whole.2), custom_call_target="AsyncDone"
}

%all-reduce-scatter.3 (c: f32[64]) -> f32[16] {
  %c = f32[64]{0} parameter(0)
  %sum = f32[64]{0} all-reduce(%c), channel_id=9, to_apply=%add
  ROOT %part = f32[16]{0} dynamic-slice(%sum)
}

ENTRY %main (x: bf16[1,8], y: f32[64]) -> f32[16] {
  %x = bf16[1,8]{1,0} parameter(0)
  %y = f32[64]{0} parameter(1)
  %first = bf16[4,8]{1,0} fusion(%x), kind=kCustom, calls=%begin
  %second = bf16[4,8]{1,0} fusion(%x), kind=kCustom, calls=%end
  %third = f32[16]{0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.3
  ROOT %fourth = f32[4]{0} reduce-scatter(%third), channel_id=11, to_apply=%add
}
"""


def test_a_collective_in_fusions_counts_once():
    """One that runs beside arithmetic is in several; a sum of which a part is kept is in one."""
    found = {c.name: c for c in hlo.parse(BESIDE, "tpu").collectives}
    assert found == {
        "fourth": hlo.Collective("fourth", "reduce-scatter", bytes=64, calls=1),
        "whole.1": hlo.Collective("whole.1", "all-gather", bytes=64, calls=1),
        "sum": hlo.Collective("sum", "reduce-scatter", bytes=256, calls=1),
    }


# Reports and budgets


def report(**changes):
    kernel = gpu.GpuKernel(
        name="toy",
        calls=1,
        grid=(256, 1, 1),
        cluster=(1, 1, 1),
        threads_per_cta=128,
        registers=40,
        spill_store_bytes=0,
        spill_load_bytes=0,
        stack_bytes=0,
        static_shared_bytes=0,
        dynamic_shared_bytes=32768,
        ctas_per_sm=6,
        counts={"fp32 fma": 1},
        executed={"fp32 fma": 4},
        loops=(),
        trip_counts=(),
        straight_instructions=1,
        straight_cycles=1,
        instructions_per_cta=4,
        cycles_per_warp=1,
        issue_bound_seconds=6e-6,
        latency_seconds=2e-6,
        bytes_in_flight=64 * 1024,
    )
    kernel = dataclasses.replace(kernel, **changes.pop("kernel", {}))
    fields = {
        "name": "toy/forward",
        "chip": H100,
        "jax_version": "0",
        "kernels": (kernel,),
        "other_operations": {},
        "argument_bytes": 16_000_000,
        "output_bytes": 16_000_000,
        "temporary_bytes": 0,
        "bytes_moved": 33_523_200,
        "bytes_minimum": 32_000_000,
        "memory_seconds": 1e-5,
        "matrix_flops": 0,
        "issue_seconds": 6e-6,
        "xla_seconds": 0.0,
    }
    return targets.TargetReport(**fields | changes)


def test_the_bound_is_the_larger_of_memory_and_issue():
    by_memory, by_issue = report(), report(issue_seconds=3e-5)

    assert (by_memory.bound, by_memory.seconds) == ("memory", 1e-5)
    assert (by_issue.bound, by_issue.seconds) == ("issue", 3e-5)
    assert by_memory.roofline_fraction == pytest.approx(32e6 / 3.35232e12 / 1e-5)
    assert report(xla_seconds=1e-5).seconds == pytest.approx(2e-5)
    assert report(issue_seconds=None).bound is None


def test_matrix_products_can_be_the_bound_and_the_floor():
    multiplied = report(matrix_flops=19_788_000_000)  # 20 us at 989.4 TFLOP/s

    assert (multiplied.bound, multiplied.seconds) == ("matrix", pytest.approx(2e-5))
    assert multiplied.floor_seconds == pytest.approx(2e-5)
    assert report().floor_seconds == pytest.approx(32e6 / 3.35232e12)
    budget = targets.Budget(floor_ratio=1.04)
    assert targets.broken_budgets(multiplied, budget) == []
    (message,) = targets.broken_budgets(report(), budget)
    assert message == "predicted time over the floor: 1.048, may be 1.040"


def test_json_holds_what_the_report_says():
    written = json.loads(json.dumps(report().to_json()))

    assert written["bound"] == "memory"
    assert written["issue_ratio"] == pytest.approx(0.6)
    assert written["kernels"][0]["registers"] == 40
    assert written["chip"]["name"] == "h100"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"kernel": {"spill_load_bytes": 8}}, "spills of toy: 8, may be 0"),
        ({"kernel": {"bytes_in_flight": 1024}}, "in flight per SM of toy: 1024, must be 40960"),
        ({"kernel": {"bytes_in_flight": None}}, "in flight per SM of toy: unknown"),
        ({"issue_seconds": 7.1e-6}, "issue time over memory time: 0.710, may be 0.700"),
        ({"issue_seconds": None}, "issue time over memory time: unknown"),
        ({"bytes_moved": 37_000_000}, "bytes moved over the minimum: 1.156, may be 1.150"),
    ],
)
def test_broken_budgets_are_named(changes, message):
    broken = targets.broken_budgets(report(**changes), targets.default_budget(H100))

    assert len(broken) == (0 if message is None else 1)
    if message is not None:
        assert message in broken[0]


def test_budgets_of_tpus_hold_issue_time_where_it_was_promised():
    held = {name: targets.default_budget(chip).issue_ratio for name, chip in targets.CHIPS.items()}

    assert {name for name, ratio in held.items() if ratio == 0.8} == {"v5e", "v5p", "v6e"}
    assert targets.default_budget(V5E).vmem_bytes == 16 * 2**20


# Catalogue and command line


def test_gpu_entries_state_what_they_move():
    with pytest.raises(ValueError, match="bytes_moved must be given"):
        catalogue.Entry("toy", "gpu", lambda _: None, bytes_minimum=1)
    with pytest.raises(ValueError, match="must be 'gpu' or 'tpu'"):
        catalogue.Entry("toy", "cuda", lambda _: None, bytes_minimum=1)


def test_entries_have_distinct_names_on_every_chip():
    for chip in targets.CHIPS.values():
        names = [
            entry.name
            for entry in catalogue.entries()
            if entry.platform == chip.platform and (entry.chips is None or chip.name in entry.chips)
        ]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize(("broken", "status"), [([], 0), (["spills of toy: 8, may be 0"], 1)])
def test_the_command_line_says_what_is_broken(monkeypatch, capsys, tmp_path, broken, status):
    asked = []

    def check(chip, kernel, dumps):
        asked.append((chip, kernel, dumps))
        return [(report(), broken)]

    monkeypatch.setattr(catalogue, "check", check)
    file = tmp_path / "report.json"

    assert command_line.main(["--chip=h100", "--kernel=toy", f"--json={file}"]) == status

    assert asked == [("h100", "toy", None)]
    out, err = capsys.readouterr()
    assert "toy/forward  h100" in out
    assert all(f"toy/forward on h100: {message}" in err for message in broken)
    assert json.loads(file.read_text())[0]["broken_budgets"] == broken


def test_the_command_line_fails_when_there_is_nothing_to_check(monkeypatch, capsys):
    monkeypatch.setattr(catalogue, "check", lambda *_: [])

    assert command_line.main(["--chip=v5e", "--kernel=nothing"]) == 1
    assert "nothing" in capsys.readouterr().out


def test_unknown_chips_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'a100': must be one of h100, h200, b200, v4"):
        targets.chip_named("a100")
    with pytest.raises(SystemExit):
        command_line.main(["--chip=h100,a100"])


def test_missing_compilers_are_named_with_the_way_out(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    shape = jax.ShapeDtypeStruct((8, 128), jnp.float32)

    for chip in ("v6e", "h200"):
        with pytest.raises(targets.MissingCompilerError, match=r"pip install 'swr_jax\[targets\]'"):
            targets.compile_for(chip, lambda x: x, shape)
