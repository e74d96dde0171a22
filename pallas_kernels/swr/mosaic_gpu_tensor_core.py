"""Forwards of the block two-pass recurrence on Hopper's tensor cores, to compare.

Notation as in `mosaic_gpu_kernels`; blocks of 16 tokens, lookback 1, no gates, no state, bfloat16.
For every block and head

    L    [16, 16]  local operator: the states E that the identity would give as input
    G    [16, 16]  what the previous block's tokens have decayed to: L's last row there, carried on
    x = L u + G u_previous

L and G come from the vector form's own recurrence, 16 columns in place of F features, in float32;
they are rounded to bfloat16 and left in shared memory, from where `wgmma` gets them as A, in
registers, which need no swizzle. There are two ways to fill its M = 64 rows:

    heads   four heads of a block, row = 4 token + head, their inputs side by side along N = 4 F,
            K = 16 twice; wanted are the elements where row and column have the same head, a quarter
    blocks  four blocks of a head, N = F, K = 16 five times: the operator of 64 tokens and the block
            before them is block bidiagonal, and 8 of its 20 blocks are not zero. Zeros lie around
            each pair (L; G) in shared memory, so that five windows of 64 rows slide over them

Multiply-adds per token and head: 32 to build L and G, then 128 F (heads) or 80 F (blocks) on the
tensor cores, where 24.5 F are not zero beforehand; the vector form takes 2 F in all. Bytes at
F = 16: reads 32 + 2, writes 32, as the vector form; the halo adds 16 (heads) or 64 / chunk.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.interpreter import simulated_platform
from pallas_kernels.swr.mosaic_gpu_kernels import COMPILER_PARAMS, WARPS, _start_loads, _walk

Array = jax.Array
Ref = jax.Ref
BLOCK = 16  # tokens of a block, and K of one wgmma in 16 bits
GROUP = 4  # heads or blocks along the M = 64 rows of a wgmma
ROWS = GROUP * BLOCK
STRIP = 2 * ROWS  # 48 rows of zeros, L, G, and 48 rows of zeros
DTYPE = jnp.bfloat16
# Tiles of 8 x 16 elements, which is what a K of 16 allows.
OPERAND = (plgpu.TilingTransform((8, 16)), plgpu.SwizzleTransform(32))
# Of inputs, where zeros are stored.
ZEROS = plgpu.Layout.TILED(plgpu.Tiling(((16, 16), (4, 16), (2,))), (-5,), (-3, -2), -1)


@dataclasses.dataclass(frozen=True)
class TensorCoreConfig:
    """How the work is cut up.

    Attributes:
        packing: "heads" or "blocks", what lies along M.
        heads: heads that a thread block owns: 16 or 32 ("heads"), 2 or 4 ("blocks").
        chunk: tokens that a thread block walks through, a multiple of 64.
        slots: stages in shared memory, of 16 tokens ("heads") or 64 ("blocks"), at least 3; all but
            two are in flight.
    """

    packing: str = "heads"
    heads: int = 16
    chunk: int = 1024
    slots: int = 4

    def __post_init__(self):
        allowed = {"heads": (16, 32), "blocks": (2, 4)}
        if self.packing not in allowed:
            raise ValueError(f"packing={self.packing!r}: must be one of {tuple(allowed)}")
        if self.heads not in allowed[self.packing]:
            raise ValueError(f"heads={self.heads}: must be one of {allowed[self.packing]}")
        if self.chunk < ROWS or self.chunk % ROWS:
            raise ValueError(f"chunk={self.chunk}: must be a multiple of {ROWS}")
        if self.slots < 3:
            raise ValueError(f"slots={self.slots}: must be at least 3")

    @property
    def tokens(self) -> int:
        """Tokens of a stage."""
        return BLOCK if self.packing == "heads" else ROWS


def forward(a: Array, v: Array, config: TensorCoreConfig | None = None) -> Array:
    """Return x = SWR(a, v) for blocks of 16 tokens and lookback 1.

    Args:
        a: decays [B, T, H], bfloat16, T a multiple of a stage's tokens, H of 8 and `config.heads`.
        v: inputs [B, T, H, F], bfloat16, F a multiple of 16 up to 64 ("heads") or 256 ("blocks").
        config: how the work is cut up; None for the default.

    Returns:
        States [B, T, H, F], bfloat16; products of decays in float32, rounded to bfloat16 for the
        products with v, which are added up in float32.

    Raises:
        NotImplementedError: other shapes or dtypes.
    """
    config = config or TensorCoreConfig()
    _, time, heads, features = v.shape
    if a.dtype != DTYPE or v.dtype != DTYPE:
        raise NotImplementedError(f"a.dtype={a.dtype}, v.dtype={v.dtype}: must be bfloat16")
    if time % config.tokens or heads % max(8, config.heads):
        raise NotImplementedError(f"v.shape={v.shape}: T or H does not fit {config}")
    if features % 16 or features > (64 if config.packing == "heads" else 256):
        raise NotImplementedError(f"F={features}: out of reach for packing={config.packing!r}")
    return (_forward_heads if config.packing == "heads" else _forward_blocks)(a, v, config)


def _place(time: int, config: TensorCoreConfig) -> tuple[Array, Array, Array, Array, Array]:
    """Return batch element, first head, first stage, stages, and how many are halo."""
    chunk, per_chunk = lax.axis_index("chunk"), config.chunk // config.tokens
    halo = jnp.where(chunk == 0, 0, 1)
    stages = jnp.minimum(time // config.tokens - chunk * per_chunk, per_chunk) + halo
    head = lax.axis_index("head") * config.heads
    return lax.axis_index("batch"), head, chunk * per_chunk - halo, stages, halo


def _launch(body, v: Array, config: TensorCoreConfig, scratch) -> Array:
    batch, time, heads, _ = v.shape
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(v.shape, DTYPE),
        scratch_types=[plgpu.Barrier(num_arrivals=2, num_barriers=config.slots), *scratch],
        grid=(heads // config.heads, pl.cdiv(time, config.chunk), batch),
        grid_names=("head", "chunk", "batch"),
        compiler_params=COMPILER_PARAMS,
        kernel_name="swr_tensor_core_forward",
    )


def _forward_heads(a: Array, v: Array, config: TensorCoreConfig) -> Array:
    batch, time, heads, features = v.shape
    tile, slots, groups = config.heads, config.slots, config.heads // GROUP
    shape = (groups, GROUP, BLOCK)
    if groups == WARPS:
        layout = _layout(shape, (2,), (-3, -2))
    else:
        layout = _layout(shape, (groups // WARPS, GROUP, BLOCK), (groups // 2,), (-4, -3, -2))

    def body(a_gmem, v_gmem, x_gmem, barriers, a_smem, u_smem, operators_smem, x_smem):
        element, head, first, steps, halo = _place(time, config)
        column = plgpu.broadcasted_iota(jnp.int32, shape, 2, layout=layout)
        row_head = lax.rem(
            plgpu.broadcasted_iota(jnp.int32, (ROWS, features), 0, layout=plgpu.Layout.WGMMA),
            jnp.int32(GROUP),
        )

        def tokens(step: Array):
            return pl.ds((first + step) * BLOCK, BLOCK)

        def load(step: Array, slot: Array) -> None:
            at = tokens(step)
            sources = [
                a_gmem.at[element, at, pl.ds(head, tile)],
                v_gmem.at[element, at, pl.ds(head * features, tile * features)],
            ]
            _start_loads(sources, [a_smem.at[slot], u_smem.at[slot]], barriers.at[slot])

        def compute(step: Array, slot: Array, own: Array) -> Array:
            window, own = own, jnp.zeros_like(own)
            for row in range(BLOCK):
                decay = _load_decay(a_smem.at[slot, row], (groups, GROUP), layout.reduce(2))
                decay = plgpu.layout_cast(lax.broadcast_in_dim(decay, shape, (0, 1)), layout)
                own = decay * own + (column == row).astype(jnp.float32)
                window = decay * window
                for which, x in enumerate((own, window)):
                    rows = operators_smem.at[which, :, pl.ds(row * GROUP, GROUP)]
                    _store(rows, x.astype(DTYPE))
            plgpu.commit_smem()
            before = lax.rem(step + (slots - 1), jnp.int32(slots))
            buffer = lax.rem(step, jnp.int32(2))
            for group in range(groups):
                columns = pl.ds(group * GROUP * features, GROUP * features)

                def multiply(acc, group=group, columns=columns):
                    for which, place in ((1, before), (0, slot)):
                        operator = _operand(operators_smem.at[which, group])
                        plgpu.wgmma(acc, operator, u_smem.at[place, :, columns])
                    return acc[...]

                product = pl.run_scoped(multiply, plgpu.ACC((ROWS, GROUP * features), jnp.float32))
                x = product[:, :features]
                for other in range(1, GROUP):
                    candidate = product[:, other * features : (other + 1) * features]
                    x = jnp.where(row_head == other, candidate, x)
                _store_rows(x_smem.at[buffer, group], x.astype(DTYPE))
            return own

        def store(step: Array, _: Array) -> None:
            @pl.when(step >= halo)
            def _():
                for group in range(groups):
                    at = (element, tokens(step), pl.ds(head + group * GROUP, GROUP))
                    source = x_smem.at[lax.rem(step, jnp.int32(2)), group]
                    plgpu.copy_smem_to_gmem(source, x_gmem.at[at], commit_group=False)
                plgpu.commit_smem_to_gmem_group()

        # The first block has no previous one: an operator of zeros meets inputs that are finite.
        _store_zeros(u_smem.at[slots - 1], (BLOCK, tile * features), ZEROS)
        plgpu.commit_smem()
        own = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)
        _walk(steps, slots, load, compute, store, barriers, own)

    scratch = [
        plgpu.SMEM((slots, BLOCK, tile), DTYPE),
        plgpu.SMEM((slots, BLOCK, tile * features), DTYPE, transforms=OPERAND),
        plgpu.SMEM((2, groups, ROWS, BLOCK), DTYPE),
        plgpu.SMEM((2, groups, BLOCK, GROUP, features), DTYPE),
    ]
    return _launch(body, v, config, scratch)(a, v.reshape(batch, time, heads * features))


def _forward_blocks(a: Array, v: Array, config: TensorCoreConfig) -> Array:
    batch, time, heads, features = v.shape
    tile, slots = config.heads, config.slots
    wide = max(8, tile)  # heads whose decays TMA can load, 16 bytes
    shape = (GROUP, tile, BLOCK)  # blocks, heads, columns
    layout = _layout(shape, (tile // 2,), (-3, -2))

    def body(a_gmem, v_gmem, x_gmem, barriers, a_smem, u_smem, strips_smem, last_smem, x_smem):
        element, head, first, steps, halo = _place(time, config)
        column = plgpu.broadcasted_iota(jnp.int32, shape, 2, layout=layout)
        within = lax.rem(head, jnp.int32(wide))

        def load(step: Array, slot: Array) -> None:
            blocks = pl.ds((first + step) * GROUP, GROUP)
            rows = pl.ds((first + step) * ROWS, ROWS)
            sources = [
                a_gmem.at[element, blocks, :, pl.ds(head - within, wide)],
                v_gmem.at[element, rows, pl.ds(head * features, tile * features)],
            ]
            _start_loads(sources, [a_smem.at[slot], u_smem.at[slot]], barriers.at[slot])

        def compute(step: Array, slot: Array, state: tuple) -> tuple:
            decays = []
            own = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)
            for row in range(BLOCK):
                decay = plgpu.load(
                    a_smem.at[slot, :, row, pl.ds(within, tile)],
                    layout=layout.reduce(2),
                    optimized=False,
                ).astype(jnp.float32)
                decays.append(plgpu.layout_cast(lax.broadcast_in_dim(decay, shape, (0, 1)), layout))
                own = decays[row] * own + (column == row).astype(jnp.float32)
                _store(strips_smem.at[pl.ds(1, GROUP), :, ROWS - BLOCK + row], own.astype(DTYPE))
            # Last rows of L, one block's after the other's: those of odd stages lie behind those of
            # even ones, and again before them, so that each stage finds the four that it needs.
            odd = lax.rem(step, jnp.int32(2))
            _store(last_smem.at[pl.ds(GROUP * (1 + odd), GROUP)], own)
            _store(last_smem.at[pl.ds(GROUP * (1 - odd), GROUP)], own)
            plgpu.commit_smem()
            previous = last_smem.at[pl.ds(GROUP * (1 + odd) - 1, GROUP)]
            window = plgpu.load(previous, layout=layout, optimized=False)
            for row in range(BLOCK):
                window = decays[row] * window
                _store(strips_smem.at[pl.ds(0, GROUP), :, ROWS + row], window.astype(DTYPE))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.commit_smem()
            before = lax.rem(step + (slots - 1), jnp.int32(slots))
            for index in range(tile):
                columns = pl.ds(index * features, features)

                def multiply(acc, index=index, columns=columns):
                    for k in range(GROUP + 1):
                        rows = pl.ds(ROWS - k * BLOCK, ROWS)
                        place, at = (slot, (k - 1) * BLOCK) if k else (before, ROWS - BLOCK)
                        operator = _operand(strips_smem.at[k, index, rows])
                        plgpu.wgmma(acc, operator, u_smem.at[place, pl.ds(at, BLOCK), columns])
                    return acc[...]

                x = pl.run_scoped(multiply, plgpu.ACC((ROWS, features), jnp.float32))
                _store(x_smem.at[index], x.astype(DTYPE))
            return state

        def store(step: Array, _: Array) -> None:
            @pl.when(step >= halo)
            def _():
                rows = pl.ds((first + step) * ROWS, ROWS)
                for index in range(tile):
                    target = x_gmem.at[element, rows, head + index]
                    plgpu.copy_smem_to_gmem(x_smem.at[index], target, commit_group=False)
                plgpu.commit_smem_to_gmem_group()

        _store_zeros(u_smem.at[slots - 1], (ROWS, tile * features), ZEROS)
        for k in range(GROUP + 1):
            for index in range(tile):
                _store_zeros(strips_smem.at[k, index], (STRIP, BLOCK), plgpu.Layout.WGMMA)
        for k in range(3):
            _store_zeros(last_smem.at[pl.ds(k * GROUP, GROUP)], shape, layout, jnp.float32)
        plgpu.commit_smem()
        _walk(steps, slots, load, compute, store, barriers, ())

    scratch = [
        plgpu.SMEM((slots, GROUP, BLOCK, wide), DTYPE),
        plgpu.SMEM((slots, ROWS, tile * features), DTYPE, transforms=OPERAND),
        plgpu.SMEM((GROUP + 1, tile, STRIP, BLOCK), DTYPE),
        plgpu.SMEM((3 * GROUP, tile, BLOCK), jnp.float32),
        plgpu.SMEM((tile, ROWS, features), DTYPE),
    ]
    a = a.reshape(batch, time // BLOCK, BLOCK, heads)
    return _launch(body, v, config, scratch)(a, v.reshape(batch, time, heads * features))


def _layout(*tiles_and_lanes):
    """Of rows of L or G, whose first dimension lies over the warps: tiles, then lane dimensions."""
    *tiles, lanes = tiles_and_lanes
    warps = -7 if len(tiles) == 3 else -4
    return plgpu.Layout.TILED(plgpu.Tiling(tuple(tiles)), (warps,), lanes, -1)


def _store(ref: Ref, x: Array) -> None:
    """Store x as it lies in registers."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, x, optimized=False)
    else:  # before JAX 0.12 stores exchange registers first, to have fewer bank conflicts
        ref[...] = x


def _store_zeros(ref: Ref, shape: tuple[int, ...], layout, dtype=DTYPE) -> None:
    _store(ref, plgpu.layout_cast(jnp.zeros(shape, dtype), layout))


# The interpreter takes neither a reshaped reference nor an A in registers.


def _is_simulated() -> bool:
    return simulated_platform() == "gpu"


def _load_decay(ref: Ref, shape: tuple[int, int], layout) -> Array:
    if _is_simulated():
        return ref[...].reshape(shape).astype(jnp.float32)
    return plgpu.load(ref.reshape(*shape), layout=layout, optimized=False).astype(jnp.float32)


def _operand(ref: Ref) -> Array | Ref:
    if _is_simulated():
        return ref
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)


def _store_rows(ref: Ref, x: Array) -> None:
    """Store x [64, F] into a reference [16, 4, F]."""
    if _is_simulated():
        ref[...] = x.reshape(ref.shape)
    else:
        _store(ref.reshape(*x.shape), x)
