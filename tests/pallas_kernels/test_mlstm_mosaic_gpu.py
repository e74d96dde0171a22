"""The Hopper kernels of the mLSTM in the interpreter, races detected and scratch poisoned.

Against the plain passes in float32, which have an oracle of their own.
"""

import re

import jax
import jax.numpy as jnp
import mlstm_passes
import numpy as np
import pytest
from simulation import in_own_process, simulated_gpu

from pallas_kernels.mlstm import gates, mosaic_gpu, mosaic_gpu_fused, mosaic_gpu_fused_backward
from pallas_kernels.mlstm.gradient import Options, Passes
from pallas_kernels.mlstm.mosaic_gpu_problem import Problem
from pallas_kernels.mlstm.tuning import TuningConfig, state_tiles, suited_pieces, suited_span

TOLERANCE = 4e-3
LONGEST_BACKWARD = 128  # tokens of a chunk
NAMES = ("h", "memory", "normalizer")
NAMES += ("dq", "dk", "dv", "drows", "dcarry", "dmemory", "dnormalizer")

# (T, H, Dk, Dv, chunk): two chunks of one warpgroup; two warpgroups, dimensions that are padded;
# two turns of them for a chunk.
QUICK = [(128, 1, 64, 64, 64), (128, 1, 40, 72, 128), (512, 1, 40, 72, 256)]
MATRIX = [
    (64, 2, 64, 64, 64),
    (192, 2, 64, 192, 64),
    (384, 1, 128, 256, 128),
    (768, 2, 128, 256, 256),
    (256, 1, 192, 320, 256),
    (256, 1, 64, 512, 256),
    (128, 1, 192, 64, 128),
    (128, 1, 256, 128, 128),
    (64, 1, 320, 64, 64),
]


def compare(*sizes, stabilized=True, normalized=True, forget_bias=2.0, resets=0.02, **tuning):
    """Everything that the passes return, against the plain passes on the same rounded inputs.

    Of chunks that only the forward pass has, what that returns.
    """
    length, heads, q_dim, v_dim, chunk = sizes
    rng = np.random.default_rng([length, heads, q_dim, v_dim])

    def draw(*shape, dtype=jnp.float32, mean=0.0):
        return jnp.asarray(rng.standard_normal(shape) + mean, dtype)

    narrow, wide = (1, length, heads, q_dim), (1, length, heads, v_dim)
    q, k = (draw(*narrow, dtype=jnp.bfloat16, mean=0.5) for _ in range(2))
    v, dh = (draw(*wide, dtype=jnp.bfloat16) for _ in range(2))
    log_i, log_f = draw(*narrow[:3]), jax.nn.log_sigmoid(draw(*narrow[:3], mean=forget_bias))
    if not stabilized:
        log_i = jax.nn.log_sigmoid(log_i)
    # Documents begin in the first chunk and in others.
    log_f = jnp.where(jnp.asarray(rng.uniform(size=log_f.shape) < resets), -jnp.inf, log_f)
    state, dstate = (
        (draw(1, heads, q_dim, v_dim), draw(1, heads, q_dim, mean=0.5)) for _ in range(2)
    )
    prepared = gates.prepare(
        log_i,
        log_f,
        jnp.zeros((1, heads)),
        chunk=chunk,
        stabilized=stabilized,
        normalized=normalized,
        q_dim=q_dim,
    )
    config = TuningConfig(**{"span": 2, "slots": 2, "fused": False} | tuning)
    options = Options(chunk, stabilized, normalized, config)
    given = (q, k, v, prepared.rows, prepared.carry, *state)
    with simulated_gpu():
        found = mosaic_gpu.forward(options, *given)
        if backward := chunk <= LONGEST_BACKWARD:
            found += mosaic_gpu.backward(options, *given, dh, *dstate)
        jax.block_until_ready(found)
    expected = mlstm_passes.forward(options, *given)
    expected += mlstm_passes.backward(options, *given, dh, *dstate)
    for name, got, wanted in zip(NAMES, found, expected, strict=backward):
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype), name
        got, wanted = (np.asarray(x, np.float64) for x in (got, wanted))
        assert np.isfinite(got).all(), name
        error, scale = np.linalg.norm(got - wanted), np.linalg.norm(wanted)
        if config.fused and name == "dcarry":
            # What passes a chunk by is known by what the one before wrote, as exactly as that is.
            scale += np.linalg.norm(
                np.asarray(expected[NAMES.index("drows")])[..., gates.D_KEPT, :]
            )
        # Gradients of the gates are inner products, which cancel.
        tolerance = 6e-3 if name in ("drows", "dcarry") else TOLERANCE
        assert error <= tolerance * scale, f"{name}: {error / scale:.2e}"


