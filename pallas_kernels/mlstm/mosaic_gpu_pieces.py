"""States between the pieces of sequences, so that walks may take each as a sequence of its own.

Where a chip has room for more sequences than there are, each is cut into P equal pieces. Let one
begin with the state C, whose weight in the state after it is c, the product of its chunks'. Then

    C' = c C + what the piece adds,

so that one walk over all pieces at once, but for the last, tells with what state each of them
begins. For the cotangents the same holds from the end to the beginning. Such a walk reads 2 of the
arrays once more, and multiplies once more for the state.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mlstm import gates as rows_of
from pallas_kernels.mlstm.mosaic_gpu_problem import Problem
from pallas_kernels.mlstm.mosaic_gpu_rows import RATIO, READ
from pallas_kernels.mlstm.mosaic_gpu_states import added

Array = jax.Array


def starts(
    p: Problem,
    k: Array,
    v: Array,
    gates: Array,
    carry: Array,
    memory: Array,
    normalizer: Array,
    *,
    name: str,
    multiprocessors: int,
) -> tuple[Array, Array]:
    """Return C [B H P, Dk, Dv] and n [B H P, Dk] before every piece.

    Args:
        p: the problem.
        k, v, gates, carry: as the walks take them.
        memory, normalizer: C and n before the first piece, [B H, Dk, Dv] and [B H, Dk], float32.
        name: of the kernel.
        multiprocessors: of the chip.
    """
    if p.pieces == 1:
        return memory, normalizer
    weights = gates, rows_of.KEPT
    options = {"backward": False, "name": name, "multiprocessors": multiprocessors}
    each = added(p, k, v, weights, None, carry, **options)
    return _handed_on(p, carry, (memory, normalizer), each)


def ends(
    p: Problem,
    q: Array,
    dh: Array,
    told: Array,
    carry: Array,
    dmemory: Array,
    dnormalizer: Array,
    *,
    multiprocessors: int,
) -> tuple[Array, Array]:
    """Return the cotangents of C and n after every piece, in arrays like those of `starts`.

    Args:
        p: the problem.
        q, dh, carry: as the walks take them.
        told: what the rows tell.
        dmemory, dnormalizer: after the last piece.
        multiprocessors: of the chip.
    """
    if p.pieces == 1:
        return dmemory, dnormalizer
    weights, ratios = (told, READ), (told, RATIO)
    options = {"name": "mlstm_pieces_backward", "multiprocessors": multiprocessors}
    each = added(p, q, dh, weights, ratios, carry, backward=True, **options)
    return _handed_on(p, carry, (dmemory, dnormalizer), each, reverse=True)


def _handed_on(
    p: Problem,
    carry: Array,
    given: tuple[Array, Array],
    each: tuple[Array, Array],
    *,
    reverse: bool = False,
) -> tuple[Array, ...]:
    """Return for every piece what is given, and what each adds, as far as it comes to there.

    Args:
        p: the problem.
        carry: c of every chunk.
        given: C and n at one end.
        each: what pieces add to them, [B H, P - 1, ...].
        reverse: whether that end is the last one.
    """
    weights = _products(jnp.prod(carry.reshape(-1, p.pieces, p.chunks), axis=2), reverse=reverse)
    own, others = weights[:, 0], weights[:, 1:]
    if reverse:
        own, others = weights[:, -1], weights[:, :-1]

    def joined(x: Array, added: Array) -> Array:
        found = jnp.einsum("sjt,sj...->st...", others, added, precision=lax.Precision.HIGHEST)
        found += own.reshape(*own.shape, *[1] * (x.ndim - 1)) * x[:, None]
        return found.reshape(-1, *x.shape[1:])

    return tuple(joined(x, added) for x, added in zip(given, each, strict=True))


def _products(decay: Array, *, reverse: bool) -> Array:
    """Return the products of `decay` [B H, P] from each piece j to each t, [B H, P, P].

    Of j, j + 1, ..., t - 1, and 0 where t < j; in reverse of j, j - 1, ..., t + 1, and 0 for t > j.
    """
    if reverse:
        return jnp.flip(_products(jnp.flip(decay, axis=1), reverse=False), axis=(1, 2))
    pieces = jnp.arange(decay.shape[1])
    begun = pieces[:, None] <= pieces
    running = jnp.cumprod(jnp.where(begun, decay[:, None], 1), axis=2)
    before = jnp.concatenate([jnp.ones_like(running[..., :1]), running[..., :-1]], axis=2)
    return jnp.where(begun, before, 0)
