"""Bodies of the TPU kernels: a chunk of an mLSTM at a time, forward, and backward.

Notation of swr_jax/ops/mlstm_chunkwise.py, for one chunk of L tokens of one head:

    q, k, v       [L, Dk], [L, Dk], [L, Dv]; h like v
    C, n          memory [Dk, Dv] and normalizer [1, Dk] before the chunk
    A, g, a, c    weights of columns, and of C and n, in a row; of columns, and of C and n, in what
                  is after the chunk (pallas_kernels/mlstm/gates.py)
    S, P          A * (q k^T), and A * its cotangent; d the denominator; dX the cotangent of X

Matrices L x L are held transposed, rows i in lanes: what belongs to a row (its gates, d, the
divisor, sums over columns) is then spread over sublanes for nothing, and added up without crossing
lanes. What is used again once such a sum is known waits in VMEM, not in registers.
They are walked in blocks of 128 rows, each with the columns up to its end. C stays in VMEM from
chunk to chunk, beside a copy in the dtype of the products' operands.

Two numbers, for Dk 128, Dv 256 and chunks of 128 tokens in bfloat16, per token and head: forward
1,600 bytes (2,116 with states kept) and 229,376 operations of products; backward 3,160 and 491,520.
"""

from jax.experimental import pallas as pl

from pallas_kernels.mlstm.mosaic_tpu_chunk import carry_of, read_chunk, spread_gates, write_chunk
from pallas_kernels.tpu.arithmetic import as_float, exact_parts, multiply, stack, tiles
from pallas_kernels.tpu.chip import LANES
from pallas_kernels.tpu.chunks import CHUNK_AXIS, HeadView, in_turns, walk_chunks


def forward_kernel(
    plan, carry, q, k, v, gates, memory0, normalizer0, h, memory, normalizer, *kept_and_scratch
):
    """Outputs of a chunk.

    `memory` and `normalizer` are the state so far, in the end the last; what is kept, if anything,
    are those before each chunk. Scratch, for each head: `rounded` is C in the dtype of the
    products' operands; of a block of rows, `scores` is S and `reads` what h is a product of, both
    [columns, rows].
    """
    *kept, rounded, scores, reads = kept_and_scratch

    @pl.when(pl.program_id(CHUNK_AXIS) == 0)
    def _():
        memory[...] = memory0[...]
        rounded[...] = memory0[0].astype(plan.dtype)
        normalizer[...] = normalizer0[...]

    def read_and_write(place, chunk):
        in_turns(run(head, place, chunk) for head in range(plan.heads))

    def run(head, place, chunk):
        of_head = gates[0, head, place]
        by_column = spread_gates(of_head)
        queries, keys = (HeadView(plan, x, place, head, plan.q_dim) for x in (q, k))
        values, outputs = (HeadView(plan, x, place, head, plan.v_dim) for x in (v, h))
        state, sums, copy = memory.at[0, head], normalizer.at[0, head], rounded.at[head]
        for before, ref in zip(kept, (copy, sums), strict=False):
            before[0, head, place] = ref[...]
        n = exact_parts(sums[...], plan.dtype)
        for rows in tiles(plan.chunk, LANES):
            query, stop = queries[rows, :], rows.stop
            read = read_chunk(
                plan, *(of_head, by_column, rows, query, keys[:stop, :], n), scores.at[head]
            )
            yield
            # What a row reads of the chunk and of the memory, in one product.
            for columns in tiles(stop, LANES):
                weighed = scores[head, columns] * read.inverse
                reads[head, columns] = weighed.astype(plan.dtype)
            weighed = as_float(query.T) * (read.recall * read.inverse)
            reads[head, stop : stop + plan.q_dim] = weighed.astype(plan.dtype)
            turned = reads[head, : stop + plan.q_dim].T
            for columns in tiles(plan.v_dim, plan.columns):
                stored = stack(values[:stop, columns], copy[:, columns])
                outputs[rows, columns] = multiply(turned, stored)
        factor = carry_of(plan, carry, head, chunk)
        write_chunk(plan, of_head, factor, keys[:, :], values, state, sums, copy)

    walk_chunks(plan, False, read_and_write)
