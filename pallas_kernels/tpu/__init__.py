"""What TPU kernels of matrix memories share: tiling, calls, products, the chip's numbers."""
