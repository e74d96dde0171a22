"""What tests of recurrent layers share: random parameters, packed documents, streams in pieces."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def sample(length, features, batch=2):
    rng = np.random.default_rng(length)
    return jnp.asarray(rng.normal(size=(batch, length, features)), jnp.float32)


def randomise(layer):
    """Make every parameter random, those too that start at 0 or 1: kernels of fan-in scale."""
    rng = np.random.default_rng(1)
    draw = lambda x: rng.normal(size=x.shape) / np.sqrt(x.shape[0] ** (x.ndim - 1))  # noqa: E731
    nnx.update(layer, jax.tree.map(lambda x: jnp.asarray(draw(x), x.dtype), nnx.state(layer)))
    return layer


def parameters_of(layer):
    """{"query.kernel": float64 array, ...}"""
    found = nnx.to_flat_state(nnx.state(layer, nnx.Param))
    return {".".join(map(str, path)): np.asarray(x[...], np.float64) for path, x in found}


def documents(length, boundaries):
    """[2, length]: a new document at each of the boundaries in row 0; in row 1 at half of them."""
    starts = np.zeros((2, length), np.int32)
    starts[0, boundaries] = 1
    starts[1, boundaries[::2]] = 1
    return jnp.asarray(1 + np.cumsum(starts, axis=1), jnp.int32)


def fed_in_pieces(layer, step, x, chunks, segment_ids=None):
    """Outputs and last state of a stream fed in `chunks`, which add up to its length."""
    state, outputs, start = layer.init_state(len(x), max_length=x.shape[1]), [], 0
    for length in chunks:
        part = slice(start, start + length)
        ids = {} if segment_ids is None else {"segment_ids": segment_ids[:, part]}
        y, state = step(x[:, part], state, **ids)
        outputs.append(y)
        start += length
    assert start == x.shape[1]
    return jnp.concatenate(outputs, axis=1), state


def relative_error(got, wanted):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    return np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))
