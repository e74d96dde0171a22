"""Pallas kernels for GPUs and TPUs: arrays in, arrays out.

`pallas_kernels.swr` has the kernels of the sliding-window recurrence, `pallas_kernels.mlstm` and
`pallas_kernels.gated_delta` those of matrix memories, `pallas_kernels.hopper` what these share on
GPUs. `pallas_kernels.targets` compiles a kernel for a named chip with no chip present and reports
what it takes, and `pallas_kernels.catalogue` lists our kernels with their budgets. Nothing here
imports `swr_jax`.
"""