def run(*arguments, **options):
    """`compare` in a process of its own."""
    in_own_process("test_mlstm_mosaic_gpu", "compare", *arguments, **options)


@pytest.mark.parametrize("sizes", QUICK)
def test_results_and_every_gradient(sizes):
    run(*sizes)


# One warpgroup, dimensions that are padded; two. Forward alone in one walk: two blocks of columns
# of v; a state of many rows. Two warpgroups with a tile each.
@pytest.mark.parametrize(
    "sizes",
    [
        (192, 1, 40, 64, 64),
        (192, 1, 128, 256, 64),
        pytest.param((128, 2, 64, 512, 64), marks=pytest.mark.slow),
        pytest.param((128, 1, 256, 128, 64), marks=pytest.mark.slow),
        pytest.param((64, 2, 128, 128, 64), marks=pytest.mark.slow),
    ],
)
def test_passes_in_walks(sizes):
    run(*sizes, fused=True)


@pytest.mark.parametrize(
    "sizes", [(640, 1, 64, 64, 64), pytest.param((1088, 1, 128, 256, 64), marks=pytest.mark.slow)]
)
def test_what_passes_chunks_by_in_walks(sizes):
    """Memory that lasts for several groups of chunks, and within them is not written down."""
    run(*sizes, fused=True, forget_bias=6.0, resets=0.001)


# Memory that lasts for all pieces, and that which a document's beginning ends.
@pytest.mark.parametrize(
    ("sizes", "pieces", "options"),
    [
        ((192, 1, 64, 64, 64), 3, {"forget_bias": 6.0, "resets": 0.001}),
        pytest.param((256, 2, 128, 256, 64), 2, {}, marks=pytest.mark.slow),
        pytest.param((256, 1, 128, 128, 64), 4, {"forget_bias": 5.0}, marks=pytest.mark.slow),
        pytest.param(
            (640, 1, 64, 64, 64),
            2,
            {"normalized": False, "stabilized": False},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_walks_over_pieces_of_sequences(sizes, pieces, options):
    run(*sizes, fused=True, pieces=pieces, **options)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"normalized": False}])
def test_passes_in_walks_with_other_gates(options):
    run(192, 1, 64, 192, 64, fused=True, stabilized=False, **options)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MATRIX)
@pytest.mark.parametrize(
    "options", [{}, {"stabilized": False}, {"stabilized": False, "normalized": False}]
)
def test_results_and_every_gradient_over_the_matrix(sizes, options):
    run(*sizes, **options)


@pytest.mark.parametrize(
    ("dtype", "sizes", "message"),
    [
        ("float32", (64, 64), "q.dtype=float32: the tensor cores would round it"),
        ("float16", (64, 64), "q.dtype=float16: the weights 1 / divisor leave its range"),
        ("bfloat16", (576, 64), "Dk=576, Dv=64: the kernels take up to 512 and 1024"),
        ("bfloat16", (512, 64), "Dk=512, chunk=128: more than shared memory holds"),
    ],
)
def test_what_is_out_of_reach_is_not_implemented_and_says_why(dtype, sizes, message):
    q, v = (jnp.zeros((1, 128, 1, size), dtype) for size in sizes)
    options = Options(128, True, True, TuningConfig())
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        mosaic_gpu.check(Passes(options, options), q, q, v)


@pytest.mark.parametrize(
    ("wish", "time", "q_dim", "chunks"),
    [
        (16, 8192, 128, (64, 64)),
        (256, 8192, 128, (256, 128)),
        (128, 2048, 128, (256, 128)),
        (128, 2047, 128, (128, 128)),
        (128, 50, 128, (64, 64)),
        (128, 8192, 512, (64, 64)),
    ],
)
def test_the_chunks_are_those_that_the_kernels_have(wish, time, q_dim, chunks):
    config = TuningConfig()
    assert mosaic_gpu.chunk_lengths(wish, time, q_dim, 256, jnp.bfloat16, config) == chunks
    config = TuningConfig(chunk=64, forward_chunk=128)
    assert mosaic_gpu.chunk_lengths(wish, time, q_dim, 256, jnp.bfloat16, config) == (128, 64)


