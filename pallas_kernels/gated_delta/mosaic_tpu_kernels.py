"""Bodies of the TPU kernels: a chunk of the gated delta rule at a time, forward, and backward.

Notation of swr_jax/ops/gated_delta_chunk.py, for one chunk of C = 128 tokens of one head:

    q, k, v, o    [C, Dk], [C, Dk], [C, Dv], [C, Dv]
    H, H'         state [Dk, Dv] before the chunk and after it
    L, g, r       decay matrix [C, C], prefix products, last row of L
    M, S          strictly lower part of diag(beta) (K K^T * L), and Q K^T
    R, W, U       V - diag(g) K H, diag(beta) R, and (I + M)^-1 W, what the tokens write
    A             K K^T
    dX            cotangent of X

In the code R, W, U are `rest`, `weighed`, `written`; A and S `similarity`, `scores`.

    O  = diag(g) Q H + (S * L) U,    H' = g_C H + (diag(r) K)^T U

The backward pass reads H and does the rest again:

    dU = (S * L)^T dO + diag(r) K dH',    dW = (I + M)^-T dU,    dM = -dW U^T,    dV = dR = beta dW
    dS = (dO U^T) * L,    dA = dM * diag(beta) L
    dQ = diag(g) dO H^T + dS K
    dK = dS^T Q + (dA + dA^T) K - diag(g) dR H^T + diag(r) U dH'^T
    dH = g_C dH' + (diag(g) Q)^T dO - (diag(g) K)^T dR

A decay stands in L, g and r: with dL what all of them receive, g as a column of L before the first
one and r as part of its last row, dalpha_i = sum_c (L^T dL)_ic L_{i-1,c}. Nothing is divided.

Two numbers, for Dk 128, Dv 256 in bfloat16, per token and head: forward 1,544 bytes (2,568 with
states kept) and 393,216 operations of products; backward 3,600 and 1,015,808. Products of what is
not an input are done in two or three parts each, and the inverse comes on top.
"""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.gated_delta.mosaic_tpu_chunk import (
    CHUNK,
    parts,
    places,
    prepare,
    product,
    shift_down,
)
from pallas_kernels.tpu.arithmetic import as_float, stack, widen
from pallas_kernels.tpu.chip import LANES
from pallas_kernels.tpu.chunks import CHUNK_AXIS, HeadView, in_turns, walk_chunks

# Axes that a product goes over: of x y, x y^T and x^T y.
_PLAIN, _ROWS, _COLUMNS = (1, 0), (1, 1), (0, 0)


def forward_kernel(tiling, q, k, v, gates, memory0, o, memory, states=None):
    """Outputs of a chunk, and, where they are wanted, the states before each.

    `memory` is the state so far, in the end the last.
    """

    @pl.when(pl.program_id(CHUNK_AXIS) == 0)
    def _():
        memory[...] = memory0[...]

    part = functools.partial(parts, dtype=tiling.dtype)

    def run(head, place):
        query, key = (HeadView(tiling, x, place, head, tiling.q_dim)[:, :] for x in (q, k))
        value, output = (HeadView(tiling, x, place, head, tiling.v_dim) for x in (v, o))
        chunk = yield from prepare(gates[0, head, place], query, key)
        yield
        state = memory[0, head]
        if states is not None:
            states[0, head, place] = state
        prefix, suffix, beta = (
            widen(x, tiling.v_dim) for x in (chunk.prefix, chunk.suffix, chunk.beta)
        )
        read = product(stack(key, query), part(state), _PLAIN)
        yield
        weighed = beta * (as_float(value[:, :]) - prefix * read[:CHUNK])
        written = product(part(chunk.inverse), part(weighed), _PLAIN)
        yield
        scores = part(chunk.scores * chunk.decay)
        output[:, :] = prefix * read[CHUNK:] + product(scores, part(written), _PLAIN)
        yield
        kept = product(key, part(suffix * written), _COLUMNS)
        memory[0, head] = prefix[CHUNK - 1 :] * state + kept

    walk_chunks(
        tiling, False, lambda place, _: in_turns(run(head, place) for head in range(tiling.heads))
    )


