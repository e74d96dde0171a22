"""What passes chunks by between reading and writing: cotangents of their carries, from sums.

c scales the memory that a chunk of an mLSTM hands on, and the cotangent of log c is what passes the
chunk by, <dC', c C> + <dn', c n>. Like water it comes from somewhere: what has passed one chunk by
or was written in it is read in the next one or passes that by, too. So it needs C and dC' at the
same time only now and then, at marks.
"""

import jax
import jax.numpy as jnp

Array = jax.Array

# A weight that is lost beside others in float32.
_NEGLIGIBLE = 2.0**-24
_LARGE = 2.0**100  # of which sums are finite


def passed_by(group: int, carry: Array, inner: Array, written: Array, read: Array) -> Array:
    """Return the cotangent of log c, [S, N], of N chunks of S sequences, float32.

    Marks are the first chunks of groups, and chunks that next to nothing passes by. From mark to
    mark it follows step by step; what is wrong when it comes to the next one was the steps' error,
    each one's likely part in it growing with the squares of its terms.

    Args:
        group: chunks of a group, the last one of which may have fewer.
        carry: c, [S, N].
        inner: <dC', C> + <dn', n> of the first chunk of every group, [S, N / group].
        written: cotangents of log a, the weights with which tokens are written, [S, N, L].
        read: cotangents of log g, with which they read what was there before the chunk, likewise.
    """
    chunks = carry.shape[1]

    def by_group(x: Array, fill: float = 0.0) -> list[Array]:
        """The first chunks of groups, the second ones, ..., each [S, groups]."""
        x = jnp.pad(x, [(0, 0), (0, -chunks % group)], constant_values=fill)
        return list(jnp.moveaxis(x.reshape(*inner.shape, group), 2, 0))

    def of_next(x: Array) -> Array:
        """The next group's; 0 where there is none."""
        return jnp.pad(x[:, 1:], [(0, 0), (0, 1)])

    def sums(x: Array) -> tuple[list[Array], list[Array]]:
        """Over each chunk, and of squares."""
        squares = jnp.sum(jnp.minimum(x * x, _LARGE), axis=2)
        return by_group(jnp.sum(x, axis=2)), by_group(squares)

    carry = by_group(carry, fill=1.0)
    (written, written_squares), (read, read_squares) = sums(written), sums(read)
    for x in (read, read_squares):
        x.append(of_next(x[0]))
    first = carry[0] * inner
    nothing = jnp.zeros_like(first)

    # From left to right; `share` is what a step's squares are multiplied by to find its error.
    found, doubt, is_mark, share = [first], [nothing], [None], [None]
    for i in range(1, group + 1):
        passed = found[-1] + written[i - 1] - read[i]
        unsure = doubt[-1] + written_squares[i - 1] + read_squares[i]
        mark, known = (
            (carry[i] < _NEGLIGIBLE, nothing)
            if i < group
            else (of_next(jnp.ones_like(first)) > 0, of_next(first))
        )
        share.append((known - passed) / jnp.where(unsure > 0, unsure, 1))
        is_mark.append(mark)
        found.append(jnp.where(mark, known, passed))
        doubt.append(jnp.where(mark, 0, unsure))
    # And back.
    right = jnp.where(is_mark[group], share[group], 0)
    for i in reversed(range(1, group)):
        found[i] += right * doubt[i]
        right = jnp.where(is_mark[i], share[i], right)
    return jnp.stack(found[:group], axis=-1).reshape(first.shape[0], -1)[:, :chunks]
