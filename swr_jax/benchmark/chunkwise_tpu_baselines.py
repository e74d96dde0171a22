"""TPU kernels of a matrix memory beside XLA's chunkwise form, as the TPU's compiler predicts.

At a constant number of tokens, T from 2k to 64k, 16 heads of 128 and 256 features, bfloat16 in and
out, float32 gates and states. XLA's programs are given the time that their compiler estimates;
kernels the largest of memory, matrix and issue time, and XLA's estimate of what is beside them,
such as the gates' maths. Arguments are as projections write them, [B, T, H D]. Forward and backward
together return the outputs, the last state and every gradient; the floor counts arguments read once
and results written once.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import targets
from pallas_kernels.tpu.chip import vmem_of
from pallas_kernels.tpu.chunks import Tiling
from pallas_kernels.tpu.reference import launches

TOKENS, HEADS, Q_DIM, V_DIM = 65536, 16, 128, 256
LENGTHS = (2048, 8192, 65536)
CHIPS = ("v5e", "v5p", "v6e")
MODES = ("forward", "forward+backward")
XLA, KERNELS = CONTESTANTS = ("XLA, chunkwise", "kernels")
_IMPLEMENTATIONS = {XLA: "xla", KERNELS: "mosaic_tpu"}


class Operator(NamedTuple):
    """What is compared.

    Attributes:
        rule: takes an implementation, q and k [B, T, H, Dk], v [B, T, H, Dv], two gates [B, T, H]
            and the first state to outputs and last state.
        state: takes the shape and dtype of the first state's memory [B, H, Dk, Dv] to that state.
        tilings: takes the VMEM that a kernel may take, q, k and v to how each kernel cuts the work
            up, by its name or a part of it.
    """

    rule: Callable
    state: Callable[[jax.ShapeDtypeStruct], Any]
    tilings: Callable[..., dict[str, Tiling]]


def _arguments(operator: Operator, length: int) -> tuple:
    """q, k, v, the gates, the first state."""
    batch = TOKENS // length

    def struct(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((batch, *shape), dtype)

    q, v = (struct(length, HEADS * size, dtype=jnp.bfloat16) for size in (Q_DIM, V_DIM))
    gate = struct(length, HEADS)
    return q, q, v, gate, gate, operator.state(struct(HEADS, Q_DIM, V_DIM))


def _by_head(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:2], HEADS, -1)


def _program(operator: Operator, contestant: str, mode: str) -> Callable:
    def forward(q, k, v, *others):
        arrays = (*map(_by_head, (q, k, v)), *others)
        h, state = operator.rule(_IMPLEMENTATIONS[contestant], *arrays)
        return h.reshape(*h.shape[:2], -1), state

    def both(*arguments):
        *arguments, dh, dstate = arguments
        results, pull = jax.vjp(forward, *arguments)
        return results, pull((dh, dstate))

    return forward if mode == "forward" else both


def _launches(operator: Operator, chip: str, *qkv: jax.ShapeDtypeStruct) -> tuple:
    chip = targets.CHIPS[chip]
    by_head = (jax.eval_shape(_by_head, x) for x in qkv)
    tilings = operator.tilings(vmem_of(chip.vmem_bytes), *by_head)
    return launches(tilings, qkv[0].shape[0] * HEADS, chip.cores)


def predict(operator: Operator, chip: str, contestant: str) -> Iterator[dict]:
    """Yield predictions for a chip; a process can do one contestant only.

    Args:
        operator: what is compared.
        chip: one of `CHIPS`.
        contestant: one of `CONTESTANTS`.
    """
    for length in LENGTHS:
        for mode in MODES:
            arguments = _arguments(operator, length)
            program = _program(operator, contestant, mode)
            if mode != "forward":
                arguments = (*arguments, arguments[2], arguments[-1])
            if contestant == XLA:
                report = targets.compile_program(chip, program, *arguments, name=contestant)
                seconds = report.cycles_seconds
            else:
                report = targets.compile_for(
                    chip,
                    program,
                    *arguments,
                    launches=_launches(operator, chip, *arguments[:3]),
                    name=contestant,
                )
                seconds = report.seconds
            least = report.argument_bytes + report.output_bytes
            yield {
                "chip": chip,
                "tokens": length,
                "batch": arguments[0].shape[0],
                "mode": mode,
                "contestant": contestant,
                "seconds": seconds,
                "seconds_beside_kernels": getattr(report, "xla_seconds", None),
                "floor_seconds": least / report.chip.hbm_bytes_per_second,
                "temporary_bytes": report.temporary_bytes,
                "jax": report.jax_version,
            }


def table(predictions: list[dict], tokens: int) -> str:
    """Markdown: times, their ratio and memory at one length."""
    lines = [
        "| chip | | XLA, chunkwise, us | kernels, us | times faster | kernels over the floor "
        "| temporary memory of XLA, of the kernels |",
        "|---|---|---|---|---|---|---|",
    ]
    for chip in CHIPS:
        for mode in MODES:
            found = {
                row["contestant"]: row
                for row in predictions
                if (row["chip"], row["mode"], row["tokens"]) == (chip, mode, tokens)
            }
            xla, kernels = (found[name] for name in CONTESTANTS)
            cells = (
                chip,
                mode,
                f"{xla['seconds'] * 1e6:,.0f}",
                f"{kernels['seconds'] * 1e6:,.0f}",
                f"{xla['seconds'] / kernels['seconds']:.1f}",
                f"{kernels['seconds'] / kernels['floor_seconds']:.1f}",
                f"{xla['temporary_bytes'] / 2**30:.2f} GiB, "
                f"{kernels['temporary_bytes'] / 2**30:.2f} GiB",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
