"""Section `check`: every kernel of the project against float64, forward and backward.

Kernels run through the public operators by name, at the sizes of a model (recurrences of 8197
tokens and 128 heads, matrix memories of 2053 tokens), with awkward sizes, with states and packed
documents. Each program, the forward pass alone and the one with the backward pass, is compared with
an oracle in NumPy and float64 that shares no code with them: relative root mean square error of the
output and of every gradient. Inputs are drawn in the lower precision, so that both precisions have
the same oracle. On a CPU the kernels are simulated.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from swr_jax.benchmark import timing
from swr_jax.benchmark.device import (
    check_gated_delta,
    check_mlstm,
    check_recurrence,
    platform,
)
from swr_jax.benchmark.records import Session, first_line
from swr_jax.ops import reference

MODES = ("forward", "forward+backward")
_CASES_AT_ONCE = 4  # bounds the float64 copies

# What there is to check; each kind knows its arguments, its oracle and how exact it has to be.
Case = check_recurrence.Recurrence | check_mlstm.Cell | check_gated_delta.Rule


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is checked."""

    cases: tuple[Case, ...]


FULL = Sizes(check_recurrence.FULL + check_mlstm.FULL + check_gated_delta.FULL)
TINY = Sizes(check_recurrence.TINY + check_mlstm.TINY + check_gated_delta.TINY)


def run(sizes: Sizes, session: Session) -> Iterator[dict]:
    """Check every case in every backend.

    Yields:
        "case", "backend", "dtype", "tolerance", "errors" (relative RMS by program and quantity),
        and "fault": what is wrong, None where nothing is.
    """
    for cases in itertools.batched(sizes.cases, _CASES_AT_ONCE):
        trials = [
            trial for case in cases for trial in trials_of(case) if not session.is_done(trial.name)
        ]
        pending = list(dict.fromkeys(trial.case for trial in trials))
        arrays = {case: case.draw() for case in pending}
        with concurrent.futures.ThreadPoolExecutor(_CASES_AT_ONCE) as pool:
            # The oracles work while programs are compiled.
            expected = {case: pool.submit(case.expect, arrays[case]) for case in pending}
            programs = timing.compile_all(
                {
                    (trial, mode): functools.partial(trial.lower, mode, arrays[trial.case])
                    for trial in trials
                    for mode in MODES
                }
            )
        for trial in trials:
            compiled = {mode: programs.pop((trial, mode)) for mode in MODES}
            yield {
                "case": trial.name,
                "backend": trial.backend.name,
                "simulated": trial.backend.simulated,
                "dtype": trial.dtype,
                "tolerance": trial.tolerance,
                **judge(trial, compiled, arrays[trial.case], expected[trial.case].result()),
            }


@dataclasses.dataclass(frozen=True)
class Trial:
    """A case in one implementation and one dtype."""

    case: Case
    backend: platform.Backend
    dtype: str

    @property
    def name(self) -> str:
        """What it is, in words."""
        return f"{self.backend.name}, {self.dtype}: {self.case.name}"

    @property
    def tolerance(self) -> float:
        """Largest relative RMS error."""
        return self.case.tolerances[self.dtype]

    def lower(self, mode: str, arrays: Mapping[str, np.ndarray]) -> jax.stages.Lowered:
        """Lower a pass of the operator; it takes what the case gives."""
        solve = functools.partial(self.case.solve, self.backend.name, arrays)
        given, x_bar = self.case.given(arrays, self.dtype)
        with self.backend.tracing():
            if mode == "forward":
                return jax.jit(lambda given, _: solve(given)).lower(given, x_bar)
            return jax.jit(timing.with_gradient(solve)).lower((given,), x_bar)


def trials_of(case: Case) -> list[Trial]:
    """Return a case in every kernel and dtype; in XLA's form, which is no kernel, in one dtype."""
    return [
        Trial(case, backend, dtype)
        for backend in platform.backends()
        for dtype in case.dtypes_of(backend.name)
    ]


def faults(record: Mapping) -> list[str]:
    """Return what is wrong, in words, from the section's record."""
    return [f"{m['case']}: {m['fault']}" for m in record["measurements"] if m["fault"]]


def judge(
    trial: Trial,
    programs: Mapping[str, jax.stages.Compiled | Exception],
    arrays: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
) -> dict:
    """Run both programs and compare; returns "errors" and "fault"."""
    errors = {}
    given, x_bar = trial.case.given(arrays, trial.dtype)
    for mode, program in programs.items():
        if isinstance(program, Exception):
            return {"errors": errors, "fault": first_line(program)}
        try:
            if mode == "forward":
                found = {"x": program(given, x_bar)}
            else:
                x, (gradients,) = program((given,), x_bar)
                found = {"x": x, **gradients}
            found = jax.tree.map(np.asarray, found)
        except jax.errors.JaxRuntimeError as error:
            return {"errors": errors, "fault": first_line(error)}
        errors[mode] = {
            key: reference.relative_rms(value, expected[key]) for key, value in found.items()
        }
    worst, where = max(
        (error if error == error else np.inf, f"{key} {mode}")  # NaN is the worst
        for mode, found in errors.items()
        for key, error in found.items()
    )
    limit = trial.tolerance
    fault = None
    if worst > limit:
        fault = f"relative RMS error of {where}: {worst:.1e}, at most {limit:.0e} is allowed"
    return {"errors": errors, "fault": fault}
