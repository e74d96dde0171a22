"""Section `check`: every kernel of the project against float64, forward and backward.

Kernels run through the public operators by name, at the sizes of a model (T 8192 and a few more,
128 heads), with awkward sizes, with states and packed documents. Each program, the forward pass
alone and the one with the backward pass, is compared with an oracle in NumPy and float64 that
shares no code with them: relative root mean square error of the output and of every gradient.
Inputs are drawn in the lower precision, so that both precisions have the same oracle. On a CPU the
kernels are simulated.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.swr.lane_order import from_lane_order
from swr_jax.benchmark import oracle, timing
from swr_jax.benchmark.device import platform
from swr_jax.benchmark.records import Session, first_line
from swr_jax.ops import (
    RecurrenceState,
    gated_sliding_window_recurrence,
    lane_order,
    reference,
    sliding_window_recurrence,
)

# Largest relative RMS error, by dtype of the arrays; the maths is in float32 always.
TOLERANCES = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 1e-3}
STATE = ("local", "carriers")
MODES = ("forward", "forward+backward")
_CASES_AT_ONCE = 4  # bounds the float64 copies


@dataclasses.dataclass(frozen=True)
class Case:
    """A recurrence to check: v [B, T, H, D] of `shape`, gates for every head or none.

    Attributes:
        packed: with an initial state in the middle of a block and documents packed into the rows;
            its oracle is the dense T x T operator.
        lane_order: through the TPU kernels that read the projections' own order, as Phalanx does.
    """

    shape: tuple[int, int, int, int]
    gated: bool
    lookback: int | None
    block_size: int = 16
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    packed: bool = False
    lane_order: bool = False

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of the operator's arrays."""
        return ("a", "b", "c", "v") if self.gated else ("a", "v")

    @property
    def name(self) -> str:
        """What it is, in words."""
        form = "gated" if self.gated else "plain"
        window = "exact" if self.lookback is None else f"lookback {self.lookback}"
        sizes = " x ".join(map(str, self.shape))
        packed = ", state and documents" if self.packed else ""
        order = ", lane order" if self.lane_order else ""
        return f"{form} {window}, block {self.block_size}, {sizes}{packed}{order}"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is checked."""

    cases: tuple[Case, ...]


_REAL = (1, 8192 + 5, 128, 16)
FULL = Sizes(
    (
        Case(_REAL, gated=False, lookback=1),
        Case(_REAL, gated=True, lookback=1),
        Case(_REAL, gated=False, lookback=None),
        Case(_REAL, gated=True, lookback=None),
        Case(_REAL, gated=True, lookback=1, block_size=64),
        Case(_REAL, gated=False, lookback=0),
        Case(_REAL, gated=True, lookback=1, lane_order=True),
        Case(_REAL, gated=False, lookback=None, lane_order=True),
        Case((3, 1001, 37, 40), gated=True, lookback=1, dtypes=("float32", "float16")),
        Case((3, 1001, 37, 40), gated=True, lookback=None, dtypes=("float32", "float16")),
        Case((2, 301, 5, 16), gated=True, lookback=1, packed=True),
        Case((2, 301, 5, 16), gated=False, lookback=None, packed=True),
    )
)
TINY = Sizes(
    (
        Case((1, 37, 2, 8), gated=True, lookback=1, dtypes=("bfloat16",)),
        Case((1, 21, 2, 8), gated=False, lookback=None, dtypes=("float32",)),
        Case((1, 19, 128, 16), gated=True, lookback=1, dtypes=("bfloat16",), lane_order=True),
    )
)


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
        arrays = {case: draw(case) for case in pending}
        with concurrent.futures.ThreadPoolExecutor(_CASES_AT_ONCE) as pool:
            # The oracles work while programs are compiled.
            expected = {case: pool.submit(expect, case, arrays[case]) for case in pending}
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
                "tolerance": TOLERANCES[trial.dtype],
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

    def lower(self, mode: str, arrays: Mapping[str, np.ndarray]) -> jax.stages.Lowered:
        """Lower a pass of the operator; it takes what `given` returns."""
        solve = functools.partial(self._solve, arrays)
        given, x_bar = self.given(arrays)
        with self.backend.tracing():
            if mode == "forward":
                return jax.jit(lambda given, _: solve(given)).lower(given, x_bar)
            return jax.jit(timing.with_gradient(solve)).lower((given,), x_bar)

    def given(self, arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, jax.Array], jax.Array]:
        """Return the arguments by name, and the output's cotangent."""
        given = {name: jnp.asarray(arrays[name], self.dtype) for name in self.case.arguments}
        if self.case.packed:
            given |= {name: jnp.asarray(arrays[name]) for name in STATE if arrays[name].size}
        return given, jnp.asarray(arrays["x_bar"], self.dtype)

    def _solve(self, arrays: Mapping[str, np.ndarray], given: dict[str, jax.Array]) -> jax.Array:
        case = self.case
        window = {"block_size": case.block_size, "lookback": case.lookback}
        inputs = [given[name] for name in case.arguments]
        if case.lane_order:
            a, *wide = inputs
            *gates, v = map(lane_order.to_lane_order, wide)
            x = lane_order.recurrence_in_lane_order(a, v, tuple(gates) or None, **window)
            return from_lane_order(x, a.shape[2])
        options = {**window, "implementation": self.backend.name}
        if case.packed:
            options["segment_ids"] = jnp.asarray(arrays["documents"])
            state = RecurrenceState.zeros(case.shape[0], *case.shape[2:], **window)
            options["initial_state"] = state.replace(
                position=jnp.asarray(arrays["position"]),
                **{name: given[name] for name in STATE if name in given},
            )
        operator = gated_sliding_window_recurrence if case.gated else sliding_window_recurrence
        return operator(*inputs, **options)


