"""mLSTMs that section `check` compares with float64, and how."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import numpy as np

from swr_jax.benchmark.device.memory_case import MemoryCase
from swr_jax.ops import mlstm, reference_mlstm

# Added to queries and keys, so that no denominator is a difference of large numbers.
_OVERLAP = 0.25


@dataclasses.dataclass(frozen=True)
class Cell(MemoryCase):
    """An mLSTM to check, from an empty state; see `MemoryCase`."""

    input_gate: str = "exp"
    chunk_size: int = 128

    arguments: ClassVar[tuple[str, ...]] = ("q", "k", "v", "i", "f")

    @property
    def name(self) -> str:
        """What it is, in words."""
        return f"mlstm {self.input_gate}, chunk {self.chunk_size}, {self.sizes}"

    def draw(self) -> dict[str, np.ndarray]:
        """Draw arguments, and the output's cotangent "x_bar"; if packed, integers "documents"."""
        random = np.random.default_rng(self.shape)
        batch, tokens, heads, q_dim, v_dim = self.shape
        rows = (batch, tokens, heads)
        arrays = {
            "q": random.standard_normal((*rows, q_dim)) + _OVERLAP,
            "k": random.standard_normal((*rows, q_dim)) + _OVERLAP,
            "v": random.standard_normal((*rows, v_dim)),
            "i": random.standard_normal(rows),
            "f": random.standard_normal(rows) + np.linspace(1, 5, heads),
            "x_bar": random.standard_normal((*rows, v_dim)),
        }
        return self.rounded(arrays, random)

    def solve(
        self, backend: str, arrays: Mapping[str, np.ndarray], given: dict[str, jax.Array]
    ) -> jax.Array:
        """Return the operator's output by a backend."""
        return mlstm(
            *(given[name] for name in self.arguments),
            chunk_size=self.chunk_size,
            input_gate=self.input_gate,
            segment_ids=self.documents(arrays),
            implementation=backend,
        )

    def expect(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return output "x" and the gradient of every array, in float64."""
        h, gradients = reference_mlstm.parallel_gradients(
            *(arrays[name] for name in self.arguments),
            arrays["x_bar"],
            input_gate=self.input_gate,
            segment_ids=arrays.get("documents"),
        )
        return {"x": h, **gradients}


FULL = (
    Cell((1, 2048 + 5, 4, 128, 256)),
    Cell((1, 2048 + 5, 4, 128, 256), input_gate="sigmoid"),
    Cell((1, 1024, 2, 256, 512), chunk_size=256),
    Cell((2, 301, 3, 64, 128), packed=True),
)
TINY = (Cell((1, 70, 1, 64, 64), chunk_size=64, dtypes=("bfloat16",)),)
