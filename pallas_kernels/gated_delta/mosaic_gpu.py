"""Chunkwise gated delta rule for Hopper GPUs (Mosaic GPU), in chunks of 64 tokens.

`triangles` solves every chunk on its own: the inverse of the WY form and the scores. `walk` then
hands the state on from chunk to chunk in registers, and has the outputs. The backward pass walks
forward again and writes the states before all chunks down, walks back, and `cotangents` has what
is left for each chunk on its own. Nothing is saved between the passes but the arguments.

Products are of bfloat16 numbers with sums in float32; what is computed goes into them in two of
these, so that nothing but inputs and outputs is rounded to 8 bits.

What costs extra, all of it outside the kernels, in XLA:
    the gates                         are transposed; their prefix products, and their gradient
    Dk or Dv not a multiple of 64     padding copies, and products with the zeros
    T not a multiple of 64            padding copies
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.distribution import distributed
from pallas_kernels.gated_delta import mosaic_gpu_gates as gates_of
from pallas_kernels.gated_delta import mosaic_gpu_walk as walk
from pallas_kernels.gated_delta.mosaic_gpu_cotangents import cotangents
from pallas_kernels.gated_delta.mosaic_gpu_triangles import triangles
from pallas_kernels.gated_delta.mosaic_gpu_walk import CHUNK, Walk
from pallas_kernels.hopper.chip import TILE, check_dtype, fills, multiprocessors_here
from pallas_kernels.padding import fill_up

Array = jax.Array

WIDEST_Q = 256  # numbers of the state that a thread holds: half of it

_GATES, _STATE = ("bth", "bth"), "bhkd"
_ARGUMENTS = ("bthk", "bthk", "bthd", *_GATES, _STATE)


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How the walks are cut up; results do not depend on it.

    Attributes:
        groups: warpgroups of a thread block, each with 64 features of v: 1, or 2 that share keys
            and queries; None: 2 where that fills the chip.
    """

    groups: int | None = None

    def __post_init__(self):
        if self.groups not in (None, 1, 2):
            raise ValueError(f"groups={self.groups}: must be 1, 2 or None")


