"""Section `layers`: Phalanx against windowed and full attention of equal width."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from swr_jax.benchmark import oracle, timing
from swr_jax.nn import Phalanx, SlidingWindowAttention

Array = jax.Array

BLOCK_SIZE = 16
TOLERANCE = 1e-5  # relative RMS, float32
REFERENCES = ("sliding_window_attention", "full_attention")
MODES = ("forward", "forward+backward")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Shapes that are timed: x [1, tokens, features], float32."""

    tokens: tuple[int, ...]
    features: tuple[int, ...]
    head_dim: int  # of the attention layers
    window: int
    budget: timing.Budget


FULL = Sizes(
    tokens=tuple(2**n for n in range(9, 14)),
    features=(256, 512),
    head_dim=64,
    window=512,
    budget=timing.Budget(seconds=5, min_rounds=7, max_rounds=101),
)
TINY = Sizes(
    tokens=(48,),
    features=(32,),
    head_dim=8,
    window=16,
    budget=timing.Budget(seconds=0, min_rounds=2, max_rounds=2),
)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer as a function of its parameters and its input, and the oracle for both."""

    parameters: nnx.State
    apply: Callable[[nnx.State, Array], Array]
    oracle: Callable[[dict, np.ndarray], np.ndarray]

    @classmethod
    def of(cls, module: nnx.Module, expected: Callable[[dict, np.ndarray], np.ndarray]) -> "Layer":
        """Split a module into parameters and a pure function."""
        definition, parameters = nnx.split(module)
        return cls(parameters, lambda state, x: nnx.merge(definition, state)(x), expected)


def make_layers(features: int, sizes: Sizes) -> dict[str, Layer]:
    """Return the three layers of one width, with random parameters."""
    num_heads = features // sizes.head_dim

    def attention(window: int | None) -> Layer:
        return Layer.of(
            SlidingWindowAttention(features, num_heads=num_heads, window=window, rngs=nnx.Rngs(1)),
            functools.partial(oracle.attention, num_heads=num_heads, window=window),
        )

    return {
        "phalanx": Layer.of(
            Phalanx(features, block_size=BLOCK_SIZE, rngs=nnx.Rngs(0)),
            functools.partial(oracle.phalanx, block_size=BLOCK_SIZE),
        ),
        "sliding_window_attention": attention(sizes.window),
        "full_attention": attention(None),
    }


def run(
    sizes: Sizes, *, make: Callable[[int, Sizes], dict[str, Layer]] = make_layers
) -> Iterator[dict]:
    """Check every layer over two windows of tokens, then time it at every length.

    Yields:
        One measurement after the other: "features", "tokens", "mode", "allocator", "relative_rms",
        and what `timing.summarise` returns.

    Raises:
        OracleError: a layer is wrong; nothing has been timed then.
    """
    layers = {features: make(features, sizes) for features in sizes.features}
    errors = {
        features: {name: check(name, layer, 2 * sizes.window) for name, layer in peers.items()}
        for features, peers in layers.items()
    }
    allocator = "kept" if timing.keep_freed_memory() else "default"
    for features, peers in layers.items():
        for tokens in sizes.tokens:
            for mode in MODES:
                yield {
                    "features": features,
                    "tokens": tokens,
                    "mode": mode,
                    "allocator": allocator,
                    "relative_rms": errors[features],
                    **_time(peers, tokens, features, mode, sizes.budget),
                }


def check(
    name: str,
    layer: Layer,
    tokens: int,
    *,
    dtype: DTypeLike = jnp.float32,
    tolerance: float = TOLERANCE,
) -> dict[str, float]:
    """Compare a layer with its oracle: the output, and the gradient along two directions.

    The gradient, for input and parameters together, is compared with central differences of the
    oracle along itself, which measures its length, and along a random direction.

    Args:
        name: of the layer.
        layer: with its oracle.
        tokens: in a row.
        dtype: of input and output.
        tolerance: largest relative RMS error.

    Returns:
        The error of each.

    Raises:
        OracleError: one is larger.
    """
    kernel = layer.parameters["output"]["kernel"]
    x, cotangent = (y.astype(dtype) for y in _inputs(tokens, kernel.shape[-1]))
    out, gradient = jax.jit(timing.with_gradient(layer.apply))((layer.parameters, x), cotangent)
    point, gradient = (
        jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (nnx.to_pure_dict(state), y))
        for state, y in ((layer.parameters, x), gradient)
    )
    random = np.random.default_rng(0)
    noise = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape), gradient)

    def dot(left, right) -> float:
        products = jax.tree.map(lambda y, z: float(np.sum(y * z)), left, right)
        return sum(jax.tree.leaves(products))

    def oracle_slope(direction) -> float:
        step = 1e-4 / np.sqrt(dot(direction, direction))

        def moved(sign: int) -> float:
            at = jax.tree.map(lambda y, d: y + sign * step * d, point, direction)
            return np.sum(layer.oracle(*at) * np.asarray(cotangent, np.float64))

        return (moved(1) - moved(-1)) / (2 * step)

    size = np.sqrt(dot(gradient, gradient))
    actual, expected = {"x": out}, {"x": layer.oracle(*point)}
    for label, direction in (("gradient length", gradient), ("gradient along noise", noise)):
        # Relative to the slope of a direction along the gradient, or small ones would look wrong.
        scale = size * np.sqrt(dot(direction, direction))
        actual[label] = 1 + dot(gradient, direction) / scale
        expected[label] = 1 + oracle_slope(direction) / scale
    return oracle.check(f"{name}, {tokens} tokens", actual, expected, tolerance)


def _inputs(tokens: int, features: int) -> tuple[Array, Array]:
    random = np.random.default_rng(tokens)
    shape = (2, 1, tokens, features)
    x, cotangent = jnp.asarray(random.standard_normal(shape, np.float32))
    return x, cotangent


def _time(peers: dict[str, Layer], tokens: int, features: int, mode: str, budget) -> dict:
    x, cotangent = _inputs(tokens, features)
    calls, temporaries = {}, {}
    for name, layer in peers.items():
        function, inputs = layer.apply, (layer.parameters, x)
        if mode == "forward+backward":
            function, inputs = timing.with_gradient(function), (inputs, cotangent)
        compiled = timing.compile_ahead(function, *inputs)
        calls[name] = functools.partial(compiled, *inputs)
        temporaries[name] = timing.temporary_bytes(compiled)
    samples = timing.measure(calls, budget)
    return timing.summarise(samples, temporaries, {label: label for label in REFERENCES})
