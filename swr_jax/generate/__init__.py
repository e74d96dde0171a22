"""Generation from a language model's state: tokens, text, batches, saved streams, an engine."""

from swr_jax.generate.conversation import Conversation
from swr_jax.generate.engine import Engine, EngineFull, Piece, Request
from swr_jax.generate.sampling import GREEDY, Sampling
from swr_jax.generate.saved import SavedStreamError, TokenStream
from swr_jax.generate.stop import StopStrings
from swr_jax.generate.text import Answer, generate_text, prompt_ids
from swr_jax.generate.tokens import generate_batch, generate_tokens

__all__ = [
    "GREEDY",
    "Answer",
    "Conversation",
    "Engine",
    "EngineFull",
    "Piece",
    "Request",
    "Sampling",
    "SavedStreamError",
    "StopStrings",
    "TokenStream",
    "generate_batch",
    "generate_text",
    "generate_tokens",
    "prompt_ids",
]
