"""Gated delta rules that section `check` compares with float64, and how."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from swr_jax.benchmark.device.draws import in_eight_bits
from swr_jax.ops import gated_delta_rule, reference_gated_delta

ARGUMENTS = ("q", "k", "v", "alpha", "beta")


@dataclasses.dataclass(frozen=True)
class Rule:
    """A gated delta rule to check, from an empty state.

    Attributes:
        shape: (B, T, H, Dk, Dv).
        packed: with documents packed into the rows.
    """

    shape: tuple[int, int, int, int, int]
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    packed: bool = False

    # Largest relative RMS error, by dtype of q, k and v; gates are float32, as the maths.
    tolerances: ClassVar[Mapping[str, float]] = {"float32": 1e-5, "bfloat16": 4e-3, "float16": 4e-3}

    @property
    def name(self) -> str:
        """What it is, in words."""
        sizes = " x ".join(map(str, self.shape))
        return f"gated delta rule, {sizes}{', documents' if self.packed else ''}"

    def dtypes_of(self, backend: str) -> tuple[str, ...]:
        """Return the dtypes that a backend is checked in: one for XLA's form, no kernel."""
        if backend == "mosaic_gpu":  # It has no such kernel.
            return ()
        return self.dtypes[: 1 if backend == "xla" else None]

    def draw(self) -> dict[str, np.ndarray]:
        """Draw arguments, and the output's cotangent "x_bar"; if packed, integers "documents"."""
        random = np.random.default_rng(self.shape)
        batch, tokens, heads, q_dim, v_dim = self.shape
        rows = (batch, tokens, heads)

        def unit() -> np.ndarray:
            x = random.standard_normal((*rows, q_dim))
            return x / np.linalg.norm(x, axis=-1, keepdims=True)

        arrays = {
            "q": unit(),
            "k": unit(),
            "v": random.standard_normal((*rows, v_dim)),
            "alpha": 1 - np.geomspace(0.5, 0.001, heads) * random.random(rows),
            "beta": random.random(rows),
            "x_bar": random.standard_normal((*rows, v_dim)),
        }
        arrays = {name: in_eight_bits(x) for name, x in arrays.items()}
        if self.packed:
            documents = np.cumsum(random.random((batch, tokens)) < 0.02, axis=1)
            arrays["documents"] = documents.astype(np.int32)
        return arrays

    def given(
        self, arrays: Mapping[str, np.ndarray], dtype: str
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        """Return the arguments by name, and the output's cotangent."""
        found = {name: jnp.asarray(arrays[name], dtype) for name in ("q", "k", "v")}
        found |= {name: jnp.asarray(arrays[name]) for name in ("alpha", "beta")}
        return found, jnp.asarray(arrays["x_bar"], dtype)

    def solve(
        self, backend: str, arrays: Mapping[str, np.ndarray], given: dict[str, jax.Array]
    ) -> jax.Array:
        """Return the operator's output by a backend."""
        return gated_delta_rule(
            *(given[name] for name in ARGUMENTS),
            segment_ids=jnp.asarray(arrays["documents"]) if self.packed else None,
            implementation=backend,
        )

    def expect(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return output "x" and the gradient of every array, in float64."""
        arguments = [np.asarray(arrays[name], np.float64) for name in ARGUMENTS]
        documents = arrays.get("documents")
        o, _ = reference_gated_delta.gated_delta_rule(*arguments, segment_ids=documents)
        gradients = reference_gated_delta.gated_delta_gradients(
            *arguments, np.asarray(arrays["x_bar"], np.float64), segment_ids=documents
        )
        return {"x": o} | {name: getattr(gradients, name) for name in ARGUMENTS}


FULL = (
    Rule((1, 2048 + 5, 4, 128, 256)),
    Rule((2, 301, 3, 64, 128), packed=True),
)
TINY = (Rule((1, 70, 1, 8, 16), dtypes=("bfloat16",)),)
