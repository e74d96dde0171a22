"""The Hopper kernels in the interpreter, races detected and scratch poisoned, against float64."""

import re

import block_two_pass_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_two_pass_cases import draw_call
from simulation import simulated_gpu

from pallas_kernels.swr.mosaic_gpu import block_two_pass
from pallas_kernels.swr.tuning import TuningConfig

SMALL = TuningConfig(heads=16, chunk=128, forward_slots=3, backward_slots=2, line=8)


def draw_case(length, heads, features, gated, lookback, *, gate_heads=None, batch=2):
    """Arguments of `block_two_pass`; one gate for every head unless `gate_heads` says otherwise."""
    gate_heads = (gate_heads or heads) if gated else None
    return draw_call((batch, length, heads, features), lookback, gate_heads=gate_heads)


def check(arguments, *, config=SMALL, **options):
    """Against the oracle, every head by itself."""
    with simulated_gpu():
        cases.check(block_two_pass, arguments, config=config, smallest=1, **options)


def run(arguments, x_bar, **options):
    """Output and gradients."""
    with simulated_gpu():
        return cases.evaluate(block_two_pass, arguments, x_bar, None, **options)


# (T, lookback, block_size): a token, a block's edge on either side, several chunks, a ragged end.
SHAPES = [
    (1, 1, 16),
    (16, 0, 16),
    (17, None, 16),
    (31, 1, 32),
    (139, 1, 64),
    (131, 0, 32),
    (140, None, 16),
]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("length", "lookback", "block_size"), SHAPES)
def test_output_and_every_gradient(length, lookback, block_size, gated):
    # Each batch element is simulated one after the other: one is enough where there are chunks.
    batch = 2 if length < SMALL.chunk else 1
    arguments = draw_case(length, 7, 8, gated, lookback, batch=batch)
    check(arguments, block_size=block_size, lookback=lookback)


@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("lookback", [0, 1, None])
@pytest.mark.parametrize(
    ("length", "heads", "features"), [(15, 1, 16), (33, 21, 8), (257, 5, 48), (1031, 3, 16)]
)
def test_output_and_every_gradient_over_the_matrix(length, lookback, gated, heads, features):
    arguments = draw_case(length, heads, features, gated, lookback, batch=1)
    for block_size in (16, 128):
        check(arguments, block_size=block_size, lookback=lookback, config=None)


@pytest.mark.parametrize(
    ("heads", "features", "gate_heads"), [(1, 16, 1), (6, 40, 3), (3, 32, 1), (2, 128, 2)]
)
def test_heads_and_features_of_any_number(heads, features, gate_heads):
    """Wide heads are cut into parts that share a decay; gates may be shared by groups of heads."""
    arguments = draw_case(19, heads, features, True, 1, gate_heads=gate_heads)
    check(arguments, block_size=16, lookback=1, config=None)


@pytest.mark.parametrize("lookback", [0, 1, None])
def test_without_a_state_it_starts_from_zero(lookback):
    arguments = draw_case(37, 3, 16, False, lookback)
    for name in ("local", "previous"):
        arguments.pop(name, None)
    check(arguments, block_size=32, lookback=lookback, config=None)


def test_a_carrier_alone_is_an_initial_state():
    arguments = draw_case(20, 3, 16, False, 1)
    del arguments["local"]
    check(arguments, block_size=16, lookback=1, config=None)


@pytest.mark.parametrize(
    ("decay", "value", "tolerance"),
    [
        ("float32", "bfloat16", 4e-3),
        ("bfloat16", "bfloat16", 4e-3),
        ("bfloat16", "float32", 4e-3),
        ("float16", "float16", 1e-3),
    ],
)
def test_low_precision_is_rounded_only_when_read_and_written(decay, value, tolerance):
    arguments = draw_case(35, 4, 32, True, 1, gate_heads=2)
    for name in ("a", "b", "c", "v"):
        arguments[name] = jnp.asarray(arguments[name], decay if name == "a" else value)
    check(arguments, block_size=16, lookback=1, config=None, tolerance=tolerance)


