"""How the bodies of the TPU kernels reach a token of an array, in either layout that arrays have.

heads minor   [1, tokens, features, lanes]: a token is whole registers, features in sublanes
lane order    [1, tokens, features * lanes]: eight tokens share a register, one sublane each

The second is *turned* into the first on the way in and back on the way out, through scratch in
VMEM: a register of one feature is stored with a stride of a token, a token is read as it then lies.
That costs one store and one load per register, which the memory traffic still hides on most chips.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.swr.lane_order import LANES

# Tokens that are turned together: a packed register of a 16-bit type.
_TOGETHER = 16
Read = Callable[[int], jax.Array]
Write = Callable[[int, jax.Array], None]


def turned_shape(tokens: int, features: int) -> tuple[int, int]:
    """Float32 scratch that turns so many tokens."""
    return tokens * _stride(features), LANES


def _stride(features: int) -> int:
    """Rows from one token to the next: odd, so that strided stores and loads meet eight banks."""
    return features | 1


def _features(ref) -> int:
    return ref.shape[2] // LANES


def turn(ref, turned, first: int | jax.Array, count: int) -> None:
    """Turn `count` tokens from `first` on, a multiple of 16, for a `reader`.

    Nothing happens where `ref` (no such array) or `turned` (it has its heads minor) is None.
    """
    if ref is None or turned is None:
        return
    stride = _stride(_features(ref))
    for start in range(0, count, _TOGETHER):
        for feature in range(_features(ref)):
            x = ref[0, pl.ds(first + start, _TOGETHER), pl.ds(feature * LANES, LANES)]
            rows = pl.ds(start * stride + feature, _TOGETHER, stride=stride)
            turned[rows, :] = x.astype(jnp.float32)


def reader(ref, turned, first: int | jax.Array) -> Read | None:
    """Return a function from the number of a token after `first` to it, float32 [features, lanes].

    In lane order `turn` must have been called with the same arguments. None for no array.
    """
    if ref is None:
        return None
    if turned is None:
        return lambda row: ref[0, first + row].astype(jnp.float32)
    features = _features(ref)
    return lambda row: turned[pl.ds(row * _stride(features), features), :]


def writer(ref, turned, first: int | jax.Array, count: int) -> tuple[Write, Callable[[], None]]:
    """Return a function that writes a token, and one to call when all `count` are written.

    Arguments are as for `turn` and `reader`.
    """
    if turned is None:

        def write(row: int, x: jax.Array) -> None:
            ref[0, first + row] = x.astype(ref.dtype)

        return write, lambda: None

    features = _features(ref)
    stride = _stride(features)

    def write_turned(row: int, x: jax.Array) -> None:
        turned[pl.ds(row * stride, features), :] = x

    def finish() -> None:
        for start in range(0, count, _TOGETHER):
            for feature in range(features):
                x = turned[pl.ds(start * stride + feature, _TOGETHER, stride=stride), :]
                tokens = pl.ds(first + start, _TOGETHER)
                ref[0, tokens, pl.ds(feature * LANES, LANES)] = x.astype(ref.dtype)

    return write_turned, finish
