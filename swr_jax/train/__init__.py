"""Sharded training of language models: begin with `swr_jax.train.loop.train`."""
