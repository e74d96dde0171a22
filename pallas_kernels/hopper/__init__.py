"""What kernels on the tensor cores of Hopper GPUs share: tiles, loads, the chip's numbers."""
