"""mLSTMs that section `check` compares with float64, and how."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from swr_jax.benchmark.device.draws import in_eight_bits
from swr_jax.ops import mlstm, reference_mlstm

ARGUMENTS = ("q", "k", "v", "i", "f")
# Added to queries and keys, so that no denominator is a difference of large numbers.
_OVERLAP = 0.25


@dataclasses.dataclass(frozen=True)
class Cell:
    """An mLSTM to check, from an empty state.

    Attributes:
        shape: (B, T, H, Dk, Dv).
        packed: with documents packed into the rows.
    """

    shape: tuple[int, int, int, int, int]
    input_gate: str = "exp"
    chunk_size: int = 128
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    packed: bool = False

    # Largest relative RMS error, by dtype of q, k and v; gates are float32, as the maths.
    tolerances: ClassVar[Mapping[str, float]] = {"float32": 1e-5, "bfloat16": 4e-3, "float16": 4e-3}

    @property
    def name(self) -> str:
        """What it is, in words."""
        sizes = " x ".join(map(str, self.shape))
        packed = ", documents" if self.packed else ""
        return f"mlstm {self.input_gate}, chunk {self.chunk_size}, {sizes}{packed}"

    def dtypes_of(self, backend: str) -> tuple[str, ...]:
        """Return the dtypes that a backend is checked in: one for XLA's form, no kernel."""
        if backend == "mosaic_gpu":  # It has no other.
            return tuple(dtype for dtype in self.dtypes if dtype == "bfloat16")
        return self.dtypes[: 1 if backend == "xla" else None]

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
        found |= {name: jnp.asarray(arrays[name]) for name in ("i", "f")}
        return found, jnp.asarray(arrays["x_bar"], dtype)

    def solve(
        self, backend: str, arrays: Mapping[str, np.ndarray], given: dict[str, jax.Array]
    ) -> jax.Array:
        """Return the operator's output by a backend."""
        return mlstm(
            *(given[name] for name in ARGUMENTS),
            chunk_size=self.chunk_size,
            input_gate=self.input_gate,
            segment_ids=jnp.asarray(arrays["documents"]) if self.packed else None,
            implementation=backend,
        )

    def expect(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return output "x" and the gradient of every array, in float64."""
        h, gradients = reference_mlstm.parallel_gradients(
            *(arrays[name] for name in ARGUMENTS),
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