def backward_kernel(tiling, q, k, v, gates, do, states, dmemory0, dq, dk, dv, dgates, dmemory):
    """Cotangents of a chunk's inputs; `dmemory` is that of the state so far, from the right."""

    @pl.when(pl.program_id(CHUNK_AXIS) == 0)
    def _():
        dmemory[...] = dmemory0[...]

    part = functools.partial(parts, dtype=tiling.dtype)

    def run(head, place):
        query, key, dquery, dkey = (
            HeadView(tiling, x, place, head, tiling.q_dim) for x in (q, k, dq, dk)
        )
        value, doutput, dvalue = (
            HeadView(tiling, x, place, head, tiling.v_dim) for x in (v, do, dv)
        )
        query, key, value, doutput = (x[:, :] for x in (query, key, value, doutput))
        chunk = yield from prepare(gates[0, head, place], query, key)
        yield
        state, dstate = states[0, head, place], dmemory[0, head]
        state_, dstate_ = part(state), part(dstate)
        inverse, decay = part(chunk.inverse), chunk.decay
        prefix, suffix, beta = (
            widen(x, tiling.v_dim) for x in (chunk.prefix, chunk.suffix, chunk.beta)
        )
        read = product(stack(key, query), state_, _PLAIN)
        rest = as_float(value) - prefix * read[:CHUNK]
        yield
        written = product(inverse, part(beta * rest), _PLAIN)
        written_ = part(written)
        yield
        # The cotangents of what is written.
        sought = product(key, dstate_, _PLAIN)
        dwritten = product(part(chunk.scores * decay), doutput, _COLUMNS) + suffix * sought
        yield
        dweighed = product(inverse, part(dwritten), _COLUMNS)
        drest = beta * dweighed
        dvalue[:, :] = drest
        yield
        # Those of the two triangular matrices.
        row, column = places((CHUNK, CHUNK))
        direct = product(doutput, written_, _ROWS)
        yield
        dlower = jnp.where(row > column, -product(part(dweighed), written_, _ROWS), 0.0)
        dscores, dsimilarity = part(direct * decay), chunk.beta * dlower * decay
        dsimilarity = part(dsimilarity + dsimilarity.T)
        ddecay = direct * chunk.scores + chunk.beta * dlower * chunk.similarity
        yield
        # Queries and keys.
        drest_ = part(drest)
        prefix_, suffix_ = (widen(x, tiling.q_dim) for x in (chunk.prefix, chunk.suffix))
        dquery[:, :] = prefix_ * product(doutput, state_, _ROWS) + product(dscores, key, _PLAIN)
        yield
        dkey[:, :] = (
            product(dscores, query, _COLUMNS)
            + product(dsimilarity, key, _PLAIN)
            - prefix_ * product(drest_, state_, _ROWS)
            + suffix_ * product(written_, dstate_, _ROWS)
        )
        yield
        # Gates, and the state before the chunk.
        dbeta = _sum_lanes(dweighed * rest) + _sum_lanes(dlower * chunk.similarity * decay)
        dprefix = _sum_lanes(as_float(doutput) * read[CHUNK:] - drest * read[:CHUNK])
        last = row == CHUNK - 1
        dprefix = dprefix + jnp.where(last, jnp.sum(state * dstate), 0.0)
        dsuffix = jnp.broadcast_to(_sum_lanes(sought * written), (CHUNK, LANES)).T
        ddecay = ddecay + jnp.where(last, dsuffix, 0.0)
        ddecay = jnp.concatenate([ddecay, jnp.where(column == 0, dprefix, 0.0)], axis=1)
        spread = product(part(decay), part(ddecay), _COLUMNS)
        yield
        dalpha = _sum_lanes(
            spread[:, :CHUNK] * shift_down(decay, 0.0)
            + spread[:, CHUNK:] * shift_down(chunk.prefix, 1.0)
        )
        dgates[0, head, place] = jnp.where(column == 0, dalpha, dbeta).T[:2]
        dmemory[0, head] = (
            prefix[CHUNK - 1 :] * dstate
            + product(query, part(prefix * as_float(doutput)), _COLUMNS)
            - product(key, part(prefix * drest), _COLUMNS)
        )

    walk_chunks(
        tiling, True, lambda place, _: in_turns(run(head, place) for head in range(tiling.heads))
    )


def _sum_lanes(x):
    return jnp.sum(x, axis=1, keepdims=True)
