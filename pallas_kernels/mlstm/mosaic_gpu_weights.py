"""The weights of a chunk's tokens, as the Hopper kernels of the mLSTM read them from the gates."""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.chip import TILE
from pallas_kernels.hopper.tiles import (
    COLUMN,
    ROW,
    load_columns,
    load_rows,
    opaque,
    over_columns,
    over_rows,
)
from pallas_kernels.mlstm import gates as rows_of

Array = jax.Array
Ref = jax.Ref

_LOG2_E = math.log2(math.e)


class Weights:
    """The weights A of a warpgroup's 64 rows i, or 64 columns j, and their places.

    The warpgroup's own tokens are the rows of matrices [64, width], one for each tile of so many of
    the chunk's tokens.
    """

    def __init__(self, gates: Ref, group: Array, *, own_columns: bool, width: int = TILE):
        self.gates, self.group, self.own_columns = gates, group, own_columns
        self.own, self.width = pl.ds(group * TILE, TILE), width

    def own_row(self, name: int) -> Array:
        """A row of the gates for the warpgroup's own tokens."""
        return load_rows(self.gates.at[name, self.own])

    def _row_of_tile(self, name: int, tile: int) -> Array:
        """A row of the gates for the tokens of a tile."""
        return load_columns(self.gates.at[name, pl.ds(tile * self.width, self.width)])

    def _own_places(self) -> Array:
        """The warpgroup's own tokens within the chunk."""
        return opaque(plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=ROW)) + self.group * TILE

    def _places(self, tile: int) -> tuple[Array, Array]:
        """The warpgroup's own tokens, and those of a tile, within the chunk, over a matrix."""
        like = jnp.zeros((TILE, self.width), jnp.int32)
        token = opaque(plgpu.broadcasted_iota(jnp.int32, (self.width,), 0, layout=COLUMN))
        return over_rows(self._own_places(), like), over_columns(token + tile * self.width, like)

    def seen(self, tile: int) -> Array:
        """Where j < i."""
        own, token = self._places(tile)
        return token > own if self.own_columns else token < own

    def diagonal(self, tile: int) -> Array:
        """Where i = j."""
        own, token = self._places(tile)
        return token == own

    def _difference(self, row: int, column: int, tile: int, like: Array) -> Array:
        """rows[row]_i - rows[column]_j."""
        own, other = (column, row) if self.own_columns else (row, column)
        x = over_rows(self.own_row(own), like)
        y = over_columns(self._row_of_tile(other, tile), like)
        return y - x if self.own_columns else x - y

    def matrix(self, tile: int) -> Array:
        """A, exactly 0 where nothing is read."""
        own, token = self._places(tile)
        exponent = self._difference(rows_of.ROW_HIGH, rows_of.COLUMN_HIGH, tile, own)
        exponent += self._difference(rows_of.ROW_LOW, rows_of.COLUMN_LOW, tile, own)
        # Numbers of rows (few in a thread) are converted, not those of columns.
        if self.own_columns:
            begin = over_columns(self._row_of_tile(rows_of.BEGIN, tile), own)
            reads = over_rows(self._own_places().astype(jnp.float32), own) >= begin
            reads &= token >= own
        else:
            begin = self.own_row(rows_of.BEGIN).astype(jnp.int32)
            reads = (token <= own) & (token >= over_rows(begin, own))
        # Selected behind the exponential, which may have overflowed where nothing is read.
        a = jnp.exp2(exponent * _LOG2_E)
        return jnp.where(reads, a, jnp.zeros_like(a))
