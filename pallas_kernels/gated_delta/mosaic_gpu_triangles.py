"""What tokens of a chunk are to each other, on Hopper GPUs: the inverse X and the scores P.

    M = strictly lower part of diag(beta) (K K^T * L),   X = (I + M)^-1,   P = Q K^T * L

L_ij = alpha_i ... alpha_{j+1} is made in steps: where i - j has doubled, products of the first and
of the last half. Then blocks on the diagonal are inverted, two at a time becoming one: of two whose
inverses are A and D, with the part B of M below A, the inverse has -D B A there. All pairs of a
level are done at once, in products of 64 by 64; nothing is larger than the inverse. A warpgroup has
a chunk.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_delta.mosaic_gpu_gates import WRITE, Gates
from pallas_kernels.hopper.chip import TILE
from pallas_kernels.hopper.parts import PARTS, product_of_parts, store_parts
from pallas_kernels.hopper.pipeline import full_barriers, launch
from pallas_kernels.hopper.tiles import (
    MATRIX,
    ROW,
    load_matrix,
    load_rows,
    matrices,
    over_rows,
    products,
    store_directly,
    transposed,
    vectors,
    where,
)

Array = jax.Array
Ref = jax.Ref

_SKEW = 8  # numbers between rows, so that rows lie in different banks of shared memory


class Triangles(NamedTuple):
    """Of every chunk of 64 tokens; S = B H N.

    Attributes:
        inverse, scores: X and P in two parts, [S, 2, 64, 64], bfloat16.
        decay: L, [S, 64, 64], float32; None where nobody wants it.
    """

    inverse: Array
    scores: Array
    decay: Array | None


def triangles(q: Array, k: Array, gates: Gates, *, keep: bool) -> Triangles:
    """Return what the tokens of each chunk are to each other.

    Args:
        q, k: [B, T, H, Dk], bfloat16, T = 64 N.
        gates: of the chunks.
        keep: whether to return L.
    """
    batch, time, heads, q_dim = q.shape
    chunks = time // TILE

    def body(q_gmem, k_gmem, alpha_gmem, numbers_gmem, inverse_gmem, scores_gmem, *refs):
        *decay_gmem, q_smem, k_smem, lower_smem, inverse_smem, steps_smem, windows_smem, full = refs
        own_batch, head, chunk = (lax.axis_index(axis) for axis in ("batch", "head", "chunk"))
        index = (own_batch * heads + head) * chunks + chunk
        tokens = pl.ds(chunk * TILE, TILE)
        plgpu.copy_gmem_to_smem(q_gmem.at[own_batch, tokens, head], q_smem, full.at[0])
        plgpu.copy_gmem_to_smem(k_gmem.at[own_batch, tokens, head], k_smem, full.at[0])
        strength = load_rows(numbers_gmem.at[index, WRITE])
        row, column = (
            plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), axis, layout=MATRIX) for axis in (0, 1)
        )
        decay = _decays(load_rows(alpha_gmem.at[index]), row == column, steps_smem, windows_smem)
        if keep:
            store_directly(decay_gmem[0].at[index], decay)
        plgpu.barrier_wait(full.at[0])

        keys = transposed(k_smem)
        lower, scores = products([(k_smem, keys)], [(q_smem, keys)])
        store_parts(scores * decay, inverse_smem)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(inverse_smem, scores_gmem.at[index])
        lower = where(row > column, over_rows(strength, lower) * lower * decay)
        store_parts(lower, lower_smem)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def corners(size: int) -> Array:
            """What lies below the first of two blocks, left of the second."""
            pair = row // (2 * size) == column // (2 * size)
            return pair & (row // size != column // size) & (row > column)

        inverse = jnp.where(row == column, jnp.float32(1), jnp.float32(0))
        inverse -= where(corners(1), lower)
        size = 2
        while size < TILE:
            store_parts(inverse, inverse_smem)
            plgpu.commit_smem()
            corner = where(corners(size), product_of_parts(inverse, lower_smem))
            inverse -= product_of_parts(corner, inverse_smem)
            size *= 2
        store_parts(inverse, inverse_smem)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(inverse_smem, inverse_gmem.at[index])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    sequences = batch * heads * chunks
    parts = jax.ShapeDtypeStruct((sequences, PARTS, TILE, TILE), jnp.bfloat16)
    kept = [jax.ShapeDtypeStruct((sequences, TILE, TILE), jnp.float32)] if keep else []
    scratch = [
        *(matrices(TILE, q_dim, dtype=q.dtype) for _ in range(2)),
        *(matrices(PARTS, TILE, TILE, dtype=q.dtype) for _ in range(2)),
        vectors(2 * TILE, TILE + _SKEW),
        vectors(2 * TILE),
        full_barriers(1, 2),
    ]
    grid = {"chunk": chunks, "head": heads, "batch": batch}
    out = [parts, parts, *kept]
    run = launch(body, "gated_delta_triangles", 1, out, scratch, loader=False, **grid)
    found = run(q, k, gates.alpha, gates.numbers)
    return Triangles(*found) if keep else Triangles(*found, None)


def _decays(window: Array, diagonal: Array, steps: Ref, windows: Ref) -> Array:
    """L: first of neighbours, then of those twice as far from each other.

    Args:
        window: alpha, a number for each row; then the product of as many as a step is long.
        diagonal: whether a number is there.
        steps: [128, 64 + some], where L is shifted down by what lies above its rows: zeros.
        windows: [128], the same of the windows.
    """
    above, own = pl.ds(0, TILE), pl.ds(TILE, TILE)
    decay = jnp.where(diagonal, jnp.float32(1), jnp.float32(0))
    steps[above, above] = plgpu.layout_cast(jnp.zeros_like(decay), MATRIX)
    store_directly(windows.at[above], plgpu.layout_cast(jnp.zeros_like(window), ROW))
    size = 1
    while size < TILE:
        shifted = pl.ds(TILE - size, TILE)
        steps[own, above] = decay
        store_directly(windows.at[own], window)
        plgpu.commit_smem()
        decay += over_rows(window, decay) * load_matrix(steps.at[shifted, above])
        window *= load_rows(windows.at[shifted])
        plgpu.commit_smem()
        size *= 2
    return decay
