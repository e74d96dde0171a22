"""The backward pass as two walks over the chunks, where there are sequences enough.

`mosaic_gpu_fused_rows` walks forward, with the states in registers, `mosaic_gpu_fused_columns`
back, with their cotangents. Between the chunks of a group nothing goes through memory. What passes
a chunk by, the cotangent of log c, is <dC', c C> for the first chunk of a group, C written down in
the one walk and read in the other; for the others it follows from the one before, what has passed
that by or was written in it being read in the next one or passing that by, and is put right by the
next one that is known.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.mlstm import gates as rows_of
from pallas_kernels.mlstm import mosaic_gpu_fused_columns as columns
from pallas_kernels.mlstm import mosaic_gpu_fused_rows as rows
from pallas_kernels.mlstm import mosaic_gpu_pieces as pieces
from pallas_kernels.mlstm.mosaic_gpu_pipeline import WIDEST_PRODUCT, Problem
from pallas_kernels.mlstm.tuning import TILE, suited_pieces

Array = jax.Array

# A weight that is lost beside others in float32.
_NEGLIGIBLE = 2.0**-24

_LARGE = 2.0**100  # of which sums are finite

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
    terms = drows[:, rows_of.D_KEPT], told[:, rows.RECALLED]
    sums = [jnp.sum(x, axis=1) for x in terms]
    squares = [jnp.sum(jnp.minimum(x * x, _LARGE), axis=1) for x in terms]
    dcarry = _passed_by(*(x.reshape(p.sequences, -1) for x in (carry, inner, *sums, *squares)))
    return dq, dk, dv, drows, dcarry.reshape(carry.shape), *first


def _passed_by(
    carry: Array,
    inner: Array,
    written: Array,
    read: Array,
    written_squares: Array,
    read_squares: Array,
) -> Array:
    """Return the cotangent of log c, [B H, N], from sums over each chunk, likewise.

    It is known at marks: the first chunks of groups, and chunks that next to nothing passes by.
    From mark to mark it follows step by step, and what is wrong when it comes to the next one was
    the steps' error, each one's likely part in it growing with the squares of its terms.

    Args:
        carry: c.
        inner: <dC', C> + <dn', n> of the first chunk of every group, [B H, G].
        written: sum of the cotangents of log a.
        read: sum of the cotangents of log g.
        written_squares, read_squares: sums of their squares.
    """
    chunks = carry.shape[1]

    def by_group(x: Array, fill: float = 0.0) -> list[Array]:
        x = jnp.pad(x, [(0, 0), (0, -chunks % GROUP)], constant_values=fill)
        return list(jnp.moveaxis(x.reshape(*inner.shape, GROUP), 2, 0))

    carry = by_group(carry, fill=1.0)
    written, read, written_squares, read_squares = map(
        by_group, (written, read, written_squares, read_squares)
    )
    first = carry[0] * inner
    # The first of the next group, where there is one.
    after, has_after = (jnp.pad(x[:, 1:], [(0, 0), (0, 1)]) for x in (first, jnp.ones_like(first)))
    for x in (read, read_squares):
        x.append(jnp.pad(x[0][:, 1:], [(0, 0), (0, 1)]))

    found, doubt, is_mark, share = [first], [jnp.zeros_like(first)], [None], [None]
    for i in range(1, GROUP + 1):
        passed = found[-1] + written[i - 1] - read[i]
        unsure = doubt[-1] + written_squares[i - 1] + read_squares[i]
        if i < GROUP:
            mark, known = carry[i] < _NEGLIGIBLE, jnp.zeros_like(passed)
        else:
            mark, known = has_after > 0, after
        share.append((known - passed) / jnp.where(unsure > 0, unsure, 1))
        is_mark.append(mark)
        found.append(jnp.where(mark, known, passed))
        doubt.append(jnp.where(mark, 0, unsure))
    right = jnp.where(is_mark[GROUP], share[GROUP], 0)
    for i in reversed(range(1, GROUP)):
        found[i] += right * doubt[i]
        right = jnp.where(is_mark[i], share[i], right)
    return jnp.stack(found[:GROUP], axis=-1).reshape(carry[0].shape[0], -1)[:, :chunks]
