"""A forward of the block two-pass recurrence on Hopper's tensor cores, to compare.

Notation as in `mosaic_gpu_kernels`; blocks of 16 tokens, lookback 1, no gates, no state, bfloat16.
For every block and head

    L    [16, 16]  local operator: the states E that the identity would give as input
    G    [16, 16]  what the previous block's tokens have decayed to: L's last row there, carried on
    x = L u + G u_previous

L and G come from the vector form's own recurrence, 16 columns in place of F features, in float32;
they are rounded to bfloat16 and left in shared memory. Four heads at a time lie along the M = 64
rows of `wgmma`, row = 4 token + head, and their inputs side by side along N = 4 F, so that K = 16
takes two instructions a group of four heads; of the product only the blocks where the heads of row
and column agree are wanted, a quarter. A comes from registers, so that its tile needs no swizzle.

Bytes per token and head at F = 16: reads 32 + 2, writes 32, the halo 16 / chunk more, as the vector
form. Multiply-adds: 2 x 16 to build L and G whatever F is, the vector form's 2 F; on the tensor
cores 4 x 32 F, of which 16.5 F (E) + 16 F are not known to be zero beforehand.
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
GROUP = 4  # heads along the M = 64 rows of a wgmma
ROWS = GROUP * BLOCK
DTYPE = jnp.bfloat16
# Tiles of 8 x 16 elements, which is what a K of 16 allows.
OPERAND = (plgpu.TilingTransform((8, 16)), plgpu.SwizzleTransform(32))
# Of 16 tokens of inputs, where zeros are stored.
ZEROS = plgpu.Layout.TILED(plgpu.Tiling(((16, 16), (4, 16), (2,))), (-5,), (-3, -2), -1)


@dataclasses.dataclass(frozen=True)
class TensorCoreConfig:
    """How the work is cut up.

    Attributes:
        heads: heads that a thread block owns: 16 or 32.
        chunk: tokens that a thread block walks through, a multiple of 16.
        slots: stages of 16 tokens in shared memory, at least 3; all but two are in flight.
    """

    heads: int = 16
    chunk: int = 1024
    slots: int = 4

    def __post_init__(self):
        if self.heads not in (16, 32):
            raise ValueError(f"heads={self.heads}: must be 16 or 32")
        if self.chunk < BLOCK or self.chunk % BLOCK:
            raise ValueError(f"chunk={self.chunk}: must be a multiple of {BLOCK}")
        if self.slots < 3:
            raise ValueError(f"slots={self.slots}: must be at least 3")


def forward(a: Array, v: Array, config: TensorCoreConfig = TensorCoreConfig()) -> Array:
    """Return x = SWR(a, v) for blocks of 16 tokens and lookback 1.

    Args:
        a: decays [B, T, H], bfloat16, T a multiple of 16 and H one of `config.heads`.
        v: inputs [B, T, H, F], bfloat16, F 16, 32 or 64.
        config: how the work is cut up.

    Returns:
        States [B, T, H, F], bfloat16; products of decays in float32, rounded to bfloat16 for the
        products with v, which are added up in float32.

    Raises:
        NotImplementedError: other shapes or dtypes.
    """
    batch, time, heads, features = v.shape
    tile, slots = config.heads, config.slots
    if a.dtype != DTYPE or v.dtype != DTYPE:
        raise NotImplementedError(f"a.dtype={a.dtype}, v.dtype={v.dtype}: must be bfloat16")
    if time % BLOCK or heads % tile or features not in (16, 32, 64):
        raise NotImplementedError(f"v.shape={v.shape}: T must be a multiple of 16, H of {tile}")
    blocks, per_chunk, groups = time // BLOCK, config.chunk // BLOCK, tile // GROUP
    layout = _layout(groups)

    def body(a_gmem, v_gmem, x_gmem, barriers, a_smem, u_smem, operators_smem, x_smem):
        head = lax.axis_index("head") * tile
        chunk, element = lax.axis_index("chunk"), lax.axis_index("batch")
        halo = jnp.where(chunk == 0, 0, 1)
        steps = jnp.minimum(blocks - chunk * per_chunk, per_chunk) + halo
        first = chunk * per_chunk - halo
        column = plgpu.broadcasted_iota(jnp.int32, (groups, GROUP, BLOCK), 2, layout=layout)
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
                decay = plgpu.layout_cast(
                    lax.broadcast_in_dim(decay, (groups, GROUP, BLOCK), (0, 1)), layout
                )
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
        zeros = plgpu.layout_cast(jnp.zeros((BLOCK, tile * features), DTYPE), ZEROS)
        _store(u_smem.at[slots - 1], zeros)
        plgpu.commit_smem()
        own = plgpu.layout_cast(jnp.zeros((groups, GROUP, BLOCK), jnp.float32), layout)
        _walk(steps, slots, load, compute, store, barriers, own)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(v.shape, DTYPE),
        scratch_types=[
            plgpu.Barrier(num_arrivals=2, num_barriers=slots),
            plgpu.SMEM((slots, BLOCK, tile), DTYPE),
            plgpu.SMEM((slots, BLOCK, tile * features), DTYPE, transforms=OPERAND),
            plgpu.SMEM((2, groups, ROWS, BLOCK), DTYPE),
            plgpu.SMEM((2, groups, BLOCK, GROUP, features), DTYPE),
        ],
        grid=(heads // tile, pl.cdiv(blocks, per_chunk), batch),
        grid_names=("head", "chunk", "batch"),
        compiler_params=COMPILER_PARAMS,
        kernel_name="swr_tensor_core_forward",
    )(a, v.reshape(batch, time, heads * features))


def _layout(groups: int):
    """Of a row of L or G, [groups, 4 heads, 16 columns], over the threads."""
    shape = (groups, GROUP, BLOCK)
    if groups == WARPS:
        return plgpu.Layout.TILED(plgpu.Tiling((shape, (2,))), (-4,), (-3, -2), -1)
    tiles = (shape, (groups // WARPS, GROUP, BLOCK), (groups // 2,))
    return plgpu.Layout.TILED(plgpu.Tiling(tiles), (-7,), (-4, -3, -2), -1)


def _store(ref: Ref, x: Array) -> None:
    """Store x as it lies in registers."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, x, optimized=False)
    else:  # before JAX 0.12 stores exchange registers first, to have fewer bank conflicts
        ref[...] = x


# The interpreter takes neither a reshaped reference nor an A in registers.


def _is_simulated() -> bool:
    return simulated_platform() == "gpu"


def _load_decay(ref: Ref, shape: tuple[int, int], layout) -> Array:
    if _is_simulated():
        return ref[...].reshape(shape).astype(jnp.float32)
    return plgpu.load(ref.reshape(*shape), layout=layout, optimized=False).astype(jnp.float32)


def _operand(ref: Ref) -> Array | Ref:
    return ref if _is_simulated() else plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)


def _store_rows(ref: Ref, x: Array) -> None:
    """Store x [64, F] into a reference [16, 4, F]."""
    if _is_simulated():
        ref[...] = x.reshape(ref.shape)
    else:
        _store(ref.reshape(*x.shape), x)
