"""What the Hopper kernels of the mLSTM compute, and where a thread block's part of it lies."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.hopper.chip import TILE
from pallas_kernels.hopper.tiles import opaque
from pallas_kernels.mlstm.tuning import TuningConfig

Array = jax.Array
Ref = jax.Ref


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is to be computed, static.

    Attributes:
        batch, time, heads, q_dim, v_dim: B, T, H, Dk, Dv; T a multiple of the chunk, Dk and Dv
            of 64.
        chunk: L, 64, 128 or, for the outputs and the states, 256.
        normalized: whether outputs are divided by max(|d|, floor) or by the floor.
        dtype: of q, k, v and h, and of the states between chunks.
        config: how the work is cut up.
        pieces: P, equal ones of every sequence, each a sequence of its own to the walks. Arrays by
            token are then [B P, T / P, H, D], those by sequence have an axis [B H P].
    """

    batch: int
    time: int
    heads: int
    q_dim: int
    v_dim: int
    chunk: int
    normalized: bool
    dtype: jnp.dtype
    config: TuningConfig
    pieces: int = 1

    @property
    def chunks(self) -> int:
        """N, chunks of a sequence or piece."""
        return self.time // self.chunk // self.pieces

    @property
    def sequences(self) -> int:
        """Heads of all batch elements, each a sequence of its own, or the pieces of these."""
        return self.batch * self.heads * self.pieces

    @property
    def groups(self) -> int:
        """Warpgroups that compute, one for each 64 tokens of a chunk, at most two."""
        return min(2, self.chunk // TILE)

    @property
    def v_tiles(self) -> int:
        """Tiles of 64 columns of v."""
        return self.v_dim // TILE


class Walk:
    """The sequence, or piece of one, that a thread block walks over from end to end.

    Attributes:
        batch, head: where it is in arrays by token, [B, T, H, D] or [B P, T / P, H, D].
        sequence, whole: where it is in arrays [B H P, ...], and in those [B H, ...].
        is_first, is_last: whether the sequence begins with it, and ends.
        number: where it is among those that are walked over.
    """

    def __init__(self, p: Problem, without: int | None = None):
        """`without` is a piece that is left out: the first or the last."""
        self.chunks = p.chunks
        self.head, self.batch = lax.axis_index("head"), lax.axis_index("batch")
        self.sequence = self.whole = self.number = self.batch * p.heads + self.head
        self.is_first = self.is_last = True
        if p.pieces > 1:
            piece = lax.axis_index("piece")
            self.number = self.whole * (p.pieces - (without is not None)) + piece
            if without == 0:
                piece = piece + 1
            self.is_first, self.is_last = piece == 0, piece == p.pieces - 1
            self.sequence = self.whole * p.pieces + piece
            self.batch = self.batch * p.pieces + piece

    @staticmethod
    def grid(p: Problem, without: int | None = None) -> dict[str, int]:
        """Thread blocks."""
        pieces = {"piece": p.pieces - (without is not None)} if p.pieces > 1 else {}
        return pieces | {"head": p.heads, "batch": p.batch}

    def index(self, chunk: Array) -> Array:
        """Where a chunk is in arrays [B H N, ...]."""
        return self.sequence * self.chunks + chunk


class Place:
    """The chunks of a sequence that a thread block does one after the other: its items.

    Every array lies in memory by token, [B, T, H, D], or by chunk, [B H N, ...].
    """

    def __init__(self, p: Problem):
        self.problem = p
        names = ("head", "batch", "span")
        self.head, self.batch, span = (opaque(lax.axis_index(name)) for name in names)
        self.first = span * p.config.span
        self.count = jnp.minimum(p.chunks - self.first, p.config.span)

    @staticmethod
    def grid(p: Problem) -> dict[str, int]:
        """Thread blocks."""
        return {"span": pl.cdiv(p.chunks, p.config.span), "head": p.heads, "batch": p.batch}

    def index(self, item: Array) -> Array:
        """Where an item is in arrays by chunk."""
        p = self.problem
        return (self.batch * p.heads + self.head) * p.chunks + self.first + item

    def tokens(self, ref: Ref, item: Array, tile: Array | None = None) -> Ref:
        """A chunk of an array by token, or a tile of 64 columns of it."""
        p = self.problem
        tokens = pl.ds((self.first + item) * p.chunk, p.chunk)
        return ref.at[self.batch, tokens, self.head, _columns(tile)]

    def own_tokens(
        self, ref: Ref, item: Array, group: Array, tile: Array | None = None, width: int = TILE
    ) -> Ref:
        """64 tokens of a chunk, as the rows of a warpgroup are."""
        p = self.problem
        tokens = pl.ds((self.first + item) * p.chunk + group * TILE, TILE)
        return ref.at[self.batch, tokens, self.head, _columns(tile, width)]

    def memory(self, ref: Ref, item: Array, rows: slice, tile: Array, width: int = TILE) -> Ref:
        """Rows of a chunk's C, [B H N Dk, Dv], and a tile of its columns."""
        first = self.index(item) * self.problem.q_dim + rows.start
        return ref.at[pl.ds(first, rows.stop - rows.start), _columns(tile, width)]


def _columns(tile: Array | None, width: int = TILE) -> Any:
    return slice(None) if tile is None else pl.ds(tile * width, width)


def rounds(p: Problem, widest: int) -> list[slice]:
    """Dk cut into parts of at most so many."""
    return [slice(x, min(x + widest, p.q_dim)) for x in range(0, p.q_dim, widest)]
