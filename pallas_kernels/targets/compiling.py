"""Compiles functions for chips that are not there.

How the compilers are made to tell
    Mosaic GPU reads its MOSAIC_GPU_DUMP_* variables at every compilation, so each one gets a folder
    of its own and the variables are put back afterwards. It needs ptxas and nvdisasm on PATH. It
    compiles a kernel only once in a process, so what was written then is kept; and one process
    can compile for one compute capability only: for another, `compile_for` raises RuntimeError.
    libtpu reads LIBTPU_INIT_ARGS once, when it is loaded. `compile_for` sets them before that, with
    one folder for the whole process, and picks out what a compilation added. If libtpu was loaded
    without them, `compile_for` raises RuntimeError. They make large programs compile ten times as
    slowly, so a process that calls `compile_program` first loads libtpu without them.
    libtpu as a compiler touches no device, so the lock that keeps processes from sharing one is
    lifted (ALLOW_MULTIPLE_LIBTPU_LOAD).
JAX's persistent compilation cache is not used: what comes from it leaves no dumps.
"""

import atexit
import contextlib
import functools
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.targets import blocks, gpu, hlo, tpu
from pallas_kernels.targets.chips import Chip, chip_named
from pallas_kernels.targets.launch import Launch
from pallas_kernels.targets.report import ProgramReport, TargetReport

_GPU_DUMPS = ("PTX", "PTXAS", "SASS_CTRL")
_TPU_CATEGORIES = "codegen,ra"  # of dumps: final schedules, and registers and allocations
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


_compute_capabilities: set[tuple[int, int]] = set()  # compiled for in this process
_tpu_folder: Path | None = None  # that libtpu writes to in this process


class MissingCompilerError(ImportError):
    """A compiler for the chip is not installed."""


def compile_for(
    chip: str | Chip,
    fn: Callable[..., Any],
    *shapes: Any,
    launches: Sequence[Launch] = (),
    bytes_moved: int | None = None,
    bytes_minimum: int | None = None,
    matrix_flops: int = 0,
    name: str | None = None,
    dumps: Path | None = None,
) -> TargetReport:
    """Compiles a function of Pallas kernels for a chip and reports what it takes there.

    Args:
        chip: a name in `CHIPS`, or a `Chip`.
        fn: traceable function, jitted or not.
        *shapes: its arguments, pytrees of `jax.ShapeDtypeStruct`; one without a sharding is put on
            one device.
        launches: what the compiled text does not say; see `Launch`.
        bytes_moved: bytes that `fn` moves to and from HBM; None: see `TargetReport`.
        bytes_minimum: the least that it must move; None: arguments once and outputs once.
        matrix_flops: operations of its matrix products.
        name: what the report calls it; None: the function's name.
        dumps: folder that the compiler's texts of the kernels are copied to.

    Raises:
        MissingCompilerError: the optional dependency `targets` is not installed.
        RuntimeError: libtpu was loaded before, without the options that make it tell; or this
            process has compiled for GPUs of another compute capability.
        ValueError: no such chip, trip counts that do not match the loops, or no kernel in `fn`.
    """
    chip = chip_named(chip)
    name = name or getattr(fn, "__name__", type(fn).__name__)
    traced = _trace(chip, fn, shapes)
    with _dumping(chip) as new_files:
        compiled = _compile(chip, traced)
        files = new_files()
        if dumps is not None:
            dumps.mkdir(parents=True, exist_ok=True)
            for path in files:
                shutil.copy(path, dumps)
        program = hlo.parse(compiled.as_text(), chip.platform)
        if not program.kernels:
            raise ValueError(f"fn={name}: compiled for {chip.name} it has no Pallas kernel")
        if chip.platform == "gpu":
            kernels = gpu.read_kernels(files, chip, tuple(launches), program.kernels)
        else:
            moved = blocks.transfers(traced.jaxpr.jaxpr)
            kernels = tpu.read_kernels(files, chip, tuple(launches), moved, program.kernels)

    memory = compiled.memory_analysis()
    least = memory.argument_size_in_bytes + memory.output_size_in_bytes
    if bytes_moved is None:
        bytes_moved = least if chip.platform == "gpu" else _sum(kernels, "moved_bytes")
    issue = _sum(kernels, "issue_seconds")
    cycles = program.cycles or 0
    return TargetReport(
        name=name,
        chip=chip,
        jax_version=jax.__version__,
        kernels=kernels,
        other_operations=program.others,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        bytes_moved=bytes_moved,
        bytes_minimum=least if bytes_minimum is None else bytes_minimum,
        memory_seconds=None if bytes_moved is None else bytes_moved / chip.hbm_bytes_per_second,
        matrix_flops=matrix_flops,
        issue_seconds=issue,
        xla_seconds=cycles / chip.clock_hz,
    )


