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
# Devices that share one copy of the parameters and their optimizer's state: as few as have room for
# them, since parts of fewer than 128 columns are no longer whole tiles of a TPU's memory.
SHARING = {"swax_7b": 32}
OTHERS_SHARING = 16
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
        chips = math.prod(map(int, shape.split("x")))
        sequence = max(1, self.length // TOKENS[chip])
        return {
            "model.vocab_size": VOCABULARY,
            "mesh.data": -1,
            "mesh.fsdp": min(SHARING.get(self.config, OTHERS_SHARING), chips // sequence),
            "mesh.sequence": sequence,
            "data.sequence_length": self.length,
            "data.batch_size": chips * TOKENS[chip] // self.length,
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
