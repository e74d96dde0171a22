"""Attention over a mesh: what each device computes, and what travels between them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import dense_attention, inputs, relative_error, segments
from mesh_cases import collectives, mesh_of
from mlstm_cases import quick_jit

from swr_jax.ops.attention import sliding_window_attention

FLOAT32 = 1e-6


def run_split(arrays, sizes, packing, window):
    """Output and the three gradients over a mesh, and the compiled text."""
    mesh = mesh_of(*sizes)

    def place(heads):
        split = "tensor" if heads % mesh.shape["tensor"] == 0 else None
        return jax.NamedSharding(mesh, jax.P(("data", "fsdp"), "sequence", split))

    def gradients(*arrays):
        *arrays, cotangent = arrays
        attend = functools.partial(sliding_window_attention, window=window, segment_ids=packing)
        out, pull = jax.vjp(attend, *arrays)
        return out, *pull(cotangent)

    with jax.set_mesh(mesh):
        shardings = [place(x.shape[2]) for x in arrays]
        arrays = [jax.device_put(*pair) for pair in zip(arrays, shardings, strict=True)]
        outputs = (shardings[0], *shardings[:3])
        compiled = quick_jit(gradients, out_shardings=outputs).lower(*arrays).compile()
        return compiled(*arrays), compiled.as_text()


def check(arrays, sizes, *, window, packing=None, tolerance=FLOAT32):
    """Compare with attention in float64; return what was sent."""
    got, text = run_split(arrays, sizes, packing, window)
    *arrays, cotangent = arrays
    out, gradients = dense_attention(*arrays, window, packing, cotangent)
    for name, x, exact in zip(("out", *"qkv"), got, (out, *gradients), strict=True):
        if np.abs(exact).max() < 1e-12:  # One visible key: no logit matters.
            assert np.abs(np.asarray(x, np.float64)).max() < 1e-6, name
        else:
            assert relative_error(x, exact) <= tolerance, name
    return collectives(text)


def hops(count):
    """From `count` left neighbours, and what they lose by it back to them."""
    return {"collective-permute": 2 * count} if count else {}


@pytest.mark.parametrize(
    ("length", "sizes", "window", "neighbours"),
    [
        (64, (2, 1, 1, 4), 1, 0),
        (64, (2, 1, 1, 4), 16, 1),
        (64, (2, 1, 1, 4), 17, 1),  # all that the neighbour has
        (64, (2, 1, 1, 4), 18, 2),
        (64, (2, 1, 1, 4), 60, 3),
        (30, (1, 1, 2, 2), 3, 1),
        (8, (1, 1, 1, 8), 3, 2),  # a token to a device
    ],
)
def test_a_window_receives_what_lies_before_the_cut(length, sizes, window, neighbours):
    assert check(inputs(length), sizes, window=window) == hops(neighbours)


@pytest.mark.parametrize(
    ("length", "sizes"), [(64, (2, 1, 1, 4)), (30, (1, 2, 2, 2)), (8, (1, 1, 1, 8))]
)
def test_full_attention_gathers_keys_and_values_at_once(length, sizes):
    assert check(inputs(length), sizes, window=None) == {"all-gather": 1, "reduce-scatter": 1}


@pytest.mark.parametrize(("window", "extra"), [(7, "collective-permute"), (None, "all-gather")])
def test_packed_documents_across_the_cuts(window, extra):
    """The identifiers of the documents travel as the keys do, but not back."""
    packing = segments(64)
    packing[1] = packing[1] % 3  # Identifiers may come back: then it is the same document.
    alone = check(inputs(64), (2, 1, 1, 4), window=window)
    packed = check(inputs(64), (2, 1, 1, 4), window=window, packing=packing)
    assert packed == alone | {extra: alone[extra] + 1}


def test_long_parts_are_cut_into_blocks():
    """600 tokens to a device, more than are attended at once."""
    args = inputs(2400, batch=1, heads=1, kv_heads=1)
    for window in (100, None):
        check(args, (1, 1, 1, 4), window=window, packing=segments(2400, batch=1, every=300))


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 4), (8, 2), (8, 1), (12, 6)])
def test_heads_are_computed_apart_whatever_they_share(heads, kv_heads):
    arrays = inputs(10, batch=2, heads=heads, kv_heads=kv_heads)
    sent = check(arrays, (2, 1, 4, 1), window=5)
    if kv_heads % 4 == 0:  # Else several devices have one head, and add up its gradients.
        assert sent == {}


def test_axes_that_do_not_divide_are_left_out():
    """Three rows, three heads, and seven tokens for two devices."""
    q, k, v, _ = inputs(7, batch=3, heads=3, kv_heads=3)
    with jax.set_mesh(mesh_of(2, 1, 2, 2)):
        out = jax.jit(functools.partial(sliding_window_attention, window=3))(q, k, v)
    assert relative_error(out, dense_attention(q, k, v, 3)) <= FLOAT32


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 8e-3), ("float16", 1e-3)])
def test_half_precision_costs_only_its_own_rounding(dtype, tolerance):
    for window in (None, 7):
        check(inputs(56, dtype=dtype), (2, 1, 1, 4), window=window, tolerance=tolerance)


def test_a_prompt_that_continues_a_sequence_keeps_it_whole():
    q, k, v, _ = inputs(16, 24, batch=4)
    with jax.set_mesh(mesh_of(2, 1, 2, 2)):
        out = jax.jit(functools.partial(sliding_window_attention, window=7))(q, k, v)
    assert relative_error(out, dense_attention(q, k, v, 7)) <= FLOAT32


def test_works_under_scan_and_remat():
    q, k, v, _ = inputs(32)
    run = jax.checkpoint(functools.partial(sliding_window_attention, window=9))

    def loss(q, k, v):
        _, out = jax.lax.scan(lambda c, x: (c, run(*x)), None, (q, k, v))
        return jnp.sum(jnp.square(out))

    stacked = [jnp.stack([x, 2 * x]) for x in (q, k, v)]
    wanted = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*stacked)
    with jax.set_mesh(mesh_of(2, 1, 2, 2)):
        got = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*stacked)
    for x, one_device in zip(got, wanted, strict=True):
        assert relative_error(x, one_device) <= FLOAT32


@pytest.mark.slow
def test_a_part_of_the_sequence_needs_a_part_of_the_memory():
    """Each of eight devices less than half of what one needs alone, others' keys included."""
    q, kv = (jax.ShapeDtypeStruct((1, 8192, heads, 32), jnp.float32) for heads in (4, 1))

    def gradients(*arrays):
        out, pull = jax.vjp(functools.partial(sliding_window_attention, window=None), *arrays)
        return pull(out)

    def temporary_bytes(**options):
        compiled = jax.jit(gradients, **options).lower(q, kv, kv).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    alone = temporary_bytes()
    mesh = mesh_of(1, 1, 1, 8)
    with jax.set_mesh(mesh):
        place = jax.NamedSharding(mesh, jax.P(None, "sequence"))
        split = temporary_bytes(in_shardings=place, out_shardings=place)
    assert split <= alone / 2
