"""Whether two configurations describe the same function of the same parameters."""

import dataclasses
import math
from typing import Any

from swr_jax.nn.language_model import LanguageModelConfig


def differences(first: LanguageModelConfig, second: LanguageModelConfig) -> list[str]:
    """Name what makes models of two configurations compute something else, with both values.

    Defaults are filled in, and what a model has no use for, such as a window without "swa", counts
    for nothing; nor do dtypes, rematerialisation and the sizes of chunks. Numbers may differ by
    their rounding.
    """
    ours, theirs = _arithmetic(first), _arithmetic(second)
    return [
        f"{name}={ours.get(name)!r} instead of {theirs.get(name)!r}"
        for name in {**ours, **theirs}
        if not _are_equal(ours.get(name), theirs.get(name))
    ]


def _are_equal(first: Any, second: Any) -> bool:
    if isinstance(first, float) and isinstance(second, float):
        return math.isclose(first, second, rel_tol=1e-12)
    return first == second


def _arithmetic(config: LanguageModelConfig) -> dict[str, Any]:
    layers = tuple(config.pattern) * config.num_periods
    values: dict[str, Any] = {"pattern": layers, "mlp_features": config.hidden_features}
    for name in (
        *("vocab_size", "features", "mlp_activation", "mlp_bias", "norm_epsilon", "norm_offset"),
        *("post_norms", "tie_embeddings", "embedding_scale", "logits_soft_cap"),
    ):
        values[name] = getattr(config, name)
    if {"attention", "swa"} & {*layers}:
        values |= _attention(config, layers)
    if "mlstm" in layers:
        mlstm = dataclasses.asdict(config.mlstm)
        for name in ("qk_dim_factor", "v_dim_factor"):
            mlstm[name] = round(mlstm[name] * config.features) / config.features
        del mlstm["chunk_size"]
        values |= {f"mlstm.{name}": value for name, value in mlstm.items()}
    for mixer in {"phalanx", "gated_delta"} & {*layers}:
        values[mixer] = getattr(config, mixer)
    return values


def _attention(config: LanguageModelConfig, layers: tuple[str, ...]) -> dict[str, Any]:
    head_dim = config.heads_features // config.num_heads
    values = {
        "head_dim": head_dim,
        "num_kv_heads": config.num_heads if config.num_kv_heads is None else config.num_kv_heads,
        "attention_scale": config.attention_scale or head_dim**-0.5,
    }
    for name in ("num_heads", "qkv_bias", "output_bias", "qk_norm", "attention_soft_cap"):
        values[name] = getattr(config, name)
    local = config.rope_local_base
    if "attention" in layers:
        values |= {"rope_base": config.rope_base, "rope_scaling": config.rope_scaling}
    if "swa" in layers:
        values |= {
            "window": config.window,
            "rope_local_base": config.rope_base if local is None else local,
            "rope_scaling of swa": config.rope_scaling if local is None else None,
        }
    return values
