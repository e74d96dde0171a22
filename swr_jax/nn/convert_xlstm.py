"""The layout of xLSTM checkpoints (arXiv 2503.13427), such as xLSTM-7B."""

from collections.abc import Callable, Mapping
from typing import Any

from swr_jax.nn.blocks import MLSTMConfig
from swr_jax.nn.convert_tensors import UNEMBEDDING, Layout, Source
from swr_jax.nn.language_model import LanguageModelConfig

# `eps` is added to the denominator of the mLSTM, so it scales what a head puts out, and the norm of
# the head, next in line, takes scales out again: this much moves logits by about 1e-6 of their
# size. The operator has none, because what it does hangs on the stabiliser, which has no meaning.
_XLSTM_MAX_EPSILON = 1e-5
# Sizes that config.json must give, under one of these names.
_XLSTM_SIZES = (
    ("vocab_size",),
    ("hidden_size", "embedding_dim"),
    ("num_hidden_layers", "num_blocks"),
    ("num_heads",),
)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


def _is_cap(value: Any) -> bool:
    return value is None or _is_positive(value)


def _is_small(value: Any) -> bool:
    return value == 0 or (_is_positive(value) and value <= _XLSTM_MAX_EPSILON)


# Options in config.json: the format's default, which values there may be, and the same in words.
_XLSTM_OPTIONS: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "qk_dim_factor": (0.5, _is_positive, "above 0"),
    "v_dim_factor": (1.0, _is_positive, "above 0"),
    "ffn_proj_factor": (2.667, _is_positive, "above 0"),
    "ffn_round_up_to_multiple_of": (64, _is_positive, "above 0"),
    "gate_soft_cap": (15.0, _is_cap, "above 0, or null for no cap"),
    "output_logit_soft_cap": (30.0, _is_cap, "above 0, or null for no cap"),
    "norm_eps": (1e-6, _is_positive, "above 0"),
    "eps": (1e-6, _is_small, f"in [0, {_XLSTM_MAX_EPSILON}]"),
    "use_bias": (False, lambda x: x is False, "false: the layers here have no such biases"),
    "tie_word_embeddings": (False, lambda x: isinstance(x, bool), "true or false"),
    "weight_mode": ("single", lambda x: x in ("single", "fused"), "single or fused"),
}
_EMBEDDING = "backbone.embeddings.weight"


