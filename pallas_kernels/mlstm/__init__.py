"""Kernels of the chunkwise mLSTM: one module per backend, and what they share."""
