"""Section `tuning`: which `TuningConfig` is the fastest for each kernel on this device.

Forward and backward pass together, at the reference shape. From the default on, one field after the
other takes all the values that it may have, timed by turns with the default and with the best so
far; a value that is faster in three rounds of four stays. That is done twice. A configuration whose
output or gradients differ from the default's by more than 1e-6 (relative root mean square) is
refused, as is one that the compiler refuses; both are on record with the reason. In the simulation
on a CPU times mean nothing.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.swr import mosaic_gpu, tuning, tuning_tpu
from swr_jax.benchmark import timing
from swr_jax.benchmark.device import contest, platform
from swr_jax.benchmark.records import Session
from swr_jax.ops.evaluation import KERNELS

TOLERANCE = 1e-6

# By backend and field: the values to try.
VALUES: dict[str, dict[str, tuple[int, ...]]] = {
    "mosaic_gpu": {
        "chunk": (128, 256, 512, 1024, 2048),
        "heads": (8, 16, 32, 64),
        "backward_slots": (2, 3, 4, 5, 6),
        "forward_slots": (2, 3, 4, 5, 6, 8),
        "line": (16, 32, 64, 128, 256),
    },
    "mosaic_tpu": {
        "tile": (32, 64, 128, 256, 512, 1024),
        "rows": (16, 32),
        "features": (16, 32, 64),
    },
}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel to tune: one with gates or without, by its window."""

    gated: bool
    lookback: int | None
    block_size: int = 16

    @property
    def name(self) -> str:
        """As the predictions call it."""
        window = "exact" if self.lookback is None else f"window{self.block_size}"
        return f"{'gated' if self.gated else 'plain'}/{window}"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is tuned."""

    kernels: tuple[Kernel, ...]
    shape: tuple[int, int, int, int]  # B, T, H, D
    values: Mapping[str, Mapping[str, tuple[int, ...]]]
    budget: timing.Budget
    sweeps: int = 2


FULL = Sizes(
    kernels=(
        Kernel(gated=True, lookback=1),
        Kernel(gated=False, lookback=1),
        Kernel(gated=True, lookback=None),
        Kernel(gated=False, lookback=None),
        Kernel(gated=True, lookback=1, block_size=64),
        Kernel(gated=False, lookback=1, block_size=64),
    ),
    shape=(8, 8192, 128, 16),
    values=VALUES,
    budget=timing.Budget(seconds=1, min_rounds=5, max_rounds=11),
)
TINY = Sizes(
    kernels=(Kernel(gated=False, lookback=1),),
    shape=(1, 20, 2, 8),
    values={"mosaic_gpu": {"forward_slots": (3,)}, "mosaic_tpu": {"tile": (32,)}},
    budget=timing.Budget(seconds=0, min_rounds=2, max_rounds=2),
    sweeps=1,
)


def run(sizes: Sizes, session: Session) -> Iterator[dict]:
    """Tune every kernel that the device has.

    Yields:
        "case", "backend", "kernel", "field", "configs" (fields by contestant), "best" (the fields
        of the best configuration after this step), and what `contest.hold` returns.
    """
    backends = [backend for backend in platform.backends() if backend.name in sizes.values]
    before = None
    for sweep in range(1, sizes.sweeps + 1):
        if before is not None and before == _found(session):
            return
        before = _found(session) if sweep > 1 else None
        for backend in backends:
            for kernel in sizes.kernels:
                for field in sizes.values[backend.name]:
                    case = f"{backend.name}, {kernel.name}: {field}, sweep {sweep}"
                    if session.is_done(case):
                        continue
                    if session.is_over():
                        yield session.left_out(case)
                        continue
                    yield {"case": case} | step(backend, kernel, field, sizes, session)


def step(
    backend: platform.Backend, kernel: Kernel, field: str, sizes: Sizes, session: Session
) -> dict:
    """Try all values of one field."""
    arguments, cotangent = draw(kernel, sizes.shape)
    default = default_config(backend, kernel, arguments)
    current = _found(session).get((backend.name, kernel.name))
    current = default if current is None else dataclasses.replace(default, **current)
    configs = {"default": default, "current": current}
    left_out = {}
    for value in sizes.values[backend.name][field]:
        if value == getattr(current, field):
            continue
        try:
            configs[f"{field}={value}"] = dataclasses.replace(current, **{field: value})
        except ValueError as error:
            left_out[f"{field}={value}"] = str(error)
    if current == default:
        del configs["current"]
    sets = [((draw(kernel, sizes.shape, seed)[0]), cotangent) for seed in (0, 1)]
    entrants = {
        name: contest.Entrant(timing.with_gradient(kernel_of(backend, kernel, config)), sets)
        for name, config in configs.items()
    }
    with backend.tracing():
        found = contest.hold(
            entrants,
            sizes.budget,
            ("default", "current"),
            peers=contest.Peers(dict.fromkeys(configs, "default"), TOLERANCE),
        )
    reference = "current" if "current" in configs else "default"
    winners = {
        name: contestant["speedup"][reference]["median"]
        for name, contestant in found["contestants"].items()
        if contestant["speedup"].get(reference, {"lower": 0})["lower"] > 1
    }
    best = configs[max(winners, key=winners.get)] if winners else current
    return {
        "backend": backend.name,
        "kernel": kernel.name,
        "field": field,
        "configs": {name: dataclasses.asdict(config) for name, config in configs.items()},
        "best": dataclasses.asdict(best),
        **found,
        "left_out": left_out | found["left_out"],
    }


def kernel_of(backend: platform.Backend, kernel: Kernel, config: Any) -> Callable[..., jax.Array]:
    """Return a, (b, c,) v -> x."""
    module = importlib.import_module(KERNELS[backend.name])
    solve = functools.partial(
        module.block_two_pass,
        block_size=kernel.block_size,
        lookback=kernel.lookback,
        config=config,
    )
    return lambda a, *rest: solve(a, rest[-1], tuple(rest[:-1]) or None, None, None)[0]


def default_config(backend: platform.Backend, kernel: Kernel, arguments: tuple) -> Any:
    """Return the configuration that the operators use."""
    if backend.name == "mosaic_tpu":
        return tuning_tpu.TuningConfig()
    a, *gates, v = arguments
    window = {"block_size": kernel.block_size, "lookback": kernel.lookback}
    with backend.tracing():
        return mosaic_gpu.default_problem(a, v, tuple(gates) or None, **window).config


def draw(
    kernel: Kernel, shape: tuple[int, int, int, int], seed: int = 0
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Return arguments a, (b, c,) v, and a cotangent of the output."""
    keys = jax.random.split(jax.random.key(seed), 5)
    arrays = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys[1:]]
    a = jax.random.uniform(keys[0], shape[:3], jnp.bfloat16)
    return (a, *(arrays[:3] if kernel.gated else arrays[:1])), arrays[3]


