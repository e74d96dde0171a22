"""Tuning parameters of the Hopper kernels: how work is cut up, never what is computed."""

import dataclasses

# Tokens that one stage of the pipeline holds; every supported block is a multiple of it.
SUBBLOCK = 16
# Longest block; chunks are multiples of it, so that no block lies in two of them.
LONGEST_BLOCK = 128
# Shared memory of one thread block on Hopper, less what barriers and alignment take, in bytes.
SHARED_MEMORY = 232448 - 4096


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How the launches are tiled; results do not depend on it.

    Attributes:
        heads: heads (of 16 or 8 features) that a thread block owns: 8, 16, 32 or 64; 8 only where
            they have 16.
        chunk: tokens that a thread block walks through, a multiple of 128.
        forward_slots: stages of 16 tokens that its shared memory holds, at least 2; all but one of
            them are in flight while one is computed.
        backward_slots: the same for the backward.
        line: elements, a power of two up to 256, that one row of a bulk copy has where the heads of
            a problem come in multiples of it; never less than one head. JAX's interpreter, which
            cannot reshape references, needs one head.
    """

    heads: int = 32
    chunk: int = 512
    forward_slots: int = 4
    backward_slots: int = 3
    line: int = 256

    def __post_init__(self):
        if self.heads not in (8, 16, 32, 64):
            raise ValueError(f"heads={self.heads}: must be 8, 16, 32 or 64")
        if self.chunk < LONGEST_BLOCK or self.chunk % LONGEST_BLOCK:
            raise ValueError(f"chunk={self.chunk}: must be a multiple of {LONGEST_BLOCK}")
        if self.line not in (8, 16, 32, 64, 128, 256):
            raise ValueError(f"line={self.line}: must be a power of two from 8 to 256")
        for name in ("forward_slots", "backward_slots"):
            slots = getattr(self, name)
            if slots < 2:
                raise ValueError(f"{name}={slots}: must be at least 2")


# Tilings that were faster than the rule below on a device, as `experiments/benchmark.py
# --suite=device --sections=tuning` prints them; by `default_config`'s halo, forward_bytes and
# backward_bytes, which say what a kernel does with a stage.
MEASURED: dict[tuple[int, int, int], TuningConfig] = {}


def default_config(
    *,
    batch: int,
    time: int,
    heads: int,
    multiprocessors: int,
    narrowest: int,
    halo: int,
    forward_bytes: int,
    backward_bytes: int,
) -> TuningConfig:
    """Return the default for a problem on a chip: what was measured, if the problem fills the chip.

    Otherwise tiles are as wide as the problem and shared memory allow. Chunks are as long as they
    can be (long ones recompute fewer halos) while thread blocks come out even over the
    multiprocessors.

    Args:
        batch, time, heads: B, T, H, H in heads of 16 or 8 features.
        multiprocessors: the chip's number of them.
        narrowest: fewest heads that a thread block can own.
        halo: tokens beyond a chunk that it needs.
        forward_bytes, backward_bytes: bytes of a stage of either pass, for each head.
    """
    measured = MEASURED.get((halo, forward_bytes, backward_bytes))
    if measured is not None and narrowest <= measured.heads <= heads:
        blocks = batch * (heads // measured.heads) * (time // measured.chunk)
        if blocks >= multiprocessors:
            return measured

    tile = 32
    while tile > narrowest and (tile >= 2 * heads or 3 * tile * backward_bytes > SHARED_MEMORY):
        tile //= 2

    def cost(chunk: int) -> float:
        """Turns of all multiprocessors, and what the halo adds to them."""
        blocks = batch * -(-heads // tile) * -(-time // chunk)
        return -(-blocks // multiprocessors) * (chunk + halo / 2)

    def slots(per_head: int) -> int:
        """Two thread blocks to a multiprocessor if each can have three stages, else one."""
        fitting = SHARED_MEMORY // 2 // (tile * per_head)
        return min(fitting if fitting >= 3 else SHARED_MEMORY // (tile * per_head), 4)

    chunk = min((1024, 512, 256, 128), key=cost)
    return TuningConfig(tile, chunk, slots(forward_bytes), slots(backward_bytes))
