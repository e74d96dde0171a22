"""Recurrences that section `check` compares with float64, and how."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.swr.lane_order import from_lane_order
from swr_jax.benchmark import oracle
from swr_jax.benchmark.device.draws import in_eight_bits
from swr_jax.ops import (
    RecurrenceState,
    gated_sliding_window_recurrence,
    lane_order,
    reference,
    sliding_window_recurrence,
)

STATE = ("local", "carriers")


@dataclasses.dataclass(frozen=True)
class Recurrence:
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

    # Largest relative RMS error, by dtype of the arrays; the maths is in float32 always.
    tolerances: ClassVar[Mapping[str, float]] = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 1e-3}

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

    def dtypes_of(self, backend: str) -> tuple[str, ...]:
        """Return the dtypes that a backend is checked in: one for XLA's form, no kernel."""
        if self.lane_order and backend != "mosaic_tpu":
            return ()
        return self.dtypes[: 1 if backend == "xla" else None]

    def draw(self) -> dict[str, np.ndarray]:
        """Draw arguments and the output's cotangent, all exact in bfloat16 and float16.

        Returns:
            "a", ("b", "c",) "v", "x_bar"; if packed also "local" and "carriers" of the initial
            state, and integers "position" [B] and "documents" [B, T].
        """
        random = np.random.default_rng(self.shape)
        batch, tokens, heads, features = self.shape
        arrays = {"a": in_eight_bits(random.random(self.shape[:3], np.float32))}
        for name in (*self.arguments[1:], "x_bar"):
            arrays[name] = in_eight_bits(random.standard_normal(self.shape, np.float32))
        if self.packed:
            exact = self.lookback is None
            carriers = (batch, self.lookback or 0, heads, features)
            position = np.zeros(batch) if exact else random.integers(1, self.block_size, batch)
            arrays["local"] = random.standard_normal((batch, heads, features), np.float32)
            arrays["carriers"] = random.standard_normal(carriers, np.float32)
            arrays["position"] = position.astype(np.int32)
            arrays["documents"] = np.cumsum(random.random((batch, tokens)) < 0.02, axis=1)
            arrays["documents"] = arrays["documents"].astype(np.int32)
        return arrays

    def given(
        self, arrays: Mapping[str, np.ndarray], dtype: str
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        """Return the arguments by name, and the output's cotangent."""
        found = {name: jnp.asarray(arrays[name], dtype) for name in self.arguments}
        if self.packed:
            found |= {name: jnp.asarray(arrays[name]) for name in STATE if arrays[name].size}
        return found, jnp.asarray(arrays["x_bar"], dtype)

    def solve(
        self, backend: str, arrays: Mapping[str, np.ndarray], given: dict[str, jax.Array]
    ) -> jax.Array:
        """Return the operator's output by a backend."""
        window = {"block_size": self.block_size, "lookback": self.lookback}
        inputs = [given[name] for name in self.arguments]
        if self.lane_order:
            a, *wide = inputs
            *gates, v = map(lane_order.to_lane_order, wide)
            x = lane_order.recurrence_in_lane_order(a, v, tuple(gates) or None, **window)
            return from_lane_order(x, a.shape[2])
        options = {**window, "implementation": backend}
        if self.packed:
            options["segment_ids"] = jnp.asarray(arrays["documents"])
            state = RecurrenceState.zeros(self.shape[0], *self.shape[2:], **window)
            options["initial_state"] = state.replace(
                position=jnp.asarray(arrays["position"]),
                **{name: given[name] for name in STATE if name in given},
            )
        operator = gated_sliding_window_recurrence if self.gated else sliding_window_recurrence
        return operator(*inputs, **options)

    def expect(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return output "x" and the gradient of every array, in float64."""
        window = {"block_size": self.block_size, "lookback": self.lookback}
        given = [arrays[name].astype(np.float64) for name in self.arguments]
        if not self.packed:
            solve = oracle.gated_recurrence if self.gated else oracle.recurrence
            found = solve(*given, arrays["x_bar"], **window)
            return found if self.gated else {"x": found["x"], "a": found["a"], "v": found["u"]}
        batch, _, heads, features = self.shape
        state = reference.zero_state(batch, heads, features, self.lookback)
        window["initial_state"] = state._replace(
            **{name: arrays[name] for name in (*STATE, "position")}
        )
        window["segment_ids"] = arrays["documents"]
        x_bar = arrays["x_bar"].astype(np.float64)
        if self.gated:
            gradients = reference.gated_gradients(*given, x_bar, **window)
            x = reference.gated_sliding_window_recurrence(*given, **window)
        else:
            gradients = reference.sliding_window_gradients(*given, x_bar, **window)
            gradients["v"] = gradients.pop("u")
            x = reference.sliding_window_recurrence(*given, **window)
        wanted = (*self.arguments, *(name for name in STATE if arrays[name].size))
        return {"x": x} | {name: gradients[name] for name in wanted}


_REAL = (1, 8192 + 5, 128, 16)
FULL = (
    Recurrence(_REAL, gated=False, lookback=1),
    Recurrence(_REAL, gated=True, lookback=1),
    Recurrence(_REAL, gated=False, lookback=None),
    Recurrence(_REAL, gated=True, lookback=None),
    Recurrence(_REAL, gated=True, lookback=1, block_size=64),
    Recurrence(_REAL, gated=False, lookback=0),
    Recurrence(_REAL, gated=True, lookback=1, lane_order=True),
    Recurrence(_REAL, gated=False, lookback=None, lane_order=True),
    Recurrence((3, 1001, 37, 40), gated=True, lookback=1, dtypes=("float32", "float16")),
    Recurrence((3, 1001, 37, 40), gated=True, lookback=None, dtypes=("float32", "float16")),
    Recurrence((2, 301, 5, 16), gated=True, lookback=1, packed=True),
    Recurrence((2, 301, 5, 16), gated=False, lookback=None, packed=True),
)
TINY = (
    Recurrence((1, 37, 2, 8), gated=True, lookback=1, dtypes=("bfloat16",)),
    Recurrence((1, 21, 2, 8), gated=False, lookback=None, dtypes=("float32",)),
    Recurrence((1, 19, 128, 16), gated=True, lookback=1, dtypes=("bfloat16",), lane_order=True),
)
