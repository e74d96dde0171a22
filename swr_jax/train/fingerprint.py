"""Fingerprints of arrays: what a checkpoint remembers, to know again what was put into it.

A fingerprint is Σ word_n · weight_n modulo 2^32 over an array's 32-bit words (an element of fewer
bits is a word by itself), n counting the elements in row-major order. Every weight is odd, so no
single wrong bit goes unseen, and weights differ, so neither do two elements that changed places;
anything else is missed with a probability of 2^-32. Sums of integers do not depend on their order:
the same numbers have the same fingerprint on every mesh, and none of them leaves its device.
"""

import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp

# Odd, with bits in no pattern: the golden ratio's, and two that scatter what it leaves together.
_STEP, _FIRST, _SECOND = 0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35


def fingerprints(tree: Any) -> dict[str, int]:
    """The fingerprint of every array of a pytree, by its path.

    Args:
        tree: pytree of arrays of any dtypes, PRNG keys among them, sharded in any way.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    found = jax.device_get(_fingerprints([leaf for _, leaf in leaves]))
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): int(value)
        for (path, _), value in zip(leaves, found, strict=True)
    }


def fingerprint_of_json(value: Any) -> int:
    """The CRC-32 of a JSON value, however its file spells it."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


@jax.jit
def _fingerprints(arrays: list[jax.Array]) -> list[jax.Array]:
    return [_fingerprint(array) for array in arrays]


def _fingerprint(array: jax.Array) -> jax.Array:
    words = _words(array)
    index = jnp.zeros(words.shape, jnp.uint32)
    # No reshape, which would gather what is split over devices.
    for axis, size in enumerate(words.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    weight = (index + 1) * jnp.uint32(_STEP)
    for factor in (_FIRST, _SECOND):
        weight = (weight ^ (weight >> 16)) * jnp.uint32(factor)
    return jnp.sum(words * (weight | 1), dtype=jnp.uint32)


def _words(array: jax.Array) -> jax.Array:
    """The bits of an array as uint32, with one more axis where an element has 64 of them."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    bits = min(8 * array.dtype.itemsize, 32)
    return jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)
