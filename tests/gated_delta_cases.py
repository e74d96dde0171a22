"""Random problems for tests of the gated delta rule."""

from typing import NamedTuple

import numpy as np

DECAYS = ("uniform", "some zeros", "zeros", "ones", "near one", "tiny")
STRENGTHS = ("uniform", "zeros", "ones", "up to two")


class Problem(NamedTuple):
    """Arguments of the operator, in its order, with the cotangents of what it returns."""

    q: np.ndarray  # [B, T, H, Dk], unit vectors, as k
    k: np.ndarray
    v: np.ndarray  # [B, T, H, Dv]
    alpha: np.ndarray  # [B, T, H]
    beta: np.ndarray
    initial: np.ndarray  # [B, H, Dk, Dv]
    o_bar: np.ndarray
    final_bar: np.ndarray

    @property
    def arguments(self) -> tuple[np.ndarray, ...]:
        return self[:5]

    @property
    def cotangents(self) -> tuple[np.ndarray, np.ndarray]:
        return self[6:]

    def rounded(self, dtype: np.dtype) -> "Problem":
        return Problem(*(x.astype(dtype) for x in self))


def draw_gate(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    x, chosen = rng.uniform(0.05, 1.0, shape), rng.uniform(size=shape) < 0.3
    return {
        "uniform": x,
        "some zeros": np.where(chosen, 0.0, x),
        "zeros": np.zeros(shape),
        "ones": np.ones(shape),
        "near one": 1 - 0.01 * x,
        "tiny": np.where(chosen, 1e-30, x),
        "up to two": 2 * x,
    }[kind]


def draw(
    length: int,
    decay: str = "uniform",
    strength: str = "uniform",
    *,
    batch: int = 2,
    heads: int = 3,
    qk_dim: int = 5,
    v_dim: int = 7,
    likeness: float = 0.0,
    seed: int = 0,
) -> Problem:
    """A problem in float64; with a `likeness` of 1 all the keys of a head are the same."""
    rng = np.random.default_rng([seed, length])
    rows, state = (batch, length, heads), (batch, heads, qk_dim, v_dim)

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    k = unit(rng.standard_normal((*rows, qk_dim)))
    k = unit((1 - likeness) * k + likeness * k[:, :1])
    return Problem(
        q=unit(rng.standard_normal((*rows, qk_dim))),
        k=k,
        v=rng.standard_normal((*rows, v_dim)),
        alpha=draw_gate(decay, rows, rng),
        beta=draw_gate(strength, rows, rng),
        initial=rng.standard_normal(state),
        o_bar=rng.standard_normal((*rows, v_dim)),
        final_bar=rng.standard_normal(state),
    )


def draw_rows(
    length: int, heads: int, qk_dim: int, v_dim: int, seed: int = 0
) -> tuple[Problem, np.ndarray]:
    """Every kind of gate in a batch, in float32, and segment_ids.

    Each of the first rows has one kind of decay or strength, then come rows of keys that are alike
    and that are the same; all of these are one document. The last two rows are packed.
    """
    kinds = [{"decay": kind} for kind in DECAYS]
    kinds += [{"strength": kind, "decay": "near one"} for kind in STRENGTHS]
    kinds += [{"likeness": 0.8, "decay": "near one"}]
    kinds += [{"likeness": 1.0, "decay": "ones", "strength": "ones"}]
    kinds += [{}, {"decay": "near one"}]
    sizes = {"batch": 1, "heads": heads, "qk_dim": qk_dim, "v_dim": v_dim}
    rows = [draw(length, **kind, **sizes, seed=seed + i) for i, kind in enumerate(kinds)]
    documents = np.zeros((len(rows), length), np.int32)
    documents[-2:] = draw_documents(length, 2, seed)
    return Problem(*map(np.concatenate, zip(*rows, strict=True))).rounded(np.float32), documents


def draw_documents(length: int, batch: int = 2, seed: int = 0) -> np.ndarray:
    """Segments of 1 to about 20 tokens, int32 [B, T]."""
    rng = np.random.default_rng([seed, length, 1])
    return np.cumsum(rng.uniform(size=(batch, length)) < 0.15, axis=1).astype(np.int32)
