"""Toy kernels, compiled for chips that are not there, whose figures can be known beforehand."""

import concurrent.futures
import json
import multiprocessing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import catalogue, targets
from pallas_kernels.targets import __main__ as command_line

pytestmark = pytest.mark.targets

GPU_SHAPE = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
TPU_SHAPE = jax.ShapeDtypeStruct((8192, 1024), jnp.float32)
TPUS = [name for name, chip in targets.CHIPS.items() if chip.platform == "tpu"]


def gpu_multiply_add(turns, rows=64, columns=64):
    """A TMA copy of tiles through `turns` multiply-adds of every element."""

    def multiply_add(x):
        def body(x_gmem, o_gmem, x_smem, o_smem, barrier):
            i, j = jax.lax.axis_index("i"), jax.lax.axis_index("j")
            tile = (pl.ds(i * rows, rows), pl.ds(j * columns, columns))
            plgpu.copy_gmem_to_smem(x_gmem.at[tile], x_smem, barrier)
            plgpu.barrier_wait(barrier)
            y = x_smem[...].astype(jnp.float32)
            y = jax.lax.fori_loop(0, turns, lambda _, y: y * 1.0001 + 0.5, y)
            o_smem[...] = y.astype(x.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o_smem, o_gmem.at[tile])
            plgpu.wait_smem_to_gmem(0)

        kernel = plgpu.kernel(
            body,
            out_type=x,
            grid=(x.shape[0] // rows, x.shape[1] // columns),
            grid_names=("i", "j"),
            kernel_name=f"multiply_add_{turns}_{rows}",
            scratch_types=[
                plgpu.SMEM((rows, columns), x.dtype),
                plgpu.SMEM((rows, columns), x.dtype),
                plgpu.Barrier(),
            ],
        )
        return kernel(x)

    return multiply_add


def tpu_multiply_add(x):
    """2 x + 1, in blocks of 256 rows, 32 rows at a time."""
    rows, steps = 256, x.shape[0] // 256 // 4

    def body(x_ref, o_ref):
        @pl.loop(0, rows // 32)
        def _(i):
            part = pl.ds(i * 32, 32)
            o_ref[part, :] = x_ref[part, :] * 2 + 1.0

    spec = pl.BlockSpec((rows, x.shape[1]), lambda i, j: (i * steps + j, 0))
    return pl.pallas_call(
        body,
        out_shape=x,
        grid=(4, steps),
        in_specs=[spec],
        out_specs=spec,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="multiply_add",
    )(x)


def tpu_too_many_values(x):
    """Carries more vector registers through a loop than there are."""

    def body(x_ref, o_ref):
        o_ref[...] = jax.lax.fori_loop(0, 10, lambda _, v: v * v + 1.5, x_ref[...])

    return pl.pallas_call(body, out_shape=x, name="too_many_values")(x)


def compile_toy(chip):
    """Compiles the GPU's toy; to be called in another process."""
    jax.config.update("jax_platforms", "cpu")
    return targets.compile_for(
        chip, gpu_multiply_add(100), GPU_SHAPE, launches=[targets.Launch(trip_counts=(10,))]
    )


def check_gpu_toy(report):
    (kernel,) = report.kernels
    assert kernel.name == "multiply_add_100_64"
    assert kernel.grid == (16, 16, 1)
    assert kernel.threads_per_cta == 128
    assert kernel.spills == 0
    # Two tiles of 16 KiB and a barrier of 8 bytes.
    assert kernel.dynamic_shared_bytes == 2 * 64 * 64 * 4 + 8
    # Each of 4096 elements has 100 multiply-adds, 32 to an instruction, or 64 where an instruction
    # does two; so the ten trips through a body of ten that the assembler has made of the loop are
    # right. And each is moved once each way, two to an access.
    at_once = 64 if report.chip.name == "b200" else 32
    assert kernel.executed["fp32 fma"] == 64 * 64 * 100 // at_once
    assert kernel.executed["shared load"] == kernel.executed["shared store"] == 64 * 64 // 64
    (loop,) = (loop for loop in kernel.loops if not loop.waits)
    assert loop.cycles >= loop.instructions >= loop.counts["fp32 fma"]
    assert loop.counts["fp32 fma"] == 64 * 64 * 10 // at_once // 4  # of four warps
    assert report.argument_bytes == report.output_bytes == 1024 * 1024 * 4
    assert report.bytes_moved == report.bytes_minimum == 2 * 1024 * 1024 * 4
    assert report.temporary_bytes == 0
    assert report.other_operations == {}
    assert report.memory_seconds == report.bytes_moved / report.chip.hbm_bytes_per_second
    per_sm = -(-256 // report.chip.cores)
    assert kernel.issue_bound_seconds == pytest.approx(
        per_sm * kernel.instructions_per_cta / 4 / report.chip.clock_hz
    )
    # An SM's scheduler needs a cycle for each, so this is a floor by arithmetic alone.
    fused = 64 * 64 * 100 // at_once
    assert kernel.issue_bound_seconds > per_sm * fused / 4 / report.chip.clock_hz


@pytest.mark.parametrize("chip", ["h100", "h200"])
def test_instructions_of_a_gpu_kernel_are_those_that_the_arithmetic_takes(chip):
    check_gpu_toy(compile_toy(chip))


def test_a_kernel_that_was_compiled_before_is_reported_alike():
    assert compile_toy("h100") == compile_toy("h100")


def test_another_generation_of_gpus_needs_another_process():
    compile_toy("h100")
    with pytest.raises(RuntimeError, match="use a new process"):
        targets.devices("b200")
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        check_gpu_toy(pool.submit(compile_toy, "b200").result())


def test_a_gpu_kernel_with_too_many_values_spills():
    shape = jax.ShapeDtypeStruct((1024, 768), jnp.bfloat16)

    report = targets.compile_for("h100", gpu_multiply_add(7, rows=256, columns=192), shape)

    # 384 float32 values in each of 128 threads, which have 255 registers.
    (kernel,) = report.kernels
    assert kernel.registers == 255
    assert kernel.spill_store_bytes >= (384 - 255) * 4
    assert kernel.spill_load_bytes >= (384 - 255) * 4
    assert kernel.counts["local (spill)"] > 0
    (message,) = (m for m in targets.broken_budgets(report, targets.Budget()) if "spills" in m)
    assert kernel.name in message


def test_dumps_can_be_kept(tmp_path):
    targets.compile_for("h100", gpu_multiply_add(3), GPU_SHAPE, dumps=tmp_path / "texts")

    assert {path.suffix for path in (tmp_path / "texts").iterdir()} >= {".ptx", ".sass_ctrl"}


@pytest.mark.parametrize("name", TPUS)
def test_cycles_and_bytes_of_a_tpu_kernel(name):
    report = targets.compile_for(name, tpu_multiply_add, TPU_SHAPE)

    (kernel,) = report.kernels
    # 32 steps, shared by the chip's cores, and two more since fetching and writing overlap.
    steps = 32 // report.chip.cores
    assert kernel.trip_counts == (steps + 2, 8)
    outer, inner = kernel.loops
    # A turn reads, doubles, adds one to and writes 32 rows of 1024, 8 x 128 to a register.
    assert inner.used["VALU"] == 2 * 32
    assert inner.used["VLOAD"] == inner.used["VSTORE"] == 32
    assert kernel.cycles == kernel.straight_bundles + (steps + 2) * (
        outer.bundles + 8 * inner.bundles
    )
    assert kernel.utilization["VSTORE"] <= 1
    assert kernel.issue_seconds == kernel.cycles / report.chip.clock_hz
    # Two windows each of 1 MiB for input and output, and the compiler's own scratch.
    assert 4 * 2**20 <= kernel.vmem_bytes <= 4 * 2**20 + 2**17
    assert kernel.spills == 0
    array = 8192 * 1024 * 4
    assert (kernel.read_bytes, kernel.written_bytes) == (array, array)
    assert report.argument_bytes == report.output_bytes == array
    assert report.bytes_ratio == 1
    assert report.bound == "memory"
    assert targets.broken_budgets(report, targets.default_budget(report.chip)) == []


def test_a_tpu_kernel_with_too_many_values_spills():
    shape = jax.ShapeDtypeStruct((1024, 128), jnp.float32)

    report = targets.compile_for("v5e", tpu_too_many_values, shape)

    (kernel,) = report.kernels
    # 128 registers' worth of values in 64: half of them go out and come back each turn.
    assert kernel.spills >= 2 * 64
    assert kernel.trip_counts == (10,)
    assert kernel.vmem_bytes >= 2 * 1024 * 128 * 4 + 64 * 4096
    (message,) = targets.broken_budgets(report, targets.Budget())
    assert "spills" in message


def test_the_limit_of_vmem_is_the_compilers():
    def taking(size):
        def copy(x):
            def body(x_ref, o_ref, scratch):
                scratch[pl.ds(0, 8), :] = x_ref[...]
                o_ref[...] = scratch[pl.ds(8, 8), :]

            spec = pl.BlockSpec((8, 128), lambda i: (i, 0))
            scratch = pltpu.VMEM((size // 512, 128), jnp.float32)
            return pl.pallas_call(
                body,
                out_shape=x,
                grid=(4,),
                in_specs=[spec],
                out_specs=spec,
                scratch_shapes=[scratch],
                name="taking",
            )(x)

        return copy

    shape = jax.ShapeDtypeStruct((32, 128), jnp.float32)
    for name in ("v5e", "v6e"):
        limit = targets.CHIPS[name].vmem_limit_bytes
        report = targets.compile_for(name, taking(limit - 2**19), shape)
        assert limit - 2**19 < report.kernels[0].vmem_bytes < limit
        with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
            targets.compile_for(name, taking(limit + 2**19), shape)


def test_blocks_of_narrow_arrays_are_counted_as_they_lie_in_memory():
    def double(x):
        def body(x_ref, o_ref):
            o_ref[...] = x_ref[...] * 2

        spec = pl.BlockSpec((1, 2048, 16), lambda i: (i, 0, 0))
        return pl.pallas_call(
            body, out_shape=x, grid=(1024,), in_specs=[spec], out_specs=spec, name="double"
        )(x)

    shape = jax.ShapeDtypeStruct((1024, 2048, 16), jnp.float32)
    report = targets.compile_for("v5e", double, shape)

    assert report.kernels[0].read_bytes == 1024 * 2048 * 128 * 4
    # The caller's arrays lie more densely; XLA copies them to and from what the kernel can read.
    assert report.temporary_bytes == report.bytes_moved == 2 * report.kernels[0].read_bytes
    assert len(report.other_operations) == 2
    assert report.xla_seconds > report.memory_seconds


def test_kernels_inside_loops_are_called_as_often():
    def repeated(x):
        return jax.lax.scan(lambda y, _: (tpu_multiply_add(y), None), x, None, length=5)[0]

    report = targets.compile_for("v5e", repeated, TPU_SHAPE)

    (kernel,) = report.kernels
    assert kernel.calls == 5
    assert report.issue_seconds == 5 * kernel.issue_seconds
    assert report.bytes_moved == 5 * 2 * 8192 * 1024 * 4


def test_a_function_without_kernels_is_refused():
    with pytest.raises(ValueError, match="no Pallas kernel"):
        targets.compile_for("v5e", lambda x: x + 1, TPU_SHAPE)


def test_a_sharded_program_of_a_loop():
    mesh = Mesh(np.array(targets.devices("v5e", "2x4")), ("data",))
    sharded = NamedSharding(mesh, PartitionSpec("data"))
    shape = jax.ShapeDtypeStruct((8, 1024, 1024), jnp.float32, sharding=sharded)

    def means(x):
        def step(y, _):
            return jnp.tanh(y + jnp.mean(y, axis=0, keepdims=True)), None

        return jax.lax.scan(step, x, None, length=5)[0]

    report = targets.compile_program("v5e", means, shape)

    assert report.argument_bytes == report.output_bytes == 1024 * 1024 * 4
    (collective,) = report.collectives
    assert (collective.kind, collective.bytes, collective.calls) == ("all-reduce", 2**22, 5)
    assert report.unknown_loops == ()
    # Each turn reads and writes what it adds up at least once, at some 1 KiB a cycle.
    assert report.cycles > 5 * 2**22 / 2048
    assert report.kernels == {}
    json.dumps(report.to_json())


def test_the_command_line_holds_entries_to_their_budgets(monkeypatch, capsys):
    def entry(name, fn, shape):
        return catalogue.Entry(
            name=name,
            platform="tpu",
            build=lambda _: (fn, (shape,)),
            bytes_minimum=2 * int(np.prod(shape.shape)) * 4,
        )

    good = entry("toy/good", tpu_multiply_add, TPU_SHAPE)
    spilling = jax.ShapeDtypeStruct((1024, 128), jnp.float32)
    bad = entry("toy/bad", tpu_too_many_values, spilling)
    monkeypatch.setattr(catalogue, "entries", lambda: (good, bad))

    assert command_line.main(["--chip=v6e", "--kernel=good"]) == 0
    assert "toy/good" in capsys.readouterr().out
    assert command_line.main(["--chip=v6e"]) == 1
    captured = capsys.readouterr()
    assert "toy/good" in captured.out
    assert "toy/bad on v6e: spills of too_many_values" in captured.err
    assert "toy/good" not in captured.err
