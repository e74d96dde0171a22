"""Gated delta rules that section `check` compares with float64, and how."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import numpy as np

from swr_jax.benchmark.device.memory_case import MemoryCase
from swr_jax.ops import gated_delta_rule, reference_gated_delta


@dataclasses.dataclass(frozen=True)
class Rule(MemoryCase):
    """A gated delta rule to check, from an empty state; see `MemoryCase`."""

    arguments: ClassVar[tuple[str, ...]] = ("q", "k", "v", "alpha", "beta")

    @property
    def name(self) -> str:
        """What it is, in words."""
        return f"gated delta rule, {self.sizes}"

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
        return self.rounded(arrays, random)

    def solve(
        self, backend: str, arrays: Mapping[str, np.ndarray], given: dict[str, jax.Array]
    ) -> jax.Array:
        """Return the operator's output by a backend."""
        return gated_delta_rule(
            *(given[name] for name in self.arguments),
            segment_ids=self.documents(arrays),
            implementation=backend,
        )

    def expect(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return output "x" and the gradient of every array, in float64."""
        arguments = [np.asarray(arrays[name], np.float64) for name in self.arguments]
        documents = arrays.get("documents")
        o, _ = reference_gated_delta.gated_delta_rule(*arguments, segment_ids=documents)
        gradients = reference_gated_delta.gated_delta_gradients(
            *arguments, np.asarray(arrays["x_bar"], np.float64), segment_ids=documents
        )
        return {"x": o} | {name: getattr(gradients, name) for name in self.arguments}


FULL = (
    Rule((1, 2048 + 5, 4, 128, 256)),
    Rule((2, 301, 3, 64, 128), packed=True),
)
TINY = (Rule((1, 70, 1, 8, 16), dtypes=("bfloat16",)),)
