"""Chips to compile for, with the published figures that predictions rest on.

All figures are per JAX device: that is the whole chip, except on tpu7x, where each of a chip's two
TensorCores is a device with half of the memory bandwidth.

Sources
    GPUs: NVIDIA's data sheets and the CUDA programming guide's table of compute capabilities. The
    clock is the boost clock behind the data sheets' FP32 figures (SMs x 256 x clock). Matrix rates
    are those without sparsity.
    TPUs: Google Cloud's "system architecture" pages; clocks follow from the peak bf16 rate there
    and what the matrix units do in a cycle: 2·128² operations each on v4 to v5p (275 TFLOP/s of a
    v4 = 8 units x 2·128² x clock), and 8·256² in all on a TensorCore of v6e and tpu7x, which is
    what the compiler's estimates of matrix products come close to and do not exceed. Sizes of VMEM
    and the default limit of a kernel's share of it are those that libtpu enforces.
"""

import dataclasses

MIB = 1024 * 1024
GIB = 1024 * MIB
GPU_SCHEDULERS = 4  # per SM; each issues at most one warp's instruction in a cycle


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device of a kind.

    Attributes:
        name: what the command line calls it.
        platform: "gpu" or "tpu".
        topology: smallest topology that the compiler accepts for it.
        configuration: TPU: libtpu's name of how a chip's cores are used; "": its default.
        hbm_bytes_per_second: peak bandwidth of the device's memory.
        matrix_flops_per_second: peak of its matrix units on dense bf16 operands, a multiplication
            and an addition being two.
        clock_hz: clock of the SMs or TensorCores.
        cores: SMs, or TensorCores that share the device.
        vmem_bytes: TPU: VMEM of one TensorCore.
        vmem_limit_bytes: TPU: what one kernel may take unless it asks for more.
        compute_capability: GPU: major and minor.
        registers: GPU: 32-bit registers of one SM.
        shared_bytes: GPU: shared memory of one SM.
        shared_bytes_per_cta: GPU: most that one CTA can have.
        threads, ctas: GPU: most that one SM can hold at a time.
        l2_bytes: GPU: L2 cache.
        memory_bytes: of the device.
        link_bytes_per_second: what a device can send to others at a time over all its links (TPU:
            the interconnect of a slice; GPU: NVLink), in one direction; a peak.
        description: GPU: the name that the driver reports.
    """

    name: str
    platform: str
    topology: str
    hbm_bytes_per_second: float
    matrix_flops_per_second: float
    clock_hz: float
    cores: int
    configuration: str = ""
    vmem_bytes: int = 0
    vmem_limit_bytes: int = 0
    compute_capability: tuple[int, int] = (0, 0)
    registers: int = 65536
    shared_bytes: int = 233472
    shared_bytes_per_cta: int = 232448
    threads: int = 2048
    ctas: int = 32
    l2_bytes: int = 0
    memory_bytes: int = 0
    link_bytes_per_second: float = 0.0
    description: str = ""

    def target_config(self) -> str:
        """The GPU as the text of XLA's GpuTargetConfigProto."""
        major, minor = self.compute_capability
        return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: {self.threads}
  shared_memory_per_block: 49152  shared_memory_per_core: {self.shared_bytes}
  shared_memory_per_block_optin: {self.shared_bytes_per_cta}
  core_count: {self.cores}  fpus_per_core: 128  clock_rate_ghz: {self.clock_hz / 1e9}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {int(self.hbm_bytes_per_second)}  l2_cache_size: {self.l2_bytes}
  device_memory_size: {self.memory_bytes}
  registers_per_core_limit: {self.registers}  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
device_description_str: "{self.description}"
runtime_version {{ major: 13 minor: 0 }}
"""


_GPUS = (
    Chip(
        name="h100",
        platform="gpu",
        topology="1x1x1",
        hbm_bytes_per_second=3.35232e12,
        matrix_flops_per_second=9.894e14,
        clock_hz=1.98e9,
        cores=132,
        compute_capability=(9, 0),
        l2_bytes=50 * MIB,
        memory_bytes=84978434048,
        link_bytes_per_second=4.5e11,
        description="NVIDIA H100 80GB HBM3",
    ),
    Chip(
        name="h200",
        platform="gpu",
        topology="1x1x1",
        hbm_bytes_per_second=4.8e12,
        matrix_flops_per_second=9.894e14,
        clock_hz=1.98e9,
        cores=132,
        compute_capability=(9, 0),
        l2_bytes=50 * MIB,
        memory_bytes=150_000_000_000,
        link_bytes_per_second=4.5e11,
        description="NVIDIA H200",
    ),
    Chip(
        name="b200",
        platform="gpu",
        topology="1x1x1",
        hbm_bytes_per_second=8e12,
        matrix_flops_per_second=2.25e15,
        clock_hz=1.965e9,
        cores=148,
        compute_capability=(10, 0),
        l2_bytes=126 * MIB,
        memory_bytes=191_000_000_000,
        link_bytes_per_second=9e11,
        description="NVIDIA B200",
    ),
)
_TPUS = (
    Chip(
        *("v4", "tpu", "v4:2x2x1", 1.2e12, 2.75e14, 1.05e9, 2, "megacore", 16 * MIB, 16 * MIB),
        memory_bytes=32 * GIB,
        link_bytes_per_second=3e11,
    ),
    Chip(
        *("v5e", "tpu", "v5e:2x2", 8.19e11, 1.97e14, 1.5e9, 1, "", 128 * MIB, 16 * MIB),
        memory_bytes=16 * GIB,
        link_bytes_per_second=2e11,
    ),
    Chip(
        *("v5p", "tpu", "v5p:2x2x1", 2.765e12, 4.59e14, 1.75e9, 2, "", 64 * MIB, 16 * MIB),
        memory_bytes=95 * GIB,
        link_bytes_per_second=6e11,
    ),
    Chip(
        *("v6e", "tpu", "v6e:2x2", 1.64e12, 9.18e14, 1.75e9, 1, "", 128 * MIB, 32 * MIB),
        memory_bytes=32 * GIB,
        link_bytes_per_second=4.48e11,
    ),
    Chip(
        *("tpu7x", "tpu", "tpu7x:2x2x1", 3.69e12, 1.1535e15, 2.2e9, 1, "", 64 * MIB, 32 * MIB),
        memory_bytes=96 * GIB,
        link_bytes_per_second=6e11,
    ),
)

CHIPS: dict[str, Chip] = {chip.name: chip for chip in _GPUS + _TPUS}


def chip_named(chip: str | Chip) -> Chip:
    """The chip of that name; a `Chip` is returned as it is.

    Raises:
        ValueError: no chip has that name.
    """
    if isinstance(chip, Chip):
        return chip
    if chip not in CHIPS:
        raise ValueError(f"{chip=!r}: must be one of {', '.join(CHIPS)}")
    return CHIPS[chip]
