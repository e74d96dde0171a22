"""Evaluation tasks that need no download."""

from swr_jax.eval.mqar import MQARConfig, accuracy_by_distance, mqar_batch, mqar_training_batch

__all__ = ["MQARConfig", "accuracy_by_distance", "mqar_batch", "mqar_training_batch"]
