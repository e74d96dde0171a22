"""Pure operators: arrays in, arrays out, exact gradients."""

from swr_jax.ops.attention import sliding_window_attention
from swr_jax.ops.gated_delta import (
    GatedDeltaState,
    gated_delta_rule,
    gated_delta_rule_step,
)
from swr_jax.ops.mlstm import mlstm, mlstm_step
from swr_jax.ops.mlstm_state import MLSTMState
from swr_jax.ops.recurrence import (
    gated_sliding_window_recurrence,
    linear_recurrence,
    recurrence_step,
    sliding_window_recurrence,
)
from swr_jax.ops.state import RecurrenceState

__all__ = [
    "GatedDeltaState",
    "MLSTMState",
    "RecurrenceState",
    "gated_delta_rule",
    "gated_delta_rule_step",
    "gated_sliding_window_recurrence",
    "linear_recurrence",
    "mlstm",
    "mlstm_step",
    "recurrence_step",
    "sliding_window_attention",
    "sliding_window_recurrence",
]
