"""Random calls of a backend's `block_two_pass`, and what they should return: the dense operator.

The oracle is `swr_jax.ops.reference` in float64; it shares no code with any backend.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from recurrence_cases import DECAYS, assert_rows_close, draw_decay

from swr_jax.ops import reference as ref

FLOAT32, BFLOAT16 = 1e-6, 4e-3
Arguments = dict[str, np.ndarray]


def draw_call(
    shape: tuple[int, int, int, int],
    lookback: int | None,
    *,
    gate_heads: int | None = None,
    states: bool = True,
    seed: int = 0,
) -> Arguments:
    """Arguments of `block_two_pass` by name, float32, for v of `shape` [B, T, H, D].

    Every head has its own kind of decay, and the last row of the batch is packed documents.
    Gates are drawn where `gate_heads` says how many, initial states where `states` asks for them.
    """
    batch, length, heads, features = shape
    rng = np.random.default_rng([seed, *shape])
    kinds = (DECAYS[head % len(DECAYS)] for head in range(heads))
    a = np.concatenate([draw_decay(kind, (batch, length, 1), rng) for kind in kinds], axis=2)
    documents = np.zeros((batch, length), np.int32)
    documents[-1] = np.cumsum(rng.uniform(size=length) < 0.1)
    arguments = {"a": ref.reset_decays(a, documents), "v": rng.standard_normal(shape)}
    if gate_heads is not None:
        for name in ("b", "c"):
            arguments[name] = rng.standard_normal((batch, length, gate_heads, features))
    if states:
        arguments["local"] = rng.standard_normal((batch, heads, features))
    if states and lookback == 1:
        arguments["previous"] = rng.standard_normal((batch, heads, features))
    return {name: x.astype(np.float32) for name, x in arguments.items()}


def call(backend: Callable[..., Any], arguments: dict[str, Any], **options: Any) -> Any:
    """`backend` with the arguments that `draw_call` names."""
    gates = (arguments["b"], arguments["c"]) if "b" in arguments else None
    states = arguments.get("local"), arguments.get("previous")
    return backend(arguments["a"], arguments["v"], gates, *states, **options)


def evaluate(backend: Callable[..., Any], arguments, x_bar, final_bar, **options: Any) -> Any:
    """Output, final state and gradients by name, all in one compilation."""

    @jax.jit
    def run(arguments, x_bar, final_bar):
        (x, final), pull = jax.vjp(lambda given: call(backend, given, **options), arguments)
        return x, final, pull((x_bar, None if final is None else final_bar))[0]

    return jax.tree.map(np.asarray, run(arguments, x_bar, final_bar))


def expect(
    arguments: Arguments, x_bar: Any, final_bar: Any, *, block_size: int, lookback: int | None
) -> tuple[np.ndarray, np.ndarray | None, Arguments]:
    """What `evaluate` should return, in float64."""
    a, v = arguments["a"], arguments["v"]
    batch, length, heads, features = v.shape
    state = ref.zero_state(batch, heads, features, lookback)
    if "local" in arguments:
        state = state._replace(local=arguments["local"])
    if "previous" in arguments:
        state = state._replace(carriers=arguments["previous"][:, None])
    window = {"block_size": block_size, "lookback": lookback, "initial_state": state}
    u, du_bar, groups = v, x_bar, 1
    if "b" in arguments:
        groups = heads // arguments["b"].shape[2]
        b, c = (np.repeat(arguments[name], groups, axis=2) for name in ("b", "c"))
        u, du_bar = b * v, c * x_bar
    x = ref.sliding_window_recurrence(a, u, **window)
    final = None
    if lookback is None:
        # A loss on the final state is a loss on the last token's state.
        final = x[:, -1]
        du_bar = np.concatenate([du_bar[:, :-1], du_bar[:, -1:] + final_bar[:, None]], axis=1)
    gradients = ref.sliding_window_gradients(a, u, du_bar, **window)
    wanted = {name: gradients[name] for name in ("a", "local")} | {"v": gradients["u"]}
    if lookback == 1:
        wanted["previous"] = gradients["carriers"][:, 0]
    if "b" in arguments:
        shape = (batch, length, heads // groups, groups, features)
        wanted["b"] = (gradients["u"] * v).reshape(shape).sum(3)
        wanted["c"] = (x_bar * x).reshape(shape).sum(3)
        wanted["v"] = gradients["u"] * b + x_bar
        x = x * c + v
    return x, final, {name: wanted[name] for name in arguments}


def check(
    backend: Callable[..., Any],
    arguments: Arguments,
    *,
    block_size: int,
    lookback: int | None,
    tolerance: float = FLOAT32,
    smallest: int = 4,
    **options: Any,
) -> None:
    """Compare output, final state and every gradient with the oracle, head by head.

    Heads of fewer than `smallest` numbers are compared together.
    """
    rng = np.random.default_rng(7)
    v = arguments["v"]
    x_bar = jnp.asarray(rng.standard_normal(v.shape), v.dtype)
    final_bar = rng.standard_normal((v.shape[0], *v.shape[2:])).astype(np.float32)
    window = {"block_size": block_size, "lookback": lookback}
    x, final, gradients = evaluate(backend, arguments, x_bar, final_bar, **window, **options)
    exact = {name: np.asarray(value, np.float64) for name, value in arguments.items()}
    exact_bars = np.asarray(x_bar, np.float64), np.asarray(final_bar, np.float64)
    wanted_x, wanted_final, wanted = expect(exact, *exact_bars, **window)
    assert x.dtype == v.dtype
    assert_heads_close(x, wanted_x, 2, tolerance, smallest, "x")
    if lookback is None:
        assert final.dtype == np.float32
        assert_heads_close(final, wanted_final, 1, FLOAT32, smallest, "final")
    else:
        assert final is None
    for name, gradient in gradients.items():
        assert gradient.dtype == arguments[name].dtype
        axis = 1 if name in ("local", "previous") else 2
        assert_heads_close(gradient, wanted[name], axis, tolerance, smallest, name)


def assert_heads_close(
    actual, expected, axis: int, tolerance: float, smallest: int, name: str
) -> None:
    """Relative RMS error of each head of each row of the batch: none hides behind a larger one.

    The few numbers of a small head may all have cancelled: only with other heads have they a scale.
    """
    actual, expected = (np.moveaxis(np.asarray(x), axis, 1) for x in (actual, expected))
    if actual[0, 0].size >= smallest:
        actual, expected = (x.reshape(-1, *x.shape[2:]) for x in (actual, expected))
    assert_rows_close(actual, expected, tolerance, name)