def test_a_long_chunk_is_for_the_forward_pass_alone():
    arrays = (jnp.zeros((1, 256, 1, 64), jnp.bfloat16) for _ in range(3))
    options = Options(256, True, True, TuningConfig())
    with pytest.raises(NotImplementedError, match=re.escape("chunk=256: the kernels take (128, 6")):
        mosaic_gpu.check(Passes(options, options), *arrays)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 96}, "chunk=96: must be 64, 128 or None"),
        ({"forward_chunk": 512}, "forward_chunk=512: must be 64, 128, 256 or None"),
        (
            {"forward_chunk": 128, "fused": True},
            "forward_chunk=128: must be 64 or None where fused is True",
        ),
        ({"chunk": 128, "fused": True}, "chunk=128: must be 64 or None where fused is True"),
        ({"span": 0}, "span=0: must be at least 1 or None"),
        ({"pieces": 0}, "pieces=0: must be at least 1 or None"),
        ({"q_tile": 32}, "q_tile=32: must be 64, 128 or None"),
        ({"v_tile": 512}, "v_tile=512: must be 64, 128, 192, 256 or None"),
        ({"slots": 0}, "slots=0: must be at least 1"),
    ],
)
def test_a_tiling_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TuningConfig(**options)


def test_state_tiles_fill_the_chip():
    """Whole states where there are enough sequences, small tiles of them where there are few."""
    assert state_tiles(TuningConfig(), 128, 128, 256, 132) == (128, 256)
    assert state_tiles(TuningConfig(), 16, 128, 256, 132) == (64, 64)


@pytest.mark.parametrize(
    ("sequences", "chunks", "span"), [(128, 32, 8), (8, 128, 3), (8, 32, 1), (1, 1, 1)]
)
def test_thread_blocks_share_chunks_until_the_chip_is_full(sequences, chunks, span):
    assert suited_span(sequences, chunks, 132) == span
    assert span == 1 or sequences * (chunks // span) >= 2 * 132


@pytest.mark.parametrize(
    ("sequences", "tiles", "pieces"),
    [
        (128, 128, 1),
        (144, 128, 1),  # too many are as they are
        (16, 1024, 8),
        (24, 1024, 16),  # 8 would have a second round of 60
        (16, 64, None),  # pieces would be too short
        (16, 1021, None),  # a prime number
    ],
)
def test_pieces_are_as_few_as_fill_the_chip(sequences, tiles, pieces):
    assert suited_pieces(TuningConfig(), sequences, tiles, 132) == pieces


def test_pieces_have_to_be_equal():
    q, v = (jnp.zeros((1, 256, 1, size), jnp.bfloat16) for size in (64, 64))
    options = Options(64, True, True, TuningConfig(pieces=3))
    with pytest.raises(ValueError, match="pieces=3: must divide the 4 tiles of 64 tokens"):
        mosaic_gpu.on_device(Passes(options, options), q, v)


# Tiles of the forward pass; pieces of both, None for kernels that write states down.
@pytest.mark.parametrize(
    ("sizes", "wish", "found", "pieces"),
    [
        ((8, 8192, 16, 128, 256), None, (128, 2), (1, 1)),
        # q and k read twice, by twice the thread blocks
        ((4, 8192, 16, 128, 256), None, (64, 2), (1, 2)),
        ((1, 65536, 16, 128, 256), None, (128, 2), (8, 8)),
        ((1, 2048, 16, 128, 256), None, None, (None, None)),  # too few of too short ones
        ((1, 65536, 16, 128, 256), True, (128, 2), (1, 1)),
        ((8, 8192, 16, 128, 256), False, None, (None, None)),
        ((8, 8192, 16, 320, 64), True, None, (None, None)),  # more than registers hold
        ((8, 8192, 16, 128, 320), True, (64, 1), (1, None)),
    ],
)
def test_passes_are_walks_where_sequences_or_pieces_fill_the_chip(sizes, wish, found, pieces):
    batch, time, heads, q_dim, v_dim = sizes
    config = TuningConfig(fused=wish)
    dtype = jnp.dtype(jnp.bfloat16)
    problem = Problem(batch, time, heads, q_dim, v_dim, 64, True, dtype, config)
    tiling = mosaic_gpu_fused.tiling(problem, 132)
    assert (tiling and tiling[:2]) == found
    suited = mosaic_gpu_fused_backward.suited(problem, 132)
    assert (tiling and tiling.pieces, suited and suited.pieces) == pieces
    q, v = (jax.ShapeDtypeStruct((batch, time, heads, x), dtype) for x in (q_dim, v_dim))
    passes = Passes(*(Options(chunk, True, True, config) for chunk in (256, 128)))
    forward, gradient = mosaic_gpu.on_device(passes, q, v)
    assert forward.chunk == (64 if found else 256)
    assert gradient.chunk == (64 if suited else 128)
    # Chunks that the caller names stay.
    config = TuningConfig(chunk=128, forward_chunk=256)
    passes = Passes(*(x._replace(config=config) for x in passes))
    assert mosaic_gpu.on_device(passes, q, v) == passes
