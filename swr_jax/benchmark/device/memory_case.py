"""What the checks of matrix memories share: sizes, tolerances, arguments, documents."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from swr_jax.benchmark.device.draws import in_eight_bits


@dataclasses.dataclass(frozen=True)
class MemoryCase:
    """A matrix memory to check, from an empty state.

    Attributes:
        shape: (B, T, H, Dk, Dv).
        dtypes: of q, k and v.
        packed: with documents packed into the rows.
    """

    shape: tuple[int, int, int, int, int]
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    packed: bool = False

    # Largest relative RMS error, by dtype of q, k and v; gates are float32, as the maths.
    tolerances: ClassVar[Mapping[str, float]] = {"float32": 1e-5, "bfloat16": 4e-3, "float16": 4e-3}
    # Names of the operator's arguments, q, k and v first.
    arguments: ClassVar[tuple[str, ...]]

    @property
    def sizes(self) -> str:
        """Shape and documents, in words."""
        return " x ".join(map(str, self.shape)) + (", documents" if self.packed else "")

    def dtypes_of(self, backend: str) -> tuple[str, ...]:
        """Return the dtypes that a backend is checked in: one for XLA's form, no kernel."""
        if backend == "mosaic_gpu":  # It has no other.
            return tuple(dtype for dtype in self.dtypes if dtype == "bfloat16")
        return self.dtypes[: 1 if backend == "xla" else None]

    def rounded(
        self, arrays: Mapping[str, np.ndarray], random: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Return what was drawn, in 8 bits; if packed, with integers "documents"."""
        found = {name: in_eight_bits(x) for name, x in arrays.items()}
        if self.packed:
            documents = np.cumsum(random.random(self.shape[:2]) < 0.02, axis=1)
            found["documents"] = documents.astype(np.int32)
        return found

    def given(
        self, arrays: Mapping[str, np.ndarray], dtype: str
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        """Return the arguments by name, and the output's cotangent."""
        found = {name: jnp.asarray(arrays[name], dtype) for name in self.arguments[:3]}
        found |= {name: jnp.asarray(arrays[name]) for name in self.arguments[3:]}
        return found, jnp.asarray(arrays["x_bar"], dtype)

    def documents(self, arrays: Mapping[str, np.ndarray]) -> jax.Array | None:
        """Return `segment_ids`."""
        return jnp.asarray(arrays["documents"]) if self.packed else None
