"""Floating-point operations of a model's training, as its parameters and mixers say."""

from swr_jax.nn.language_model import LanguageModelConfig


def flops_per_token(config: LanguageModelConfig, *, num_params: int, length: int) -> float:
    """Forward and backward FLOPs of one token, without what rematerialisation repeats.

    6 per parameter, less an embedding that is only looked up, and 12 · num_heads · head_dim per
    attention layer and token seen (PaLM, arXiv 2204.02311, appendix B); a token sees
    (length + 1) / 2 tokens on average, or those of its window. A matrix memory of Dk x Dv numbers
    is read and written at every token, 12 · Dk · Dv per head, and by the delta rule read once more,
    18 · Dk · Dv; what evaluating it in chunks adds is not the model's. Phalanx's recurrence (under
    1 %) is not counted.

    Args:
        config: the model.
        num_params: its number of parameters.
        length: tokens per sequence.
    """
    looked_up = 0 if config.tie_embeddings else config.vocab_size * config.features
    window = min(config.window, length)
    seen = {
        "attention": (length + 1) / 2,
        # The first window - 1 tokens of a sequence see fewer.
        "swa": window - window * (window - 1) / (2 * length),
    }
    mixing = {name: 12.0 * config.heads_features * tokens for name, tokens in seen.items()}
    mlstm, delta = config.mlstm, config.gated_delta
    key_features = round(mlstm.qk_dim_factor * config.features)
    value_features = round(mlstm.v_dim_factor * config.features)
    mixing["mlstm"] = 12.0 * key_features * value_features / mlstm.num_heads
    head_dim = delta.head_dim or config.features // (2 * delta.num_heads)
    value_dim = round(delta.expand_v * head_dim)
    mixing["gated_delta"] = 18.0 * delta.num_heads * head_dim * value_dim
    mixers = [config.pattern[i % len(config.pattern)] for i in range(config.depth)]
    return 6.0 * (num_params - looked_up) + sum(mixing.get(mixer, 0.0) for mixer in mixers)
