"""Gradients that read what the forward pass has written for them, and rematerialisation."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.interpreter import simulated_platform


def with_residuals(solve: Callable, forward: Callable, backward: Callable) -> Callable:
    """Return `solve` with a gradient whose residuals are more than its arguments.

    Rematerialised, what runs first is `solve`, which writes no residuals that nobody would read.
    JAX 0.11 cannot do that to a simulation, which has effects: there it is `forward`.

    Args:
        solve: takes static options and arrays.
        forward: takes the same to what `solve` returns, and residuals.
        backward: takes the options, residuals and cotangents to cotangents of the arrays.
    """

    def differentiable(*, optimize_remat: bool) -> Callable:
        function = jax.custom_vjp(solve, nondiff_argnums=(0,))
        function.defvjp(forward, backward, optimize_remat=optimize_remat)
        return function

    on_chips, simulated = (differentiable(optimize_remat=choice) for choice in (True, False))

    @functools.wraps(solve)
    def run(*arguments: Any) -> Any:
        return (on_chips if simulated_platform() is None else simulated)(*arguments)

    return run
