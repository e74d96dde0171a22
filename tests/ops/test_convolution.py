"""Short convolutions on one device and over a mesh, against a loop over tokens."""

import jax
import numpy as np
import pytest
from mesh_cases import collectives, mesh_of
from mlstm_cases import assert_close, quick_jit

from swr_jax.ops.convolution import short_convolution

FLOAT32 = 1e-6


def draw(length, size, batch=4, features=6):
    """Input, kernel and cotangent; documents of about four tokens."""
    rng = np.random.default_rng(length)
    x, y_bar = rng.standard_normal((2, batch, length, features)).astype(np.float32)
    kernel = rng.standard_normal((size, features)).astype(np.float32)
    documents = np.cumsum(rng.uniform(size=(batch, length)) < 0.25, axis=1).astype(np.int32)
    return x, kernel, y_bar, documents % 3


def expected(x, kernel, y_bar, documents):
    """y and the gradients of x and kernel in float64."""
    x, kernel, y_bar = (np.asarray(z, np.float64) for z in (x, kernel, y_bar))
    y, x_bar, kernel_bar = np.zeros_like(x), np.zeros_like(x), np.zeros_like(kernel)
    for b, t in np.ndindex(*x.shape[:2]):
        for back in range(min(kernel.shape[0], t + 1)):
            if documents is not None and np.any(np.diff(documents[b, t - back : t + 1])):
                break
            weight = kernel[-1 - back]
            y[b, t] += weight * x[b, t - back]
            x_bar[b, t - back] += weight * y_bar[b, t]
            kernel_bar[-1 - back] += x[b, t - back] * y_bar[b, t]
    return y, x_bar, kernel_bar


def gradients(documents):
    def run(x, kernel, y_bar):
        y, pull = jax.vjp(lambda *z: short_convolution(*z, segment_ids=documents), x, kernel)
        return y, *pull(y_bar)

    return run


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("length", "size"), [(1, 4), (2, 4), (17, 4), (17, 1)])
def test_equals_a_loop_over_tokens(length, size, packed):
    x, kernel, y_bar, documents = draw(length, size)
    documents = documents if packed else None
    got = quick_jit(gradients(documents))(x, kernel, y_bar)
    for found, exact in zip(got, expected(x, kernel, y_bar, documents), strict=True):
        assert_close(found, exact, FLOAT32)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("length", "sizes", "neighbours"), [(32, (2, 1, 1, 4), 1), (16, (1, 1, 1, 8), 2)]
)
def test_a_split_sequence_hands_on_what_lies_before_the_cut(length, sizes, neighbours, packed):
    """Four tokens to see, of eight to a device, or of two."""
    x, kernel, y_bar, documents = draw(length, 4)
    documents = documents if packed else None
    mesh = mesh_of(*sizes)
    rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp"), "sequence", "tensor"))
    columns = jax.NamedSharding(mesh, jax.P(None, "tensor"))
    with jax.set_mesh(mesh):
        arguments = (jax.device_put(x, rows), jax.device_put(kernel, columns))
        run = quick_jit(gradients(documents), out_shardings=(rows, rows, columns))
        compiled = run.lower(*arguments, jax.device_put(y_bar, rows)).compile()
        got = compiled(*arguments, jax.device_put(y_bar, rows))
    # To the right and back; the kernel's gradient is everybody's sum. Identifiers do not go back.
    sent = collectives(compiled.as_text())
    assert sent.pop("all-reduce") <= 2
    assert sent == {"collective-permute": (3 if packed else 2) * neighbours}
    for found, exact in zip(got, expected(x, kernel, y_bar, documents), strict=True):
        assert_close(found, exact, FLOAT32)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_pieces_of_a_stream_are_one_call(length):
    x, kernel, _, documents = draw(12, 4)
    wanted = short_convolution(x, kernel, segment_ids=documents)
    before = np.zeros((4, 3, 6), np.float32)
    for start in range(0, 12, length):
        part = slice(start, start + length)
        if start:  # What the caller owes: nothing of another document.
            fresh = documents[:, start] != documents[:, start - 1]
            before = np.where(fresh[:, None, None], 0, before)
        y, before = short_convolution(
            x[:, part], kernel, before=before, segment_ids=documents[:, part], return_state=True
        )
        assert_close(y, np.asarray(wanted[:, part], np.float64), FLOAT32)