def compile_program(
    chip: str | Chip, fn: Callable[..., Any], *shapes: Any, name: str | None = None
) -> ProgramReport:
    """Compiles a whole XLA program for a chip and reports what its compiler estimates.

    For baselines and sharded programs; arguments are those of `compile_for`. To shard, give shapes
    with shardings over a mesh of `devices(chip, topology, kernels=False)`.

    Raises:
        MissingCompilerError, RuntimeError, ValueError: as `devices`.
    """
    chip = chip_named(chip)
    devices(chip, kernels=False)
    with _dumping(chip) if _dumps_kernels(chip) else contextlib.nullcontext():
        compiled = _compile(chip, _trace(chip, fn, shapes))
    program = hlo.parse(compiled.as_text(), chip.platform)
    memory = compiled.memory_analysis()
    accessed = (compiled.cost_analysis() or {}).get("bytes accessed")
    return ProgramReport(
        name=name or getattr(fn, "__name__", type(fn).__name__),
        chip=chip,
        jax_version=jax.__version__,
        cycles=program.cycles,
        cycles_seconds=None if program.cycles is None else program.cycles / chip.clock_hz,
        bytes_accessed=accessed,
        memory_seconds=None if accessed is None else accessed / chip.hbm_bytes_per_second,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        kernels={call.name: call.calls for call in program.kernels},
        collectives=program.collectives,
        unknown_loops=program.unknown_loops,
    )


def devices(chip: str | Chip, topology: str | None = None, *, kernels: bool = True) -> list[Any]:
    """Devices of a chip to compile for, such as `devices("v5e", "4x4")`.

    Args:
        chip: a name in `CHIPS`, or a `Chip`.
        topology: TPUs: chips along each axis; GPUs: partitions x hosts of each x GPUs of each,
            such as "1x1x8"; None: the smallest topology.
        kernels: TPUs: whether this process will call `compile_for`. Counts where libtpu is not
            loaded yet; see the module.

    Raises:
        MissingCompilerError: the optional dependency `targets` is not installed.
        RuntimeError: this process has compiled for GPUs of another compute capability.
        ValueError: no such chip.
    """
    chip = chip_named(chip)
    if chip.platform == "gpu":
        _require("jax_cuda13_plugin", "nvidia")
        return _gpu_devices(chip, topology or chip.topology)
    _require("libtpu")
    with _libtpu_told(kernels):
        return _tpu_devices(chip, chip.topology if topology is None else f"{chip.name}:{topology}")


def _trace(chip: Chip, fn: Callable[..., Any], shapes: tuple[Any, ...]) -> Any:
    mesh = Mesh(np.array(devices(chip)[:1]), ("device",))
    alone = NamedSharding(mesh, PartitionSpec())

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None) or alone
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    # A new function each time: JAX would not compile one again that it has compiled.
    def function(*arguments: Any) -> Any:
        return fn(*arguments)

    with jax.default_device(devices(chip)[0]):
        return jax.jit(function).trace(*jax.tree.map(placed, shapes))


def _compile(chip: Chip, traced: Any) -> Any:
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        # Pallas asks the default device which chip it lowers for.
        with jax.default_device(devices(chip)[0]):
            return traced.lower().compile()
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)


