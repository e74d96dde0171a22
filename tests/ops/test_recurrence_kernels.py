"""The public operators and the layer through the kernels, simulated on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from recurrence_cases import (
    as_state,
    assert_close,
    assert_rows_close,
    assert_states_close,
    draw,
    draw_state,
    rounded,
)
from simulation import SIMULATED

from swr_jax import gated_sliding_window_recurrence, nn, sliding_window_recurrence
from swr_jax.ops import dispatch
from swr_jax.ops import reference as ref

FLOAT32 = 1e-6
HEADS, FEATURES = 3, 8


@pytest.fixture
def kernels_used(monkeypatch):
    """Names of the implementations that were called, in order."""
    from swr_jax.ops import recurrence

    names = []
    evaluate = recurrence.evaluate

    def spy(name, *args, **kwargs):
        result = evaluate(name, *args, **kwargs)
        names.append(name)
        return result

    monkeypatch.setattr(recurrence, "evaluate", spy)
    return names


@pytest.mark.parametrize("backend", SIMULATED)
@pytest.mark.parametrize(
    ("length", "lookback", "gated"),
    [(1, 1, False), (37, 1, True), (53, 0, False), (20, None, True)],
)
def test_states_in_and_out_with_their_gradients(backend, length, lookback, gated, kernels_used):
    """Rows of the batch stand at different places in their blocks, and one is packed."""
    a, u = draw(length, "some zeros", heads=HEADS, features=FEATURES)
    initial = rounded(draw_state(2, HEADS, FEATURES, lookback, 16))
    rng = np.random.default_rng(2)
    b, c = rng.standard_normal((2, 2, length, 1, FEATURES))
    arguments = {"a": a, "b": b, "c": c, "v": u} if gated else {"a": a, "u": u}
    arguments = {name: x.astype(np.float32) for name, x in arguments.items()}
    documents = np.zeros((2, length), np.int32)
    documents[1] = np.cumsum(rng.uniform(size=length) < 0.1)
    x_bar = rng.standard_normal(u.shape).astype(np.float32)
    window = {"block_size": 16, "lookback": lookback}

    @jax.jit
    def evaluate(arguments, initial, x_bar):
        def call(arguments, initial):
            operator = gated_sliding_window_recurrence if gated else sliding_window_recurrence
            return operator(
                **arguments,
                **window,
                initial_state=initial,
                segment_ids=documents,
                return_state=True,
            )

        x, pull, state = jax.vjp(
            lambda arguments: call(arguments, initial), arguments, has_aux=True
        )
        return x, state, pull(x_bar)[0]

    with SIMULATED[backend]():
        x, state, gradients = evaluate(arguments, as_state(initial, 16, lookback), x_bar)
    assert kernels_used == [backend]

    options = window | {"initial_state": initial, "segment_ids": documents}
    inputs = {name: np.float64(value) for name, value in arguments.items()}
    if gated:
        wanted_x = ref.gated_sliding_window_recurrence(**inputs, **options)
        wanted = ref.gated_gradients(**inputs, y_bar=x_bar, **options)
        streamed = np.repeat(inputs["b"], HEADS, axis=2) * inputs["v"]
    else:
        wanted_x = ref.sliding_window_recurrence(**inputs, **options)
        wanted = ref.sliding_window_gradients(**inputs, x_bar=x_bar, **options)
        streamed = inputs["u"]
    decays = ref.reset_decays(inputs["a"], documents)
    assert_rows_close(x, wanted_x, FLOAT32, "x")
    assert_states_close(state, ref.stream(decays, streamed, 16, lookback, initial)[1], FLOAT32)
    for name, gradient in gradients.items():
        assert_rows_close(gradient, wanted[name], FLOAT32, name)


@pytest.mark.parametrize("backend", SIMULATED)
def test_pieces_continue_each_other(backend):
    """Prompts that end at, before and after a block's edge, then one more piece."""
    a, u = draw(70, heads=HEADS, features=FEATURES)
    a, u = a.astype(np.float32), u.astype(np.float32)
    expected = ref.sliding_window_recurrence(a, u, block_size=16)
    for cut in (15, 16, 48):
        with SIMULATED[backend]():
            first, state = sliding_window_recurrence(a[:, :cut], u[:, :cut], return_state=True)
            second = sliding_window_recurrence(a[:, cut:], u[:, cut:], initial_state=state)
        assert_rows_close(jnp.concatenate([first, second], axis=1), expected, FLOAT32)


@pytest.mark.parametrize("backend", SIMULATED)
def test_the_layer_trains_through_the_kernels(backend, kernels_used):
    """Gradients of every parameter agree with those through XLA, window and global heads alike."""
    layer = nn.Phalanx(24, head_dim=8, num_gate_heads=3, global_heads=1, rngs=nnx.Rngs(params=0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 21, 24)), jnp.float32)
    graph, parameters = nnx.split(layer)

    def loss(parameters):
        return jnp.mean(jnp.square(nnx.merge(graph, parameters)(x)))

    wanted_loss, wanted = jax.jit(jax.value_and_grad(loss))(parameters)
    with SIMULATED[backend]():
        got_loss, got = jax.jit(jax.value_and_grad(loss))(parameters)
    assert kernels_used == ["xla", "xla", backend, backend]
    assert_close(got_loss, wanted_loss, FLOAT32)
    for gradient, expected in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert_close(gradient, expected, 2e-6)


@pytest.mark.parametrize(
    ("backend", "options", "features", "reason"),
    [
        ("mosaic_gpu", {}, 5, "D=5: the kernels need a multiple of 8"),
        ("mosaic_gpu", {"block_size": 8}, 8, "block_size=8: the kernels take 16 to 128"),
        ("mosaic_gpu", {"lookback": 2}, 8, "lookback=2: the kernels have 0, 1 and None"),
        ("mosaic_tpu", {"lookback": 2}, 8, "lookback=2: the TPU kernels have 0, 1 and None"),
    ],
)
def test_what_the_kernels_do_not_cover_goes_to_xla_unless_they_were_named(
    backend, options, features, reason, kernels_used
):
    a, u = (jnp.asarray(x, jnp.float32) for x in draw(20, heads=HEADS, features=features))
    with SIMULATED[backend]():
        x = sliding_window_recurrence(a, u, **options)
        with pytest.raises(NotImplementedError, match=reason):
            sliding_window_recurrence(a, u, implementation=backend, **options)
    assert kernels_used == ["xla"]
    np.testing.assert_array_equal(x, sliding_window_recurrence(a, u, **options))


@pytest.mark.parametrize(
    ("target", "names"),
    [
        (("cpu", "cpu"), ("xla",)),
        (("gpu", "NVIDIA H100 80GB HBM3"), ("mosaic_gpu", "xla")),
        (("gpu", "NVIDIA GH200 480GB"), ("mosaic_gpu", "xla")),
        (("gpu", "NVIDIA A100-SXM4-80GB"), ("xla",)),
        (("gpu", "NVIDIA B200"), ("mosaic_gpu", "xla")),
        (("tpu", "TPU v5 lite"), ("mosaic_tpu", "xla")),
        (("gpu", "NVIDIA RTX 6000 Ada Generation"), ("xla",)),
    ],
)
def test_the_device_decides(target, names, monkeypatch):
    monkeypatch.setattr(dispatch, "target", lambda: dispatch.Target(*target))
    assert dispatch.candidates(None) == names