def _found(session: Session) -> dict[tuple[str, str], dict]:
    """The best configurations so far, by backend and kernel."""
    return {(m["backend"], m["kernel"]): m["best"] for m in session.record["measurements"]}


def table(record: Mapping, sizes: Sizes = FULL) -> str | None:
    """Return the lines to paste as new defaults, from the section's record; None if none is better.

    Args:
        record: of this section.
        sizes: the kernels that were tuned, and at which shape.
    """
    better = {}
    for m in record["measurements"]:
        better.pop((m["backend"], m["kernel"]), None)
        if m["best"] != m["configs"]["default"]:
            better[m["backend"], m["kernel"]] = m["best"]
    lines = []
    for kernel in sizes.kernels:
        if ("mosaic_gpu", kernel.name) not in better:
            continue
        config = tuning.TuningConfig(**better["mosaic_gpu", kernel.name])
        a, *gates, v = jax.eval_shape(lambda kernel=kernel: draw(kernel, sizes.shape)[0])
        window = {"block_size": kernel.block_size, "lookback": kernel.lookback}
        key = mosaic_gpu.tuning_key(a, v, tuple(gates) or None, **window)
        lines.append(f"    # {kernel.name}\n    {key}: {config},")
    if lines:
        head = "# pallas_kernels/swr/tuning.py\nMEASURED: dict[tuple[int, int, int], TuningConfig]"
        lines = [f"{head} = {{", *lines, "}"]
    # One default serves all TPU kernels: the first to be tuned is the one in every Phalanx layer.
    for kernel in sizes.kernels:
        if ("mosaic_tpu", kernel.name) in better:
            lines.append(f"# pallas_kernels/swr/tuning_tpu.py, TuningConfig, by {kernel.name}")
            fields = better["mosaic_tpu", kernel.name]
            lines += [f"    {field}: int = {value}" for field, value in fields.items()]
            break
    return "\n".join(lines) or None