def trials_of(case: Case) -> list[Trial]:
    """Return a case in every kernel and dtype; in XLA's form, which is no kernel, in one dtype."""
    return [
        Trial(case, backend, dtype)
        for backend in platform.backends()
        if backend.name == "mosaic_tpu" or not case.lane_order
        for dtype in case.dtypes[: 1 if backend.name == "xla" else None]
    ]


def faults(record: Mapping) -> list[str]:
    """Return what is wrong, in words, from the section's record."""
    return [f"{m['case']}: {m['fault']}" for m in record["measurements"] if m["fault"]]


def draw(case: Case) -> dict[str, np.ndarray]:
    """Draw arguments and the output's cotangent, all exact in bfloat16 and float16.

    Returns:
        "a", ("b", "c",) "v", "x_bar"; where the case is packed also "local" and "carriers" of the
        initial state, and integers "position" [B] and "documents" [B, T].
    """
    random = np.random.default_rng(case.shape)
    batch, tokens, heads, features = case.shape

    def rounded(x: np.ndarray) -> np.ndarray:
        # To 8 bits, within the range of float16.
        mantissa, exponent = np.frexp(x)
        return np.ldexp(np.round(mantissa * 256) / 256, np.maximum(exponent, -6)).astype(np.float32)

    arrays = {"a": rounded(random.random(case.shape[:3], np.float32))}
    for name in ("b", "c", "v", "x_bar") if case.gated else ("v", "x_bar"):
        arrays[name] = rounded(random.standard_normal(case.shape, np.float32))
    if case.packed:
        exact = case.lookback is None
        carriers = (batch, case.lookback or 0, heads, features)
        position = np.zeros(batch) if exact else random.integers(1, case.block_size, batch)
        arrays["local"] = random.standard_normal((batch, heads, features), np.float32)
        arrays["carriers"] = random.standard_normal(carriers, np.float32)
        arrays["position"] = position.astype(np.int32)
        arrays["documents"] = np.cumsum(random.random((batch, tokens)) < 0.02, axis=1)
        arrays["documents"] = arrays["documents"].astype(np.int32)
    return arrays


def expect(case: Case, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return output "x" and the gradient of every array, in float64."""
    window = {"block_size": case.block_size, "lookback": case.lookback}
    given = [arrays[name].astype(np.float64) for name in case.arguments]
    if not case.packed:
        solve = oracle.gated_recurrence if case.gated else oracle.recurrence
        found = solve(*given, arrays["x_bar"], **window)
        return found if case.gated else {"x": found["x"], "a": found["a"], "v": found["u"]}
    batch, _, heads, features = case.shape
    state = reference.zero_state(batch, heads, features, case.lookback)
    window["initial_state"] = state._replace(
        **{name: arrays[name] for name in (*STATE, "position")}
    )
    window["segment_ids"] = arrays["documents"]
    x_bar = arrays["x_bar"].astype(np.float64)
    if case.gated:
        gradients = reference.gated_gradients(*given, x_bar, **window)
        x = reference.gated_sliding_window_recurrence(*given, **window)
    else:
        gradients = reference.sliding_window_gradients(*given, x_bar, **window)
        gradients["v"] = gradients.pop("u")
        x = reference.sliding_window_recurrence(*given, **window)
    wanted = (*case.arguments, *(name for name in STATE if arrays[name].size))
    return {"x": x} | {name: gradients[name] for name in wanted}


def judge(
    trial: Trial,
    programs: Mapping[str, jax.stages.Compiled | Exception],
    arrays: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
) -> dict:
    """Run both programs and compare; returns "errors" and "fault"."""
    errors = {}
    given, x_bar = trial.given(arrays)
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
    limit = TOLERANCES[trial.dtype]
    fault = None
    if worst > limit:
        fault = f"relative RMS error of {where}: {worst:.1e}, at most {limit:.0e} is allowed"
    return {"errors": errors, "fault": fault}
