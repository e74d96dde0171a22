"""Suite `device`: everything checked and timed on the GPU or TPU at hand, or in small on a CPU."""