def _sum(kernels: Sequence[Any], attribute: str) -> Any:
    """Sum over all calls of all kernels, None where one is unknown."""
    amounts = [(getattr(kernel, attribute), kernel.calls) for kernel in kernels]
    if any(amount is None for amount, _ in amounts):
        return None
    return sum(amount * calls for amount, calls in amounts)


@functools.cache
def _gpu_devices(chip: Chip, topology: str) -> list[Any]:
    if _compute_capabilities - {chip.compute_capability}:
        raise RuntimeError(
            f"{chip.name} has compute capability {chip.compute_capability}, but this process has "
            f"compiled for {_compute_capabilities}; Mosaic GPU keeps the first one, so use a new "
            "process for each"
        )
    _compute_capabilities.add(chip.compute_capability)
    described = topologies.get_topology_desc(
        platform="cuda",
        topology_name=chip.name,
        topology=topology,
        target_config=chip.target_config(),
    )
    return list(described.devices)


@functools.cache
def _tpu_devices(chip: Chip, topology: str) -> list[Any]:
    options = {"chip_config_name": chip.configuration} if chip.configuration else {}
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    return list(described.devices)


def _require(*modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise MissingCompilerError(
                f"the module {module!r} is not installed; compiling for a chip that is not there "
                "needs the compilers: pip install 'swr_jax[targets]'"
            )


@contextlib.contextmanager
def _dumping(chip: Chip) -> Iterator[Callable[[], list[Path]]]:
    """Makes compilers write their texts; yields a function that lists those written since."""
    if chip.platform == "tpu":
        folder = _tpu_folder
        if folder is None:
            raise RuntimeError(
                "libtpu was loaded without the options that make it write schedules, which it "
                "reads only once: in this process something started JAX's TPU backend or called "
                "compile_program before compile_for; set JAX_PLATFORMS=cpu, call "
                f"pallas_kernels.targets.devices({chip.name!r}) first, or use a new process"
            )
        before = set(folder.iterdir())

        def added() -> list[Path]:
            return sorted(set(folder.iterdir()) - before)

        try:
            yield added
        finally:
            for path in added():
                path.unlink()
        return
    with tempfile.TemporaryDirectory(prefix="targets-") as name:
        variables = {"MOSAIC_GPU_DUMP_TO": name, "PATH": _path_with_cuda()}
        variables |= {f"MOSAIC_GPU_DUMP_{kind}": "1" for kind in _GPU_DUMPS}
        with _environment(variables):
            yield lambda: sorted(Path(name).iterdir())


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Sets variables for a while."""
    before = {key: os.environ.get(key) for key in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def _path_with_cuda() -> str:
    path = os.environ.get("PATH", "")
    specification = importlib.util.find_spec("nvidia")
    places = [] if specification is None else list(specification.submodule_search_locations or ())
    tools = [str(binaries) for place in places for binaries in Path(place).glob("cu*/bin")]
    return os.pathsep.join([*tools, path])


def _dumps_kernels(chip: Chip) -> bool:
    return chip.platform == "gpu" or _tpu_folder is not None


@contextlib.contextmanager
def _libtpu_told(kernels: bool) -> Iterator[None]:
    """Sets what libtpu reads when it is loaded, if it is not yet."""
    global _tpu_folder
    if _tpu_folder is not None or "libtpu.so" in Path("/proc/self/maps").read_text():
        yield
        return
    for name, value in _TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not kernels:
        yield
        return
    _tpu_folder = Path(tempfile.mkdtemp(prefix="targets-tpu-"))
    atexit.register(shutil.rmtree, _tpu_folder, ignore_errors=True)
    options = (
        f"--xla_jf_dump_to={_tpu_folder} --xla_jf_dump_llo_text=true --xla_jf_debug_level=2 "
        f"--xla_jf_dump_category_filter={_TPU_CATEGORIES}"
    )
    options = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {options}".strip()
    with _environment({"LIBTPU_INIT_ARGS": options}):  # Not of processes that this one starts.
        yield
