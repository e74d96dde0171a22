"""The backward pass as two walks over the chunks, where there are sequences enough.

`mosaic_gpu_fused_rows` walks forward, with the states in registers, `mosaic_gpu_fused_columns`
back, with their cotangents. Between the chunks of a group nothing goes through memory: C is
written down in the one walk and read in the other for the first chunk of each alone.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.hopper.chip import TILE
from pallas_kernels.hopper.tiles import WIDEST_PRODUCT
from pallas_kernels.mlstm import gates as rows_of
from pallas_kernels.mlstm import mosaic_gpu_fused_columns as columns
from pallas_kernels.mlstm import mosaic_gpu_fused_rows as rows
from pallas_kernels.mlstm import mosaic_gpu_pieces as pieces
from pallas_kernels.mlstm.mosaic_gpu_flows import passed_by
from pallas_kernels.mlstm.mosaic_gpu_problem import Problem
from pallas_kernels.mlstm.tuning import suited_pieces

Array = jax.Array

# Chunks of a group: states to write and read are fewer, rounding errors of sums over it larger.
GROUP = 8


def suited(p: Problem, multiprocessors: int) -> Problem | None:
    """Return the problem cut into pieces that fill the chip; None: the walks cannot or should not.

    `TuningConfig.fused` decides, if it is not None, where they hold the states.

    Args:
        p: the problem, its sequences whole.
        multiprocessors: of the chip.
    """
    if p.config.fused is False or p.q_dim > 2 * TILE or p.v_dim > WIDEST_PRODUCT:
        return None
    if p.v_dim % p.q_dim or min(rows.slots(p), columns.slots(p)) < 2:
        return None
    count = suited_pieces(p.config, p.sequences, p.time // TILE, multiprocessors)
    return None if count is None else dataclasses.replace(p, pieces=count)


def gradient(
    p: Problem,
    multiprocessors: int,
    q: Array,
    k: Array,
    v: Array,
    gates: Array,
    carry: Array,
    memory: Array,
    normalizer: Array,
    dh: Array,
    dmemory: Array,
    dnormalizer: Array,
) -> tuple[Array, ...]:
    """Return the cotangents of q, k, v, the rows of gates, log carry, memory and normalizer.

    Args:
        p: from `suited`.
        multiprocessors: of the chip.
        q, k: [B, T, H, Dk].
        v, dh: [B, T, H, Dv].
        gates: [B H N, 8, 64], float32.
        carry: c, [B H N].
        memory, normalizer: C and n before the first chunk, [B H, Dk, Dv] and [B H, Dk], float32.
        dmemory, dnormalizer: cotangents of the last ones.

    Returns:
        Of the rows [B H N, 4, 64], as `gates.gradient` takes them; the others like what they are
        of.
    """
    memory, normalizer = pieces.starts(
        *(p, k, v, gates, carry, memory, normalizer),
        name="mlstm_pieces_again",
        multiprocessors=multiprocessors,
    )
    dq, told, memories, normalizers = rows.gradient(
        p, GROUP, q, k, v, gates, carry, memory, normalizer, dh
    )
    dmemory, dnormalizer = pieces.ends(
        p, q, dh, told, carry, dmemory, dnormalizer, multiprocessors=multiprocessors
    )
    dk, dv, d_columns, *first, inner, dnormalizers = columns.gradient(
        p, GROUP, q, k, v, gates, carry, memories, told, dh, dmemory, dnormalizer
    )
    d_columns = jnp.sum(d_columns, axis=2)
    drows = jnp.concatenate([told[:, rows.ROW, None], d_columns], axis=1)

    inner = jnp.sum(inner, axis=(1, 2)) + jnp.sum(dnormalizers * normalizers, axis=1)
    dcarry = passed_by(
        GROUP,
        *(x.reshape(p.sequences, -1) for x in (carry, inner)),
        *(
            x.reshape(p.sequences, p.chunks, TILE)
            for x in (drows[:, rows_of.D_KEPT], told[:, rows.RECALLED])
        ),
    )
    return dq, dk, dv, drows, dcarry.reshape(carry.shape), *first
