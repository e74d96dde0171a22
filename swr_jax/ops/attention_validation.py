"""Argument checks of attention, each with the argument, its value and the rule."""

import math
from numbers import Real

import jax.numpy as jnp


def check_inputs(q, k, v, window, segment_ids, implementation, options) -> None:
    """Raise ValueError unless the arguments of an attention fit together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(
                f"{name} has shape {x.shape}; it must be [batch, time, heads, features]"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} has dtype {x.dtype}; it must be floating: cast it first")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {x.dtype} and q has {q.dtype}; they must agree")
        if 0 in x.shape:
            raise ValueError(f"{name} has shape {x.shape}; every size must be at least 1")
    if k.shape != v.shape:
        raise ValueError(f"v has shape {v.shape} and k has {k.shape}; they must agree")
    if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(
            f"k has shape {k.shape} and q has {q.shape}; batch and features per head must agree"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"k has {k.shape[2]} heads and q has {q.shape[2]}; "
            "the key/value heads must divide the query heads"
        )
    if q.shape[1] > k.shape[1]:
        raise ValueError(
            f"q has {q.shape[1]} tokens and k has {k.shape[1]}; "
            "the queries must be the last of the tokens that the keys describe"
        )
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(
            f"window={window!r}; it must be an int of at least 1, or None for no window"
        )
    if segment_ids is not None:
        if segment_ids.shape != k.shape[:2]:
            raise ValueError(
                f"segment_ids has shape {segment_ids.shape}; it must be {k.shape[:2]}, "
                "one number per key"
            )
        if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
            raise ValueError(
                f"segment_ids has dtype {segment_ids.dtype}; it must be an integer dtype"
            )
    check_options(options)
    if implementation not in (None, "xla", "cudnn", "splash", "tokamax"):
        raise ValueError(
            f"implementation={implementation!r}; it must be None, 'xla', 'cudnn', 'splash' or "
            "'tokamax'"
        )


def check_options(options) -> None:
    """Raise ValueError unless scale and soft cap of the logits are ones that they can have."""
    for name, value, default in (
        ("scale", options.scale, "Dh ** -0.5"),
        ("logits_soft_cap", options.soft_cap, "no cap"),
    ):
        if value is not None and not (
            isinstance(value, Real) and math.isfinite(value) and value > 0
        ):
            raise ValueError(
                f"{name}={value!r}; it must be a finite number above 0, or None for {default}"
            )
