"""Families of decoder checkpoints: which fields of config.json they read, and what they mean.

A family is what transformers calls a model_type. Absent fields mean what they do there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

# Names of activations there, and here.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# Fields that must be there.
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


def is_size(value: Any) -> bool:
    """Whether a value from JSON is an integer of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_positive(value: Any) -> bool:
    """Whether a value from JSON is a number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _or_null(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


# Which values a field may have, and the same in words.
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_key_value_heads": (_or_null(is_size), "an integer of at least 1, or null"),
    "head_dim": (_or_null(is_size), "an integer of at least 1, or null"),
    "hidden_act": (ACTIVATIONS.__contains__, f"one of {', '.join(ACTIVATIONS)}"),
    "hidden_activation": (ACTIVATIONS.__contains__, f"one of {', '.join(ACTIVATIONS)}"),
    "rms_norm_eps": (is_positive, "above 0"),
    "tie_word_embeddings": (_is_bool, "true or false"),
    "attention_bias": (_is_bool, "true or false"),
    "mlp_bias": (_is_bool, "true or false"),
    "sliding_window": (_or_null(is_size), "an integer of at least 1, or null for no window"),
    "use_sliding_window": (_is_bool, "true or false"),
    "max_window_layers": (lambda x: isinstance(x, int) and x >= 0, "an integer of at least 0"),
    "sliding_window_pattern": (is_size, "an integer of at least 1"),
    "query_pre_attn_scalar": (is_positive, "above 0"),
    "attn_logit_softcapping": (_or_null(is_positive), "above 0, or null for no cap"),
    "final_logit_softcapping": (_or_null(is_positive), "above 0, or null for no cap"),
}
# Fields of any family that must say nothing, and why.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "quantization_config": ((None,), "null: weights must be floating"),
    "partial_rotary_factor": ((None, 1, 1.0), "1: all features of a head are rotated here"),
    "use_bidirectional_attention": ((None, False), "false: attention is causal here"),
    "num_experts": ((None, 0), "null: feed-forward networks have no experts here"),
    "num_local_experts": ((None, 0), "null: feed-forward networks have no experts here"),
}


@dataclass(frozen=True)
class Family:
    """What a model_type means.

    Attributes:
      model_type: its name in config.json.
      architecture: the class that transformers makes of it.
      defaults: the fields that it reads, with what absent ones mean.
      options: of `LanguageModelConfig`, that all of its models have.
      layers: whether a block has a window, from the fields and its number, without layer_types.
      rope_base: base of the positions where config.json has none.
      rope_local_base: the same of windows; None: they have none of their own.
      scaled_embedding: whether embedded tokens are multiplied by the root of the width.
    """

    model_type: str
    architecture: str
    defaults: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    layers: Callable[[Mapping[str, Any], int], bool] = lambda fields, block: False  # noqa: ARG005
    rope_base: float = 10_000.0
    rope_local_base: float | None = None
    scaled_embedding: bool = False

    @property
    def activation(self) -> str:
        """Name of the field of the activation."""
        return "hidden_act" if "hidden_act" in self.defaults else "hidden_activation"


_COMMON = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "head_dim": None}
_QWEN = {
    **_COMMON,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_GEMMA = {
    **_COMMON,
    "tie_word_embeddings": True,
    "head_dim": 256,
    "attention_bias": False,
}
_GEMMA_2 = {
    **_GEMMA,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
}


def _windows_after(fields: Mapping[str, Any], block: int) -> bool:
    return fields["sliding_window"] is not None and block >= fields["max_window_layers"]


FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            {
                **_COMMON,
                "num_key_value_heads": None,
                "hidden_act": "silu",
                "attention_bias": False,
                "mlp_bias": False,
            },
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            {**_COMMON, "num_key_value_heads": 8, "hidden_act": "silu", "sliding_window": 4096},
            layers=lambda fields, block: fields["sliding_window"] is not None,  # noqa: ARG005
        ),
        Family("qwen2", "Qwen2ForCausalLM", _QWEN, {"qkv_bias": True}, _windows_after),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            {**_QWEN, "head_dim": 128, "attention_bias": False},
            {"qk_norm": True},
            _windows_after,
        ),
        Family(
            "gemma",
            "GemmaForCausalLM",
            {**_GEMMA, "num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh"},
            {"norm_offset": 1.0},
            scaled_embedding=True,
        ),
        Family(
            "gemma2",
            "Gemma2ForCausalLM",
            {**_GEMMA_2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
            {"norm_offset": 1.0, "post_norms": True},
            lambda fields, block: block % 2 == 0,  # noqa: ARG005
            scaled_embedding=True,
        ),
        Family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            {
                **_GEMMA_2,
                "attn_logit_softcapping": None,
                "final_logit_softcapping": None,
                "sliding_window_pattern": 6,
            },
            {"norm_offset": 1.0, "post_norms": True, "qk_norm": True},
            lambda fields, block: (block + 1) % fields["sliding_window_pattern"] != 0,
            rope_base=1_000_000.0,
            rope_local_base=10_000.0,
            scaled_embedding=True,
        ),
    )
}