def _xlstm_options(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return sizes, under the first of their names, and options, after checking them all."""
    options, problems = {}, []
    if (kind := fields.get("model_type")) != "xlstm":
        problems.append(f"model_type={kind!r}; it must be xlstm")
    for names in _XLSTM_SIZES:
        given = {name: fields[name] for name in names if fields.get(name) is not None}
        if not given:
            problems.append(f"{' or '.join(names)} is missing")
            continue
        options[names[0]], *others = given.values()
        if any(other != options[names[0]] for other in others):
            spelled = ", ".join(f"{name}={value!r}" for name, value in given.items())
            problems.append(f"{spelled}; they must be equal")
        elif not isinstance(options[names[0]], int) or options[names[0]] < 1:
            size = next(f"{name}={value!r}" for name, value in given.items())
            problems.append(f"{size}; it must be an integer of at least 1")
    for name, (default, is_allowed, rule) in _XLSTM_OPTIONS.items():
        options[name] = fields.get(name, default)
        if not is_allowed(options[name]):
            problems.append(f"{name}={options[name]!r}; it must be {rule}")
    if problems:
        raise ValueError("config.json does not describe a model of here: " + "; ".join(problems))
    return options


def _xlstm_config(fields: Mapping[str, Any]) -> LanguageModelConfig:
    options = _xlstm_options(fields)
    features, multiple = options["hidden_size"], options["ffn_round_up_to_multiple_of"]
    # Not quite rounded up, but what the format does: 256.03 becomes 256 and not 320.
    mlp_features = features * options["ffn_proj_factor"] + multiple - 1
    return LanguageModelConfig(
        vocab_size=options["vocab_size"],
        features=features,
        depth=options["num_hidden_layers"],
        pattern=("mlstm",),
        mlp_features=int(mlp_features // multiple * multiple),
        mlstm=MLSTMConfig(
            num_heads=options["num_heads"],
            # The format rounds these widths down, MLSTM to the nearest.
            qk_dim_factor=int(features * options["qk_dim_factor"]) / features,
            v_dim_factor=int(features * options["v_dim_factor"]) / features,
            gate_soft_cap=options["gate_soft_cap"],
            head_norm="layer",
            input_gate="exp",
        ),
        tie_embeddings=options["tie_word_embeddings"],
        logits_soft_cap=options["output_logit_soft_cap"],
        norm_epsilon=options["norm_eps"],
    )


def _xlstm_fields(config: LanguageModelConfig) -> dict[str, Any]:
    features, hidden = config.features, config.hidden_features
    return {
        "architectures": ["xLSTMForCausalLM"],
        "model_type": "xlstm",
        "vocab_size": config.vocab_size,
        "hidden_size": features,
        "embedding_dim": features,
        "num_hidden_layers": config.depth,
        "num_blocks": config.depth,
        "num_heads": config.mlstm.num_heads,
        "qk_dim_factor": _factor(round(features * config.mlstm.qk_dim_factor), features),
        "v_dim_factor": _factor(round(features * config.mlstm.v_dim_factor), features),
        "ffn_proj_factor": hidden / features,
        "ffn_round_up_to_multiple_of": 64 if hidden % 64 == 0 else hidden,
        "gate_soft_cap": config.mlstm.gate_soft_cap,
        "output_logit_soft_cap": config.logits_soft_cap,
        "norm_eps": config.norm_epsilon,
        "use_bias": False,
        "add_out_norm": True,
        "tie_word_embeddings": config.tie_embeddings,
        "weight_mode": "single",
    }


def _factor(width: int, features: int) -> float:
    """A factor that the format, which rounds down, makes this width of."""
    factor = width / features
    return factor if int(features * factor) == width else (width + 0.5) / features


def _xlstm_sources(config: LanguageModelConfig, fields: Mapping[str, Any]) -> dict[str, Source]:
    sources = {
        "embedding": Source(_EMBEDDING, (config.vocab_size, config.features)),
        "norm.scale": Source("backbone.out_norm.weight", (config.features,)),
    }
    if not config.tie_embeddings:
        shape = (config.vocab_size, config.features)
        sources["unembedding.kernel"] = Source(UNEMBEDDING, shape)
    fused = fields.get("weight_mode") == "fused"
    for place in range(len(config.pattern)):
        sources |= _block_sources(config, f"periods.{place}", fused=fused)
    return sources


def _block_sources(config: LanguageModelConfig, path: str, *, fused: bool) -> dict[str, Source]:
    features, heads, hidden = config.features, config.mlstm.num_heads, config.hidden_features
    qk = round(features * config.mlstm.qk_dim_factor)
    v = round(features * config.mlstm.v_dim_factor)
    block = "backbone.blocks.{block}"
    layer, ffn = f"{block}.mlstm_layer", f"{block}.ffn"
    sources = {
        f"{path}.mixer_norm.scale": Source(f"{block}.norm_mlstm.weight", (features,)),
        f"{path}.mlp_norm.scale": Source(f"{block}.norm_ffn.weight", (features,)),
        f"{path}.mixer.head_norm.scale": Source(f"{layer}.multihead_norm.weight", (v,)),
        f"{path}.mixer.output.kernel": Source(f"{layer}.out_proj.weight", (features, v)),
        f"{path}.mlp.down.kernel": Source(f"{ffn}.proj_down.weight", (features, hidden)),
    }
    inputs = {
        "mixer.query": ("q", qk),
        "mixer.key": ("k", qk),
        "mixer.value": ("v", v),
        "mixer.output_gate": ("ogate_preact", v),
    }
    gates = {
        "mixer.input_gate": ("igate_preact", heads),
        "mixer.forget_gate": ("fgate_preact", heads),
    }
    ups = {"mlp.gate": ("proj_up_gate", hidden), "mlp.up": ("proj_up", hidden)}
    # Projections of the same input: one tensor each, or the rows of one for all of them.
    for parent, joint, parts, kind, stored_kind, inner in (
        (layer, "qkv_opreact", inputs, "kernel", "weight", (features,)),
        (layer, "ifgate_preact", gates, "kernel", "weight", (features,)),
        (layer, "ifgate_preact", gates, "bias", "bias", ()),
        (ffn, "proj_up_gate_z", ups, "kernel", "weight", (features,)),
    ):
        start, total = 0, sum(size for _, size in parts.values())
        for part, (name, size) in parts.items():
            if fused:
                source = Source(
                    f"{parent}.{joint}.{stored_kind}", (total, *inner), slice(start, start + size)
                )
            else:
                source = Source(f"{parent}.{name}.{stored_kind}", (size, *inner))
            sources[f"{path}.{part}.{kind}"] = source
            start += size
    return sources


XLSTM = Layout(
    config=_xlstm_config, fields=_xlstm_fields, sources=_xlstm_sources, embedding=_EMBEDDING
)
