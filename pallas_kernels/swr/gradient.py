"""What every backend's entry point is made of: its two passes as one differentiable function."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.distribution import distributed

Array = jax.Array


def differentiable(
    forward: Callable, backward: Callable, wide: str, state: str, *, automatic: bool
) -> Callable:
    """Return solve(options, a, v, gates, local, previous) -> (x, final), spread over devices.

    `options` is static, hashable, and has the attribute `lookback`.

    Args:
        forward: takes (options, a, v, gates, local, previous, save=) to x, what the backward needs
            (None without `save`), and the final state (None unless lookback is None).
        backward: takes (options, a, v, gates, local, previous, saved, dx, dfinal) to the gradients
            of a, v, gates, local and previous, None for None.
        wide: letters of the axes of v, gates and x, as `distributed` takes them.
        state: the same of local, previous and final; what is saved has "b", "s", "k" for "b".
        automatic: as `distributed` takes it.
    """
    saved = state.replace("b", "bsk")
    arguments = ("bth", wide, wide, state, state)

    def run_forward(options, *given, save):
        final = state if options.lookback is None else None
        return distributed(
            functools.partial(forward, options, save=save),
            given,
            arguments,
            (wide, saved if save else None, final),
            automatic=automatic,
        )

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def solve(options, a, v, gates, local, previous):
        x, _, final = run_forward(options, a, v, gates, local, previous, save=False)
        return x, final

    def solve_forward(options, *given):
        x, saved_states, final = run_forward(options, *given, save=True)
        return (x, final), (given, saved_states)

    def solve_backward(options, residuals, cotangents):
        given, saved_states = residuals
        gradients = tuple(
            jax.tree.map(lambda _, letters=letters: letters, argument)
            for letters, argument in zip(arguments, given, strict=True)
        )
        return distributed(
            functools.partial(backward, options),
            (*given, saved_states, *cotangents),
            (*arguments, saved, wide, state),
            gradients,
            automatic=automatic,
        )

    solve.defvjp(solve_forward, solve_backward)
    return solve


def repeat_heads(gate: Array, heads: int, axis: int) -> Array:
    """Repeat the K gate heads on `axis` to `heads`: head h gets gate h // (heads / K).

    Not `jnp.repeat`, which does not take explicit shardings; and through float32, so that the
    gradients of a group's heads are summed in float32.
    """
    group = heads // gate.shape[axis]
    if group == 1:
        return gate
    before, after = gate.shape[: axis + 1], gate.shape[axis + 1 :]
    wide = jnp.expand_dims(gate.astype(jnp.float32), axis + 1)
    wide = jnp.broadcast_to(wide, (*before, group, *after))
    return wide.reshape(*before[:-1], heads, *after).astype(gate.dtype)
