"""Tuning parameters of the Hopper kernels of the mLSTM: how work is cut up."""

import dataclasses

from pallas_kernels.hopper.chip import SHARED_MEMORY, TILE, fills

LONGEST_CHUNK = 256  # of the forward pass, where states go through memory
_MOST_CHUNKS = 8  # that a thread block does one after the other
_SHORTEST_PIECE = 1024  # tokens: states between pieces cost memory and time, too


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How the launches are tiled; results depend on it only through the chunks, in rounding.

    Attributes:
        chunk: tokens of a chunk in the backward pass, 64 or 128; None: what suits the shape.
        forward_chunk: in the forward pass, 64, 128 or 256; None likewise.
        fused: whether the forward pass is one walk and the backward pass two, in chunks of 64, as
            far as the state fits into registers; None: where sequences fill the chip.
        span: chunks that a thread block does one after the other, where chunks do not depend on
            each other; None: what suits the shape.
        pieces: equal ones that a walk takes every sequence as, and states are handed on between
            them; None: as few as fill the chip, none shorter than 1,024 tokens.
        q_tile: rows of the state, 64 or 128, that a thread block carries from chunk to chunk;
            None: what suits the shape.
        v_tile: columns of it, a multiple of 64 up to 256; None likewise.
        slots: stages that are loaded ahead, at most; fewer where shared memory has no room.
    """

    chunk: int | None = None
    forward_chunk: int | None = None
    fused: bool | None = None
    span: int | None = None
    pieces: int | None = None
    q_tile: int | None = None
    v_tile: int | None = None
    slots: int = 4

    def __post_init__(self):
        if self.chunk not in (None, 64, 128):
            raise ValueError(f"chunk={self.chunk}: must be 64, 128 or None")
        if self.forward_chunk not in (None, 64, 128, 256):
            raise ValueError(f"forward_chunk={self.forward_chunk}: must be 64, 128, 256 or None")
        for name in ("chunk", "forward_chunk"):
            chunk = getattr(self, name)
            if self.fused and chunk not in (None, TILE):
                raise ValueError(f"{name}={chunk}: must be {TILE} or None where fused is True")
        for name in ("span", "pieces"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"{name}={count}: must be at least 1 or None")
        if self.q_tile not in (None, 64, 128):
            raise ValueError(f"q_tile={self.q_tile}: must be 64, 128 or None")
        if self.v_tile not in (None, 64, 128, 192, 256):
            raise ValueError(f"v_tile={self.v_tile}: must be 64, 128, 192, 256 or None")
        if self.slots < 1:
            raise ValueError(f"slots={self.slots}: must be at least 1")


def suited_pieces(
    config: TuningConfig, thread_blocks: int, tiles: int, multiprocessors: int
) -> int | None:
    """Return how many pieces a walk takes each sequence as; None: no number fills the chip.

    Args:
        config: may name their number.
        thread_blocks: of a walk over whole sequences.
        tiles: of 64 tokens, that a sequence has.
        multiprocessors: of the chip.

    Raises:
        ValueError: the number that `config` names does not divide that of the tiles.
    """
    if config.pieces is not None:
        if tiles % config.pieces:
            raise ValueError(
                f"pieces={config.pieces}: must divide the {tiles} tiles of {TILE} tokens of a "
                "sequence; None chooses"
            )
        return config.pieces
    if fills(thread_blocks, multiprocessors) or config.fused:
        return 1
    for pieces in range(2, tiles * TILE // _SHORTEST_PIECE + 1):
        # No more than an eighth of the chip is left without work, in the last round either.
        rounds = -(-thread_blocks * pieces // multiprocessors)
        if tiles % pieces == 0 and fills(thread_blocks * pieces, rounds * multiprocessors):
            return pieces
    return None


def state_tiles(
    config: TuningConfig, sequences: int, q_dim: int, v_dim: int, multiprocessors: int
) -> tuple[int, int]:
    """Return the tile of the state, rows and columns, that a thread block carries.

    The largest ones that leave no more than an eighth of the chip without a thread block: small
    ones read q, k, v again.
    """
    q_tiles = [x for x in (128, 64) if q_dim % x == 0 and config.q_tile in (None, x)]
    v_tiles = [x for x in (256, 192, 128, 64) if v_dim % x == 0 and config.v_tile in (None, x)]
    if not q_tiles or not v_tiles:
        raise ValueError(f"{config}: its tiles do not divide a state of {q_dim} x {v_dim}")
    sizes = sorted(((q, v) for q in q_tiles for v in v_tiles), key=lambda x: (-x[0] * x[1], -x[0]))
    for q_tile, v_tile in sizes:
        if fills(sequences * (q_dim // q_tile) * (v_dim // v_tile), multiprocessors):
            return q_tile, v_tile
    return sizes[-1]


def suited_span(sequences: int, chunks: int, multiprocessors: int) -> int:
    """Return how many chunks a thread block does one after the other.

    Its loads run ahead from chunk to chunk, so several are better than one, up to eight; but first
    there have to be two thread blocks for each multiprocessor.
    """
    return max(1, min(_MOST_CHUNKS, sequences * chunks // (2 * multiprocessors)))


def fitting_slots(config: TuningConfig, fixed_bytes: int, slot_bytes: int) -> int:
    """Return how many slots shared memory holds beside `fixed_bytes`; 0: not one."""
    return min(config.slots, (SHARED_MEMORY - fixed_bytes) // slot_bytes)
