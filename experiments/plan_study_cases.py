"""What `plan_study.py` plans: models, slices and lengths of rows."""

import dataclasses
import itertools
import math

MODELS = ("transformer_1b", "phalanx_1b", "swa_hybrid_1b", "swax_1b", "swax_7b")
VOCABULARY = 50_304  # of all models, so that they have the same embeddings
LENGTHS = (8192, 32_768, 4096, 16_384)
LONGEST = 524_288
# Tokens of an update for each device, as many as the memory of its kind has room for.
TOKENS = {"v5e": 32_768, "v5p": 32_768, "tpu7x": 32_768, "h100": 16_384}
LESS = {("swax_7b", "v5e"): 4}  # by which they are divided
# Devices that share one copy of the parameters and their optimizer's state: as few as have room for
# them, since parts of fewer than 128 columns are no longer whole tiles of a TPU's memory.
SHARING = {"swax_7b": 32}
OTHERS_SHARING = 16
# Devices that share the heads of the longest rows, whose keys and values each device sees whole.
SHARING_HEADS = {"phalanx_1b": 4}
CORES = {"tpu7x": 2}  # devices of a chip
SLICES = ("v5e:16x16", "v5p:4x4x4", "tpu7x:4x4x4", "v5p:8x8x16")
GROWING = ("v5p:2x2x4", "v5p:4x4x4", "v5p:4x8x8", "v5p:8x8x16")
NODES = ("h100:1x8x1",)


@dataclasses.dataclass(frozen=True)
class Case:
    """One model on one slice, with rows of one length."""

    config: str
    topology: str
    length: int

    @property
    def name(self) -> str:
        """Unlike every other's."""
        return f"{self.config} {self.topology} {self.length}"

    @property
    def options(self) -> dict[str, int]:
        """What the plan's configuration changes."""
        chip, _, shape = self.topology.partition(":")
        devices = CORES.get(chip, 1) * math.prod(map(int, shape.split("x")))
        tokens = TOKENS[chip] // LESS.get((self.config, chip), 1)
        sequence = max(1, self.length // tokens)
        if sequence == 2:  # data 4, fsdp 32, sequence 2: libtpu finds no routes over 16 x 16 chips
            sequence = 4
        tensor = SHARING_HEADS.get(self.config, 1) if self.length == LONGEST else 1
        copies = devices // tensor
        return {
            "model.vocab_size": VOCABULARY,
            "mesh.data": -1,
            "mesh.fsdp": min(SHARING.get(self.config, OTHERS_SHARING), copies // sequence),
            "mesh.tensor": tensor,
            "mesh.sequence": sequence,
            "data.sequence_length": self.length,
            "data.batch_size": copies * tokens // self.length,
        }


def cases() -> list[Case]:
    """All of them, those first that say most."""
    first, *others = SLICES
    return list(
        dict.fromkeys(
            Case(*case)
            for case in (
                *itertools.product(MODELS, (first,), LENGTHS),
                *itertools.product(("phalanx_1b",), GROWING, (LENGTHS[0],)),
                *itertools.product(("phalanx_1b", "swax_1b"), (first,), (LONGEST,)),
                *itertools.product(MODELS, NODES, (LENGTHS[0],)),
                *itertools.product(MODELS, others, LENGTHS),
                *itertools.product(("phalanx_1b", "swax_1b"), others, (LONGEST,)),
            )
        )
    )
