"""The Hopper kernels of the mLSTM through the real compilers, and what they take there."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import catalogue, targets
from pallas_kernels.mlstm import mosaic_gpu
from pallas_kernels.mlstm.gradient import Options
from pallas_kernels.mlstm.tuning import TuningConfig

pytestmark = pytest.mark.targets

CHIP = "h100"
KERNELS = {
    *("mlstm_states_forward", "mlstm_states_again", "mlstm_states_backward", "mlstm_outputs"),
    *("mlstm_rows_gradient", "mlstm_columns_gradient"),
}


def test_within_budget_at_the_published_shape():
    results = catalogue.check(CHIP, "mlstm/")
    assert {report.name for report, _ in results} == {
        "mlstm/published/forward",
        "mlstm/published/forward+backward",
        "mlstm/long/forward",
        "mlstm/long/forward+backward",
        "mlstm/by_chunk/forward",
        "mlstm/by_chunk/forward+backward",
    }
    for report, broken in results:
        assert broken == [], report.name


@pytest.mark.parametrize(("sizes", "chunk", "normalized"), [((1, 192, 2, 64, 128), 64, True)])
def test_compiles_without_spills(sizes, chunk, normalized):
    report = compiled(sizes, chunk, normalized)
    assert {kernel.name for kernel in report.kernels} == KERNELS
    for kernel in report.kernels:
        assert kernel.spills == 0, kernel.name


@pytest.mark.parametrize(
    "sizes", [(1, 128, 2, 64, 64), (2, 256, 3, 128, 128), (1, 256, 8, 256, 512)]
)
def test_other_heads_compile(sizes):
    """With the chunk that is chosen for them. The gradient of the columns spills a little there."""
    *_, q_dim, v_dim = sizes
    _, chunk = mosaic_gpu.chunk_lengths(128, 8192, q_dim, v_dim, jnp.bfloat16, TuningConfig())
    assert {kernel.name for kernel in compiled(sizes, chunk, True).kernels} == KERNELS


@pytest.mark.parametrize(
    ("sizes", "spills"), [((2, 128, 2, 64, 64), 0), ((1, 192, 2, 128, 128), 64)]
)
def test_walks_over_other_heads_compile(sizes, spills):
    report = compiled(sizes, 64, True, fused=True)
    assert {kernel.name for kernel in report.kernels} == {
        f"mlstm_fused_{name}" for name in ("forward", "rows", "columns")
    }
    for kernel in report.kernels:
        assert kernel.spills <= spills, kernel.name


def compiled(sizes, chunk, normalized, fused=None):
    batch, time, heads, q_dim, v_dim = sizes
    q = jax.ShapeDtypeStruct((batch, time, heads, q_dim), jnp.bfloat16)
    v = jax.ShapeDtypeStruct((batch, time, heads, v_dim), jnp.bfloat16)
    chunks = (batch, heads, time // chunk)
    gates = jax.ShapeDtypeStruct((*chunks, 8, chunk), jnp.float32)
    carry = jax.ShapeDtypeStruct(chunks, jnp.float32)
    memory = jax.ShapeDtypeStruct((batch, heads, q_dim, v_dim), jnp.float32)
    normalizer = jax.ShapeDtypeStruct((batch, heads, q_dim), jnp.float32)
    options = Options(chunk, True, normalized, TuningConfig(fused=fused))

    def both(dh, dmemory, dnormalizer, *arguments):
        cotangents = (dh, dmemory, dnormalizer)
        return (
            mosaic_gpu.forward(options, *arguments),
            mosaic_gpu.backward(options, *arguments, *cotangents),
        )

    arguments = (v, memory, normalizer, q, q, v, gates, carry, memory, normalizer)
    return targets.compile_for(CHIP, both, *arguments, name=f"{sizes} {chunk}")