@pytest.mark.parametrize("lookback", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_results_do_not_depend_on_the_tiling(lookback):
    """To the last bit: nothing in a token's arithmetic knows of tiles, chunks or stages."""
    arguments = draw_case(140, 9, 16, True, lookback, batch=1)
    rng = np.random.default_rng(1)
    x_bar = rng.standard_normal(arguments["v"].shape).astype(np.float32)
    window = {"block_size": 32, "lookback": lookback}
    first, *others = (
        run(arguments, x_bar, config=config, **window)
        for config in (
            TuningConfig(heads=16, chunk=128, forward_slots=2, backward_slots=2, line=16),
            TuningConfig(heads=8, chunk=256, forward_slots=5, backward_slots=3, line=16),
        )
    )
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)


def test_nothing_outside_the_window_enters_not_even_as_nan():
    arguments = draw_case(96, 3, 16, False, None, batch=1)
    a, v = jnp.asarray(arguments["a"]), jnp.asarray(arguments["v"])
    options = {"block_size": 16, "config": SMALL}

    def call(a, v, lookback):
        return block_two_pass(a, v, None, None, None, lookback=lookback, **options)[0]

    for lookback, block in ((0, 2), (1, 3)):
        with simulated_gpu():
            clean = call(a, v, lookback)
            dirty = call(a, v.at[:, 20].set(jnp.nan), lookback)
        np.testing.assert_array_equal(clean[:, 16 * block :], dirty[:, 16 * block :])
        assert np.isnan(dirty[:, 20:32]).all()


def test_under_vmap_the_mapped_axis_joins_the_batch():
    """Some arguments mapped and others not, forward and backward."""
    a, v = (draw_case(20, 3, 16, False, 0, batch=4)[name] for name in "av")
    v = v.reshape(2, 2, *v.shape[1:])
    a, x_bar = a[:2], np.random.default_rng(0).standard_normal(v.shape).astype(np.float32)

    def gradients(a, v, x_bar):
        def call(a, v):
            return block_two_pass(a, v, None, None, None, block_size=16, lookback=1)[0]

        x, pull = jax.vjp(call, a, v)
        return x, *pull(x_bar)

    with simulated_gpu():
        got = jax.jit(jax.vmap(gradients, in_axes=(None, 0, 0)))(a, v, x_bar)
        one_by_one = [jax.jit(gradients)(a, *pair) for pair in zip(v, x_bar, strict=True)]
    for i, expected in enumerate(one_by_one):
        for x, wanted in zip(got, expected, strict=True):
            np.testing.assert_array_equal(x[i], wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float64"}, "v.dtype=float64: the kernels take"),
        ({"features": 12}, "D=12: the kernels need a multiple of 8"),
        ({"block_size": 8}, "block_size=8: the kernels take 16 to 128"),
        ({"block_size": 256}, "block_size=256: the kernels take 16 to 128"),
        ({"lookback": 3}, "lookback=3: the kernels have 0, 1 and None"),
    ],
)
def test_what_is_out_of_reach_is_not_implemented_and_says_why(change, message):
    options = {"dtype": "float32", "features": 16, "block_size": 16, "lookback": 1} | change
    with jax.enable_x64(options["dtype"] == "float64"):
        a, v = jnp.ones((1, 4, 2), "float32"), jnp.ones((1, 4, 2, options["features"]))
        v = v.astype(options["dtype"])
        with pytest.raises(NotImplementedError, match=re.escape(message)):
            block_two_pass(
                a,
                v,
                None,
                None,
                None,
                block_size=options["block_size"],
                lookback=options["lookback"],
            )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 24}, "heads=24: must be 8, 16, 32 or 64"),
        ({"chunk": 64}, "chunk=64: must be a multiple of 128"),
        ({"forward_slots": 1}, "forward_slots=1: must be at least 2"),
        ({"line": 12}, "line=12: must be a power of two from 8 to 256"),
        ({"backward_slots": 0}, "backward_slots=0: must be at least 2"),
    ],
)
def test_a_tiling_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TuningConfig(**options)
