"""The layouts of decoder checkpoints: Llama, Mistral, Qwen 2 and 3, Gemma 1, 2 and 3 (text)."""

import functools
import re
from collections.abc import Mapping
from typing import Any

from swr_jax.nn.convert_families import (
    ACTIVATIONS,
    FAMILIES,
    REFUSED,
    RULES,
    SIZES,
    Family,
    is_size,
)
from swr_jax.nn.convert_rope import FULL, SLIDING, read_rope, write_rope
from swr_jax.nn.convert_tensors import UNEMBEDDING, Layout, Source
from swr_jax.nn.language_model import LanguageModelConfig

_EMBEDDING = "model.embed_tokens.weight"
# Buffers of older checkpoints that rope_theta decides.
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_MIXERS = {FULL: "attention", SLIDING: "swa"}


def _config(fields: Mapping[str, Any], *, family: Family) -> LanguageModelConfig:
    problems: list[str] = []
    values = _values(fields, family, problems)
    rope = read_rope(
        fields, base=family.rope_base, local_base=family.rope_local_base, problems=problems
    )
    if problems:
        raise ValueError("config.json does not describe a model of here: " + "; ".join(problems))
    layers = _layers(values, family)
    features, heads = values["hidden_size"], values["num_attention_heads"]
    options = dict(family.options)
    if "attention_bias" in values:
        options["output_bias"] = values["attention_bias"]
        options["qkv_bias"] = values["attention_bias"]
    if SLIDING in layers:
        options["window"] = values["sliding_window"]
    if "query_pre_attn_scalar" in values:
        options["attention_scale"] = values["query_pre_attn_scalar"] ** -0.5
    activation = values[family.activation]
    if family.model_type == "gemma":
        # Its first releases say gelu and mean this.
        activation = "gelu_pytorch_tanh" if activation == "gelu" else activation
    return LanguageModelConfig(
        vocab_size=values["vocab_size"],
        features=features,
        depth=values["num_hidden_layers"],
        pattern=_shortest_period([_MIXERS[layer] for layer in layers]),
        num_heads=heads,
        num_kv_heads=values["num_key_value_heads"] or heads,
        head_dim=values["head_dim"] or features // heads,
        mlp_features=values["intermediate_size"],
        mlp_activation=ACTIVATIONS[activation],
        mlp_bias=values.get("mlp_bias", False),
        attention_soft_cap=values.get("attn_logit_softcapping"),
        logits_soft_cap=values.get("final_logit_softcapping"),
        embedding_scale=features**0.5 if family.scaled_embedding else 1.0,
        norm_epsilon=values["rms_norm_eps"],
        tie_embeddings=values["tie_word_embeddings"],
        **rope._asdict(),
        **options,
    )


def _values(fields: Mapping[str, Any], family: Family, problems: list[str]) -> dict[str, Any]:
    """Values of the fields that the family reads; what no model has goes to `problems`."""
    values = {}
    for name in SIZES:
        values[name] = fields.get(name)
        if name not in fields:
            problems.append(f"{name} is missing")
        elif not is_size(values[name]):
            problems.append(f"{name}={values[name]!r}; it must be an integer of at least 1")
    for name, default in family.defaults.items():
        values[name] = fields.get(name, default)
        if name in RULES and not RULES[name][0](values[name]):
            problems.append(f"{name}={values[name]!r}; it must be {RULES[name][1]}")
    for name, (allowed, rule) in REFUSED.items():
        if fields.get(name) not in allowed:
            problems.append(f"{name}={fields[name]!r}; it must be {rule}")
    if family.model_type == "gemma" and fields.get("hidden_activation") not in (
        None,
        "gelu_pytorch_tanh",
    ):
        problems.append(
            f"hidden_activation={fields['hidden_activation']!r}; it must be gelu_pytorch_tanh or "
            "null"
        )
    if values.get("use_sliding_window") is False:
        values["sliding_window"] = None
    types = fields.get("layer_types")
    if types is None or problems:
        return values
    if "layer_types" not in family.defaults:
        problems.append(f"layer_types={types!r}; model_type={family.model_type} has none")
    elif not isinstance(types, list) or not {*types} <= {*_MIXERS}:
        problems.append(f"layer_types={types!r}; it must be a list of {FULL} and {SLIDING}")
    elif len(types) != values["num_hidden_layers"]:
        problems.append(
            f"layer_types has {len(types)} entries; num_hidden_layers="
            f"{values['num_hidden_layers']} needs as many"
        )
    return values


