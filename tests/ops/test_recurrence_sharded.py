"""Recurrences over a mesh: what each device computes, and what travels between them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mesh_cases import collectives, mesh_of
from recurrence_cases import assert_close, draw

from swr_jax import gated_sliding_window_recurrence, nn, sliding_window_recurrence
from swr_jax.ops import reference as ref
from swr_jax.ops.evaluation import evaluate
from swr_jax.ops.sharded import split_of, with_state_over_mesh

FLOAT32 = 1e-6


def gradients(window, a, b, c, v, y_bar):
    """Output and every gradient."""
    y, pull = jax.vjp(lambda *x: gated_sliding_window_recurrence(*x, **window), a, b, c, v)
    return y, *pull(y_bar)


def run_split(window, sizes, *arguments):
    """`gradients` over a mesh, and the compiled text."""
    mesh = mesh_of(*sizes)
    sharding = jax.NamedSharding(mesh, jax.P(("data", "fsdp"), "sequence", "tensor"))
    with jax.set_mesh(mesh):
        arguments = [jax.device_put(x, sharding) for x in arguments]
        fn = jax.jit(lambda *x: gradients(window, *x), out_shardings=sharding)
        compiled = fn.lower(*arguments).compile()
        return compiled(*arguments), compiled.as_text()


def draw_arguments(length, batch=4, heads=4, features=3):
    a, v = draw(length, "some zeros", batch=batch, heads=heads, features=features)
    b, c, y_bar = np.random.default_rng(length).standard_normal((3, *v.shape))
    return [x.astype(np.float32) for x in (a, b, c, v, y_bar)]


ONE_EACH_WAY = {"collective-permute": 2}
GATHERED = {"all-gather": 1, "reduce-scatter": 1}


@pytest.mark.parametrize(
    ("length", "block_size", "lookback", "expected"),
    [
        (128, 16, 1, ONE_EACH_WAY),
        (148, 16, 1, ONE_EACH_WAY),  # 37 tokens to a device: blocks lie across the cuts
        (128, 16, 0, {}),  # no block lies across a cut, and none sees another
        (148, 16, 0, ONE_EACH_WAY),
        (160, 8, 2, ONE_EACH_WAY),
        (148, 8, 2, ONE_EACH_WAY),
        (148, 16, None, GATHERED),
    ],
)
def test_a_split_sequence_hands_on_one_carrier(length, block_size, lookback, expected):
    window = {"block_size": block_size, "lookback": lookback}
    arguments = draw_arguments(length)
    got, text = run_split(window, (2, 1, 1, 4), *arguments)
    assert collectives(text) == expected
    *inputs, y_bar = arguments
    wanted = ref.gated_gradients(*inputs, y_bar, **window)
    wanted_y = ref.gated_sliding_window_recurrence(*inputs, **window)
    for name, x, exact in zip("yabcv", got, [wanted_y, *map(wanted.get, "abcv")], strict=True):
        assert ref.relative_rms(x, exact) <= FLOAT32, name


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (2, 2, 2, 1), (1, 1, 4, 1)])
def test_batch_and_heads_are_computed_apart(sizes):
    window = {"block_size": 8, "lookback": 1}
    arguments = draw_arguments(20, batch=8)
    got, text = run_split(window, sizes, *arguments)
    assert collectives(text) == {}
    wanted = jax.jit(lambda *arguments: gradients(window, *arguments))(*arguments)
    for x, one_device in zip(got, wanted, strict=True):
        assert_close(x, np.asarray(one_device, np.float64), FLOAT32)


# The compiler of jaxlib 0.11 for CPUs crashes on some of these.
IS_NEW = jax.__version_info__ >= (0, 12)
WITH_GRADIENTS = (0, 1, 2, None) if IS_NEW else (2, None)


@pytest.mark.parametrize(
    "lookback",
    [
        pytest.param(0, marks=pytest.mark.skipif(not IS_NEW, reason="crashes jaxlib 0.11")),
        1,
        2,
        None,
    ],
)
def test_streams_with_a_state_are_computed_apart(lookback):
    """Two calls, the second from where the first one stopped in the midst of a block."""
    window = {"block_size": 8, "lookback": lookback}
    a, b, c, v, y_bar = draw_arguments(20, batch=8)
    options = window | {"return_state": True, "dtype": jnp.dtype("float32")}

    def stream(y_bar, *inputs):
        def call(a, v, gates, state):
            return evaluate("xla", a, v, gates, initial_state=state, **options)

        if split := split_of(*v.shape[:3]):  # as the operator does for a kernel
            call = with_state_over_mesh(call, split, True, **window)

        def run(a, b, c, v):
            state, out = None, []
            for part in (slice(None, 11), slice(11, None)):
                y, state = call(a[:, part], v[:, part], (b[:, part], c[:, part]), state)
                out.append(y)
            return jnp.concatenate(out, axis=1), state.local

        if lookback not in WITH_GRADIENTS:
            return run(*inputs)
        (y, local), pull = jax.vjp(run, *inputs)
        return y, local, *pull((y_bar, jnp.sin(local)))

    arguments = (y_bar, a, b, c, v)
    wanted = jax.jit(stream)(*arguments)
    mesh = mesh_of(2, 2, 2, 1)
    sharding = jax.NamedSharding(mesh, jax.P(("data", "fsdp"), None, "tensor"))
    with jax.set_mesh(mesh):
        arguments = [jax.device_put(x, sharding) for x in arguments]
        compiled = jax.jit(stream).lower(*arguments).compile()
        got = compiled(*arguments)
    assert collectives(compiled.as_text()) == {}
    for x, one_device in zip(got, wanted, strict=True):
        assert not x.sharding.is_fully_replicated
        assert_close(x, np.asarray(one_device, np.float64), FLOAT32)


def test_an_axis_that_does_not_divide_is_left_out():
    """Three rows, five heads; seven tokens, or parts that a window would reach past."""
    for length in (7, 32):
        a, u = (jnp.asarray(x, jnp.float32) for x in draw(length, batch=3, heads=5))
        with jax.set_mesh(mesh_of(2, 1, 2, 2)):
            x = jax.jit(sliding_window_recurrence)(a, u)
        np.testing.assert_array_equal(x, jax.jit(sliding_window_recurrence)(a, u))


def test_packed_documents_across_the_cuts():
    a, u = draw(96, batch=2, heads=2)
    documents = np.cumsum(np.random.default_rng(0).uniform(size=(2, 96)) < 0.1, axis=1)
    documents = documents.astype(np.int32)
    with jax.set_mesh(mesh_of(1, 1, 2, 2)):
        x = jax.jit(lambda a, u: sliding_window_recurrence(a, u, segment_ids=documents))(
            a.astype(np.float32), u.astype(np.float32)
        )
    assert_close(
        x,
        ref.sliding_window_recurrence(a, u, block_size=16, segment_ids=documents),
        FLOAT32,
    )


def test_the_layer_over_a_split_sequence_equals_one_device():
    """One carrier there for the window's heads, one back: and nothing else for the recurrence."""
    layer = nn.Phalanx(32, head_dim=8, rngs=nnx.Rngs(params=0))
    graph, parameters = nnx.split(layer)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 128, 32)), jnp.float32)

    def loss(x):
        return jnp.sum(jnp.square(nnx.merge(graph, parameters)(x)))

    wanted = jax.jit(jax.grad(loss))(x)
    mesh = mesh_of(2, 1, 1, 4)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data", "sequence")))
        compiled = jax.jit(jax.grad(loss), out_shardings=x.sharding).lower(x).compile()
        assert collectives(compiled.as_text()) == ONE_EACH_WAY
        assert_close(compiled(x), np.asarray(wanted, np.float64), FLOAT32)
