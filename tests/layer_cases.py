"""What tests of recurrent layers share: random parameters, packed documents, streams in pieces."""

import jax.numpy as jnp
import numpy as np
from flax import nnx


def sample(length, features, batch=2):
    rng = np.random.default_rng(length)
    return jnp.asarray(rng.normal(size=(batch, length, features)), jnp.float32)


def randomised(build):
    """The layer that `build` makes, with random parameters: kernels of fan-in scale.

    Those too that start at 0 or 1, where mistakes would not show.
    """
    rng = np.random.default_rng(1)
    definition, abstract = nnx.split(nnx.eval_shape(build))
    values = []
    for path, x in nnx.to_flat_state(abstract):
        is_kernel = len([name for name in x.out_sharding if name != "layers"]) == 2
        value = rng.normal(size=x.shape) / np.sqrt(x.shape[-2] if is_kernel else 1)
        values.append((path, x.replace(jnp.asarray(value, x.dtype))))
    return nnx.merge(definition, nnx.from_flat_state(values))


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


def numpy_mlstm_layer(x, p, options):
    """One document [T, M] in float64, token by token, from the equations without a stabilizer."""
    heads, cap = options["num_heads"], options.get("gate_soft_cap", 15.0)

    def gate(name):
        z = x @ p[f"{name}.kernel"] + p[f"{name}.bias"]
        return z if cap is None else cap * np.tanh(z / cap)

    q, k, v = (
        (x @ p[f"{name}.kernel"]).reshape(len(x), heads, -1) for name in ["query", "key", "value"]
    )
    i = np.exp(gate("input_gate"))
    if options.get("input_gate") == "sigmoid":
        i = sigmoid(gate("input_gate"))
    f = sigmoid(gate("forget_gate"))
    scale = p["head_norm.scale"].reshape(heads, -1)
    out = np.zeros_like(v)
    for head in range(heads):
        memory, normalizer = np.zeros((k.shape[2], v.shape[2])), np.zeros(k.shape[2])
        for t in range(len(x)):
            key = i[t, head] * k[t, head]
            memory = f[t, head] * memory + np.outer(key, v[t, head])
            normalizer = f[t, head] * normalizer + key
            query = q[t, head] / np.sqrt(q.shape[2])
            h = query @ memory / max(abs(query @ normalizer), 1.0)
            if options.get("head_norm", "layer") == "layer":
                h = h - h.mean()
            h = h / np.sqrt((h**2).mean() + options.get("norm_epsilon", 1e-6))
            out[t, head] = h * scale[head]
    return (sigmoid(x @ p["output_gate.kernel"]) * out.reshape(len(x), -1)) @ p["output.kernel"]
