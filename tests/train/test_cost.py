"""Operations that a trace shows, loops, devices and kernels counted."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from mesh_cases import mesh_of

from swr_jax.nn import LanguageModelConfig
from swr_jax.ops import attention_splash
from swr_jax.train.config import MeshConfig, OptimizerConfig, TrainConfig
from swr_jax.train.cost import Kernel, traced_cost
from swr_jax.train.flops import flops_per_token
from swr_jax.train.sharding import make_mesh
from swr_jax.train.state import make_blueprint
from swr_jax.train.step import gradient_and_sums

A, B = jax.ShapeDtypeStruct((6, 5), jnp.float32), jax.ShapeDtypeStruct((5, 7), jnp.float32)
PRODUCT = 2 * 6 * 5 * 7


def cost(function, *arguments):
    return traced_cost(jax.jit(function).trace(*arguments))


def test_products_count_their_loops_branches_and_gradients():
    assert cost(jnp.matmul, A, B).flops == PRODUCT
    assert cost(jnp.exp, A).flops == 0

    def loop(a, b):
        return lax.scan(lambda c, _: (c + a @ b, None), jnp.zeros((6, 7)), length=9)[0]

    assert cost(loop, A, B).flops == 9 * PRODUCT

    def branch(a, b):
        return lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: a @ b + 2 * (a @ b))

    assert cost(branch, A, B).flops == 2 * PRODUCT
    remat = jax.grad(
        lambda a, b: jnp.sum(jax.checkpoint(lambda a, b: jnp.exp(a @ b))(a, b)), (0, 1)
    )
    assert cost(remat, A, B).flops == 4 * PRODUCT  # forward, once more, and two cotangents
    loop = cost(lambda a, b: lax.while_loop(lambda c: c[0, 0] < 1, lambda _: a @ b, a @ b), A, B)
    assert (loop.flops, loop.unknown_loops) == (2 * PRODUCT, 1)


def test_what_one_device_does_counts_on_all():
    mesh = mesh_of(2, 1, 2, 1)
    spec = jax.P("data", "tensor")
    split = jax.shard_map(
        lambda a, b: a @ b,
        mesh=mesh,
        in_specs=(jax.P("data"), jax.P(None, "tensor")),
        out_specs=spec,
    )
    sizes = (jax.ShapeDtypeStruct((6, 5), jnp.float32), jax.ShapeDtypeStruct((5, 8), jnp.float32))
    assert cost(split, *sizes).flops == 2 * 6 * 5 * 8


def test_a_kernel_counts_what_its_author_says():
    def copy(x_ref, o_ref):
        o_ref[...] = x_ref[...]

    estimate = pl.CostEstimate(flops=3, bytes_accessed=5, transcendentals=0)
    call = functools.partial(pl.pallas_call, copy, out_shape=A, name="copy")
    found = cost(lambda x: lax.map(call(cost_estimate=estimate), x), jnp.zeros((4, 6, 5)))
    assert found.kernels == [Kernel("copy", 4, 3.0, 5.0)]
    assert found.flops == 12
    with pytest.raises(ValueError, match=r"'copy' has no pl\.CostEstimate"):
        cost(call(), A)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("window", "blocks"), [(None, 10), (128, 8)])
def test_attention_kernels_count_the_blocks_that_they_visit(monkeypatch, window, blocks, fused):
    """Tiles of 128: 4 x 4 of which a triangle is seen, or two for each row of a window."""
    q = jax.ShapeDtypeStruct((3, 512, 2, 128), jnp.bfloat16)

    def attend(q, k, v):
        return attention_splash.attend(q, k, v, window, None, None)

    monkeypatch.setattr(attention_splash, "_LARGEST_TILE", 128)
    if not fused:
        monkeypatch.setattr(attention_splash, "_MOST_TILES_FUSED", 0)
        monkeypatch.setattr(attention_splash, "_MOST_TILES_FUSED_IN_WINDOWS", 0)
    forward = cost(attend, q, q, q)
    both = cost(lambda *x: jax.vjp(attend, *x)[1](x[0]), q, q, q)
    one = 3 * 2 * blocks * 4 * 128 * 128 * 128
    assert forward.flops == one
    # Two products and five, or in two kernels seven; and the normalizer's gradient.
    assert both.flops == pytest.approx((3.5 if fused else 4.5) * one, rel=1e-3)


def test_attention_kernels_count_the_keys_before_the_first_query(monkeypatch):
    """Tiles of 128: two rows of queries after four tiles of keys see five and six."""
    q, k = (jax.ShapeDtypeStruct((3, length, 2, 128), jnp.bfloat16) for length in (256, 768))
    monkeypatch.setattr(attention_splash, "_LARGEST_TILE", 128)
    found = cost(lambda q, k, v: attention_splash.attend(q, k, v, None, None, None), q, k, k)
    assert found.flops == 3 * 2 * (5 + 6) * 4 * 128 * 128 * 128


def test_each_attention_layers_gradient_counts_its_own_blocks(monkeypatch):
    q = jax.ShapeDtypeStruct((3, 512, 2, 128), jnp.bfloat16)

    def layers(q):
        for window in (128, None, 128):
            q = attention_splash.attend(q, q, q, window, None, None)
        return q

    monkeypatch.setattr(attention_splash, "_LARGEST_TILE", 128)
    found = cost(lambda q: jax.vjp(layers, q)[1](q), q).kernels
    blocks = [kernel.flops / (3 * 2 * 4 * 128**3) for kernel in found]
    assert blocks == [8, 10, 8, 20, 25, 20]


@pytest.mark.parametrize(("pattern", "more"), [(("phalanx",), 1.0), (("mlstm",), 1.06)])
def test_a_models_products_are_what_the_trainer_says(pattern, more):
    """But for what an mLSTM in chunks, of tokens with tokens, adds to reading and writing."""
    model = LanguageModelConfig(
        vocab_size=512, features=128, depth=2, pattern=pattern, num_heads=1, mlp_features=512
    )
    config = TrainConfig(model=model, data=None, optimizer=OptimizerConfig(), mesh=MeshConfig())
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    blueprint = make_blueprint(config, mesh)
    tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    names = ("tokens", "targets", "positions", "segment_ids", "target_bytes")
    batch = dict.fromkeys(names, tokens) | {
        "loss_weights": jax.ShapeDtypeStruct((2, 64), jnp.float32)
    }
    found = cost(
        functools.partial(gradient_and_sums, blueprint, mesh=mesh), blueprint.abstract.params, batch
    )
    expected = 128 * flops_per_token(model, num_params=blueprint.num_params, length=64)
    assert found.flops == pytest.approx(more * expected, rel=0.01)
