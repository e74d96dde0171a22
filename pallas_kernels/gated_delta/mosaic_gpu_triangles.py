"""What tokens of a chunk are to each other, on Hopper GPUs: the inverse X and the scores P.

    M = strictly lower part of diag(beta) (K K^T * L),   X = (I + M)^-1,   P = Q K^T * L

A warpgroup has a chunk. It inverts the blocks on the diagonal, two at a time becoming one: of two
blocks whose inverses are A and D, with the part B of M below A, the inverse has -D B A there. All
pairs of a level are done at once, in products of 64 by 64; nothing is larger than the inverse.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_delta.mosaic_gpu_parts import PARTS, product_of_parts, store_parts
from pallas_kernels.mlstm.mosaic_gpu_pipeline import full_barriers, launch
from pallas_kernels.mlstm.mosaic_gpu_tiles import (
    MATRIX,
    load_matrix,
    load_rows,
    matrices,
    over_rows,
    products,
    transposed,
    where,
)
from pallas_kernels.mlstm.tuning import TILE

Array = jax.Array


def triangles(q: Array, k: Array, decay: Array, strength: Array) -> tuple[Array, Array]:
    """Return X and P in two parts, [B H N, 2, 64, 64], bfloat16.

    Args:
        q, k: [B, T, H, Dk], bfloat16, T = 64 N.
        decay: L, [B H N, 64, 64], float32.
        strength: beta, [B H N, 64], float32.
    """
    batch, time, heads, q_dim = q.shape
    chunks = time // TILE

    def body(q_gmem, k_gmem, decay_gmem, strength_gmem, inverse_gmem, scores_gmem, *scratch):
        q_smem, k_smem, lower_smem, inverse_smem, full = scratch
        own_batch, head, chunk = (lax.axis_index(axis) for axis in ("batch", "head", "chunk"))
        index = (own_batch * heads + head) * chunks + chunk
        tokens = pl.ds(chunk * TILE, TILE)
        plgpu.copy_gmem_to_smem(q_gmem.at[own_batch, tokens, head], q_smem, full.at[0])
        plgpu.copy_gmem_to_smem(k_gmem.at[own_batch, tokens, head], k_smem, full.at[0])
        decay = load_matrix(decay_gmem.at[index])
        strength = load_rows(strength_gmem.at[index])
        row, column = (
            plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), axis, layout=MATRIX) for axis in (0, 1)
        )
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

    parts = jax.ShapeDtypeStruct((batch * heads * chunks, PARTS, TILE, TILE), jnp.bfloat16)
    scratch = [
        *(matrices(TILE, q_dim, dtype=q.dtype) for _ in range(2)),
        *(matrices(PARTS, TILE, TILE, dtype=q.dtype) for _ in range(2)),
        full_barriers(1, 2),
    ]
    grid = {"chunk": chunks, "head": heads, "batch": batch}
    run = launch(body, "gated_delta_triangles", 1, [parts, parts], scratch, loader=False, **grid)
    return tuple(run(q, k, decay, strength))