def gated_delta_rule(
    q: Array,
    k: Array,
    v: Array,
    alpha: Array,
    beta: Array,
    memory: Array,
    *,
    config: TuningConfig | None = None,
) -> tuple[Array, Array]:
    """Outputs of the gated delta rule, and its state after the last token.

    The gradient is exact for every argument, at decays of 0 too; it repeats the forward pass, so
    that nothing is saved but the arguments.

    Args:
        q, k: [B, T, H, Dk], bfloat16.
        v: [B, T, H, Dv], bfloat16.
        alpha, beta: [B, T, H], used in float32.
        memory: [B, H, Dk, Dv] before the first token, likewise.
        config: None: the default.

    Returns:
        o like v, and the memory after the last token, float32.

    Raises:
        NotImplementedError: a dtype or size that the kernels do not have.
    """
    for name, x in {"q": q, "k": k, "v": v}.items():
        check_dtype(name, x)
        if not x.size:
            raise NotImplementedError(f"{name} has shape {x.shape}: the kernels need 1 or more")
    if q.shape[-1] > WIDEST_Q:
        raise NotImplementedError(
            f"Dk={q.shape[-1]}: the kernels take up to {WIDEST_Q}, XLA's form any"
        )
    gates = (x.astype(jnp.float32) for x in (alpha, beta))
    config = TuningConfig() if config is None else config
    return _solve(config, q, k, v, *gates, memory.astype(jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _solve(config, *arguments):
    run = functools.partial(forward, config)
    return distributed(run, arguments, _ARGUMENTS, ("bthd", _STATE))


def _solve_forward(config, *arguments):
    return _solve(config, *arguments), arguments


def _solve_backward(config, arguments, cotangents):
    run = functools.partial(backward, config)
    axes = (*_ARGUMENTS, "bthd", _STATE)
    return distributed(run, (*arguments, *cotangents), axes, _ARGUMENTS)


_solve.defvjp(_solve_forward, _solve_backward)


def forward(
    config: TuningConfig,
    q: Array,
    k: Array,
    v: Array,
    alpha: Array,
    beta: Array,
    memory: Array,
) -> tuple[Array, Array]:
    """Outputs of one device and its last state."""
    call = _Call(config, q, k, v, alpha, beta, keep=False)
    found = walk.forward(call.walk, *call.arguments(call.v), call.state(memory), keep=False)
    return call.tokens(found["tokens"], like=v), call.memory(found["state"], like=memory)


def backward(
    config: TuningConfig,
    q: Array,
    k: Array,
    v: Array,
    alpha: Array,
    beta: Array,
    memory: Array,
    do: Array,
    dmemory: Array,
) -> tuple[Array, ...]:
    """Cotangents of the arguments of `forward`, from those of its results."""
    call = _Call(config, q, k, v, alpha, beta, keep=True)
    kept = walk.forward(call.walk, *call.arguments(call.v), call.state(memory), keep=True)
    do = call.padded(do.astype(v.dtype))
    back = walk.backward(call.walk, *call.arguments(do), call.state(dmemory))
    by_values = [x[key] for key in ("states", "written") for x in (kept, back)]
    decay = call.triangles.decay
    dq, dk, *dgates = cotangents(call.q, call.k, call.v, do, decay, call.gates, *by_values)
    shape = call.q.shape[:3]
    dalpha, dbeta = (
        x[:, : q.shape[1]] for x in gates_of.gradient(call.gates, decay, *dgates, shape)
    )
    return (
        *(call.tokens(x, like=q) for x in (dq, dk)),
        call.tokens(back["tokens"], like=v),
        dalpha,
        dbeta,
        call.memory(back["state"], like=dmemory),
    )


class _Call:
    """The way between the shapes of the caller and those of the walks.

    Attributes:
        q, k, v: padded to whole chunks and tiles.
        walk: what is walked over.
        gates, triangles: of the chunks.
    """

    def __init__(self, config: TuningConfig, q, k, v, alpha, beta, *, keep: bool):
        self.q, self.k, self.v = (self.padded(x) for x in (q, k, v))
        batch, time, heads, q_dim = self.q.shape
        padded = fill_up(alpha, {1: CHUNK}, 1.0), fill_up(beta, {1: CHUNK})
        self.gates = gates_of.gates(*padded, CHUNK)
        self.triangles = triangles(self.q, self.k, self.gates, keep=keep)
        walked = Walk(batch, time // CHUNK, heads, q_dim, self.v.shape[-1], groups=1)
        self.walk = walked._replace(
            groups=config.groups or suited_groups(walked, multiprocessors_here())
        )

    @staticmethod
    def padded(x: Array) -> Array:
        """Pad to whole chunks, and features to whole tiles."""
        return fill_up(x, {1: CHUNK, 3: TILE})

    def arguments(self, values: Array) -> tuple[Array, ...]:
        """What both walks take but for the state, with v or the cotangent of the outputs."""
        return self.q, self.k, values, self.triangles, self.gates

    def state(self, memory: Array) -> Array:
        """[B, H, Dk, Dv] -> [B H, Dv, Dk], padded."""
        memory = fill_up(memory, {2: TILE, 3: TILE})
        return jnp.swapaxes(memory, 2, 3).reshape(-1, self.walk.v_dim, self.walk.q_dim)

    def memory(self, state: Array, like: Array) -> Array:
        """Undo `state`."""
        batch, heads, q_dim, v_dim = like.shape
        state = state.reshape(batch, heads, *state.shape[1:])
        return jnp.swapaxes(state, 2, 3)[:, :, :q_dim, :v_dim]

    @staticmethod
    def tokens(x: Array, like: Array) -> Array:
        """Undo `padded`."""
        return x[:, : like.shape[1], :, : like.shape[-1]].astype(like.dtype)


def suited_groups(w: Walk, multiprocessors: int) -> int:
    """Two where thread blocks then fill the chip, and hold a chunk beside the one that they do."""
    wide, tiles = w._replace(groups=2), w.v_dim // TILE
    thread_blocks = w.batch * w.heads * tiles // 2
    filled = fills(thread_blocks, multiprocessors)
    return 2 if tiles % 2 == 0 and wide.slots > 1 and filled else 1
