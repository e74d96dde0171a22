"""Section `layers`: Phalanx against attention, windowed and full, and mLSTM, of equal width.

bfloat16 activations and products, float32 parameters, a constant number of tokens in rows of T (a
row that is longer makes up for it). Attention has heads of 128 features and rotary positions, and
runs through what the project's operator picks on this device. Every layer is first compared with a
float64 oracle in NumPy over two windows of tokens, output and gradient, in bfloat16.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from swr_jax.benchmark import layers as on_cpu
from swr_jax.benchmark import oracle, timing
from swr_jax.benchmark.device import contest
from swr_jax.benchmark.records import Session
from swr_jax.nn import MLSTM, Phalanx, SlidingWindowAttention

TOLERANCE = 2e-2  # relative RMS, bfloat16 through four projections
REFERENCES = ("sliding_window_attention", "full_attention")
MODES = ("forward", "forward+backward")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Shapes that are timed: x [tokens / T, T, features]."""

    lengths: tuple[int, ...]
    tokens: int
    features: tuple[int, ...]
    checked_features: int  # what the oracle is compared at
    head_dim: int  # of the attention layers
    window: int
    budget: timing.Budget


FULL = Sizes(
    lengths=(8192, 131072, 2048, 32768),
    tokens=32768,
    features=(2048, 1024, 4096),
    checked_features=256,
    head_dim=128,
    window=512,
    budget=timing.Budget(seconds=1.5, min_rounds=5, max_rounds=21),
)
TINY = Sizes(
    lengths=(48,),
    tokens=48,
    features=(32,),
    checked_features=32,
    head_dim=8,
    window=16,
    budget=timing.Budget(seconds=0, min_rounds=2, max_rounds=2),
)


def make_layers(features: int, sizes: Sizes) -> dict[str, on_cpu.Layer]:
    """Return the layers of one width, with random parameters."""
    num_heads = features // sizes.head_dim
    cells = max(2, features // 256)
    dtype = {"dtype": jnp.bfloat16}

    def attention(window: int | None) -> on_cpu.Layer:
        layer = SlidingWindowAttention(
            features, num_heads=num_heads, window=window, **dtype, rngs=nnx.Rngs(1)
        )
        return on_cpu.Layer.of(
            layer, functools.partial(oracle.attention, num_heads=num_heads, window=window)
        )

    return {
        "phalanx": on_cpu.Layer.of(
            Phalanx(features, **dtype, rngs=nnx.Rngs(0)),
            functools.partial(oracle.phalanx, block_size=on_cpu.BLOCK_SIZE),
        ),
        "sliding_window_attention": attention(sizes.window),
        "full_attention": attention(None),
        "mlstm": on_cpu.Layer.of(
            MLSTM(features, num_heads=cells, **dtype, rngs=nnx.Rngs(2)),
            functools.partial(oracle.mlstm, num_heads=cells),
        ),
    }


def run(sizes: Sizes, session: Session) -> Iterator[dict]:
    """Check every layer, in few features, then time all at every width and length.

    Yields:
        First "case" "check" with "relative_rms" by layer. Then "case", "features", "tokens" (T),
        "batch", "mode", and what `contest.hold` returns.

    Raises:
        OracleError: a layer is wrong; nothing has been timed then.
    """
    if not session.is_done("check"):
        errors = {
            name: on_cpu.check(
                name, layer, 2 * sizes.window, dtype=jnp.bfloat16, tolerance=TOLERANCE
            )
            for name, layer in make_layers(sizes.checked_features, sizes).items()
        }
        yield {"case": "check", "relative_rms": errors, "contestants": {}, "left_out": {}}
    for length in sizes.lengths:
        found = {
            f"width {features}, T {length}, {mode}": (features, mode)
            for features in sizes.features
            for mode in MODES
        }
        pending = {case: key for case, key in found.items() if not session.is_done(case)}
        if session.is_over():
            yield from map(session.left_out, pending)
            continue
        widths = dict.fromkeys(features for features, _ in pending.values())
        shapes = {
            features: (
                jax.eval_shape(functools.partial(make_parameters, features, sizes)),
                jax.eval_shape(functools.partial(draw, features, length, sizes)),
            )
            for features in widths
        }
        programs = contest.compile_cases(
            {
                case: entrants(mode, features, *shapes[features], sizes, session)
                for case, (features, mode) in pending.items()
            }
        )
        for features in widths:
            parameters, x = make_parameters(features, sizes), draw(features, length, sizes)
            for case, (other, mode) in pending.items():
                if other != features:
                    continue
                shape = {"features": features, "batch": x[0].shape[0], "tokens": length}
                yield {"case": case, **shape, "mode": mode} | contest.hold(
                    entrants(mode, features, parameters, x, sizes, session),
                    sizes.budget,
                    REFERENCES,
                    programs=programs.pop(case),
                )


def make_parameters(features: int, sizes: Sizes) -> dict[str, nnx.State]:
    """Return the parameters of every layer of one width."""
    return {name: layer.parameters for name, layer in make_layers(features, sizes).items()}


def entrants(
    mode: str,
    features: int,
    parameters: dict[str, nnx.State],
    x: list[jax.Array],
    sizes: Sizes,
    session: Session,
) -> dict[str, contest.Entrant]:
    """Return all layers of one width, for arguments or their shapes."""
    *inputs, cotangent = x
    found = {}
    for name, layer in _definitions(features, sizes).items():
        function, sets = layer, [(parameters[name], y) for y in inputs]
        if mode == "forward+backward":
            function = timing.with_gradient(function)
            sets = [(arguments, cotangent) for arguments in sets]
        expected = contest.expected_seconds(
            session.record["measurements"], name, *cotangent.shape[:2], mode=mode, features=features
        )
        found[name] = contest.Entrant(function, sets, expected)
    return found


@functools.cache
def _definitions(features: int, sizes: Sizes) -> dict:
    """The layers as functions of their parameters, made without any."""
    found = {}
    jax.eval_shape(lambda: found.update(make_layers(features, sizes)))
    return {name: layer.apply for name, layer in found.items()}


def draw(features: int, length: int, sizes: Sizes) -> list[jax.Array]:
    """Return inputs [B, T, M] to take in turn; the last is the cotangent of all outputs."""
    shape = (max(1, sizes.tokens // length), length, features)

    @jax.jit
    def draw_one(seed: int) -> jax.Array:
        return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)

    first = draw_one(0)
    return [first, *(draw_one(i) for i in range(1, 1 + timing.rotation(first.nbytes)))]
