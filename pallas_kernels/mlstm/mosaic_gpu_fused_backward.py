"""The backward pass as two walks over the chunks, where there are sequences enough.

`mosaic_gpu_fused_rows` walks forward, with the states in registers, `mosaic_gpu_fused_columns`
back, with their cotangents. Between the chunks of a group nothing goes through memory. What passes
a chunk by, the cotangent of log c, is <dC', c C> for the first chunk of a group, C written down in
the one walk and read in the other; for the others it follows from the one before: what has passed
that by or was written in it is read in the next one or passes that by.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.mlstm import gates as rows_of
from pallas_kernels.mlstm import mosaic_gpu_fused_columns as columns
from pallas_kernels.mlstm import mosaic_gpu_fused_rows as rows
from pallas_kernels.mlstm.mosaic_gpu_pipeline import WIDEST_PRODUCT, Problem
from pallas_kernels.mlstm.tuning import TILE, fills

Array = jax.Array

# Chunks of a group: states to write and read are fewer, rounding errors of sums over it larger.
GROUP = 4


def suits(p: Problem, multiprocessors: int) -> bool:
    """Whether the walks hold the states, and no more than an eighth of the chip has no sequence.

    `TuningConfig.fused` decides, if it is not None, where they hold them.
    """
    if p.config.fused is False or p.q_dim > 2 * TILE or p.v_dim > WIDEST_PRODUCT:
        return False
    possible = p.v_dim % p.q_dim == 0 and min(rows.slots(p), columns.slots(p)) >= 2
    return possible and bool(p.config.fused or fills(p.sequences, multiprocessors))


def gradient(
    p: Problem, q, k, v, gates, carry, memory, normalizer, dh, dmemory, dnormalizer
) -> tuple[Array, ...]:
    """Return the cotangents of q, k, v, the rows of gates, log carry, memory and normalizer.

    Args:
        p: the problem, which the walks suit.
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
    dq, told, memories, normalizers = rows.gradient(
        p, GROUP, q, k, v, gates, carry, memory, normalizer, dh
    )
    dk, dv, d_columns, dmemory, dnormalizer, inner, dnormalizers = columns.gradient(
        p, GROUP, q, k, v, gates, carry, memories, told, dh, dmemory, dnormalizer
    )
    d_columns = jnp.sum(d_columns, axis=2)
    drows = jnp.concatenate([told[:, rows.ROW, None], d_columns], axis=1)

    def by_sequence(x: Array) -> Array:
        return x.reshape(p.sequences, -1)

    inner = jnp.sum(inner, axis=(1, 2)) + jnp.sum(dnormalizers * normalizers, axis=1)
    written, read = (jnp.sum(x, axis=1) for x in (drows[:, rows_of.D_KEPT], told[:, rows.RECALLED]))
    dcarry = _passed_by(*map(by_sequence, (carry, inner, written, read)))
    return dq, dk, dv, drows, dcarry.reshape(carry.shape), dmemory, dnormalizer


def _passed_by(carry: Array, inner: Array, written: Array, read: Array) -> Array:
    """Return the cotangent of log c, [B H, N], from sums over each chunk, likewise.

    Args:
        carry: c.
        inner: <dC', C> + <dn', n> of the first chunk of every group, [B H, G].
        written: sum of the cotangents of log a.
        read: sum of the cotangents of log g.
    """
    chunks = carry.shape[1]
    pad = [(0, 0), (0, -chunks % GROUP)]
    carry, written, read = (
        jnp.pad(x, pad).reshape(*inner.shape, GROUP) for x in (carry, written, read)
    )
    found = [carry[..., 0] * inner]
    for i in range(1, GROUP):
        passed = found[-1] + written[..., i - 1] - read[..., i]
        found.append(jnp.where(carry[..., i] > 0, passed, 0))
    return jnp.stack(found, axis=-1).reshape(carry.shape[0], -1)[:, :chunks]