def _layers(values: Mapping[str, Any], family: Family) -> list[str]:
    """The type of every block."""
    layers = values.get("layer_types")
    if layers is None:
        blocks = range(values["num_hidden_layers"])
        layers = [SLIDING if family.layers(values, block) else FULL for block in blocks]
    if SLIDING in layers and values.get("sliding_window") is None:
        raise ValueError(
            "config.json does not describe a model of here: sliding_window is null and "
            f"layer_types={layers} has {SLIDING}; it must be the number of tokens that they see"
        )
    return layers


def _shortest_period(mixers: list[str]) -> tuple[str, ...]:
    depth = len(mixers)
    periods = (n for n in range(1, depth + 1) if depth % n == 0)
    return next(tuple(mixers[:n]) for n in periods if mixers[:n] * (depth // n) == mixers)


def _fields(config: LanguageModelConfig, *, family: Family) -> dict[str, Any]:
    layers = list(config.pattern) * config.num_periods
    has_windows = "swa" in layers
    head_dim = config.heads_features // config.num_heads
    kv_heads = config.num_heads if config.num_kv_heads is None else config.num_kv_heads
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    names["gelu_tanh"] = "gelu_pytorch_tanh"
    scale = head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    known = {
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "head_dim": head_dim,
        "num_key_value_heads": kv_heads,
        family.activation: names[config.mlp_activation],
        "attention_bias": config.output_bias,
        "mlp_bias": config.mlp_bias,
        "use_sliding_window": has_windows,
        "sliding_window": config.window if has_windows else None,
        "layer_types": [SLIDING if name == "swa" else FULL for name in layers],
        # Read where there are no layer_types.
        "max_window_layers": layers.index("swa") if has_windows else len(layers),
        "query_pre_attn_scalar": max(1, round(scale**-2)),
        "attn_logit_softcapping": config.attention_soft_cap,
        "final_logit_softcapping": config.logits_soft_cap,
    }
    if family.model_type.startswith("gemma") and not has_windows:
        # Never read, but it must be a number.
        known["sliding_window"] = config.window
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.features,
        "intermediate_size": config.hidden_features,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        **{name: known[name] for name in family.defaults if name in known},
        **write_rope(config),
    }


def _sources(
    config: LanguageModelConfig,
    fields: Mapping[str, Any],  # noqa: ARG001 - one spelling only
) -> dict[str, Source]:
    table = (config.vocab_size, config.features)
    sources = {
        "embedding": Source(_EMBEDDING, table),
        "norm.scale": Source("model.norm.weight", (config.features,)),
    }
    if not config.tie_embeddings:
        sources["unembedding.kernel"] = Source(UNEMBEDDING, table)
    for place in range(len(config.pattern)):
        block = _block_sources(config)
        sources |= {f"periods.{place}.{path}": source for path, source in block.items()}
    return sources


def _block_sources(config: LanguageModelConfig) -> dict[str, Source]:
    features, hidden = config.features, config.hidden_features
    head_dim = config.heads_features // config.num_heads
    kv_heads = config.num_heads if config.num_kv_heads is None else config.num_kv_heads
    block = "model.layers.{block}"
    if config.post_norms:
        norms = {
            "mixer_norm": "input_layernorm",
            "mixer_post_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        }
    else:
        norms = {"mixer_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    sources = {
        f"{ours}.scale": Source(f"{block}.{theirs}.weight", (features,))
        for ours, theirs in norms.items()
    }
    if config.qk_norm:
        for ours, theirs in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
            name = f"{block}.self_attn.{theirs}.weight"
            sources[f"mixer.{ours}.scale"] = Source(name, (head_dim,))
    inner, inner_kv = config.num_heads * head_dim, kv_heads * head_dim
    for ours, theirs, rows, columns, has_bias in (
        ("mixer.query", "self_attn.q_proj", inner, features, config.qkv_bias),
        ("mixer.key", "self_attn.k_proj", inner_kv, features, config.qkv_bias),
        ("mixer.value", "self_attn.v_proj", inner_kv, features, config.qkv_bias),
        ("mixer.output", "self_attn.o_proj", features, inner, config.output_bias),
        ("mlp.gate", "mlp.gate_proj", hidden, features, config.mlp_bias),
        ("mlp.up", "mlp.up_proj", hidden, features, config.mlp_bias),
        ("mlp.down", "mlp.down_proj", features, hidden, config.mlp_bias),
    ):
        sources[f"{ours}.kernel"] = Source(f"{block}.{theirs}.weight", (rows, columns))
        if has_bias:
            sources[f"{ours}.bias"] = Source(f"{block}.{theirs}.bias", (rows,))
    return sources


TRANSFORMERS = {
    name: Layout(
        config=functools.partial(_config, family=family),
        fields=functools.partial(_fields, family=family),
        sources=_sources,
        embedding=_EMBEDDING,
        ignored=_IGNORED,
    )
    for name, family in FAMILIES.items()
}
