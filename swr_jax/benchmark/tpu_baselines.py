"""The TPU kernels beside what XLA makes of the same recurrence, as the TPU's compiler predicts.

All at a constant number of tokens, T from 2k to 128k, H 128, D 16, bfloat16 in and out, float32
inside. XLA's programs are given the time that their compiler estimates, kernels the larger of
memory and issue time. Arguments have heads in the minor axis; for associative_scan it makes no
difference, since the compiler lays a program's arguments out as it likes. It has two natural forms,
with the decay broadcast over features by its own arithmetic, or repeated for each feature before.
The row-by-row scan is a kernel with the traffic of the exact one (swr_jax/benchmark/row_scan.py).
Neither scan has a window. Forward and backward together return the output and both gradients; the
floor counts decays, inputs and cotangents read once, outputs and gradients written once.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import targets
from pallas_kernels.swr.mosaic_tpu import block_two_pass_heads_minor
from swr_jax.benchmark import scans
from swr_jax.benchmark.row_scan import row_scan

TOKENS, HEADS, FEATURES = 65536, 128, 16
LENGTHS = (2048, 8192, 32768, 131072)
CHIPS = ("v5e", "v5p", "v6e")
MODES = ("forward", "forward+backward")


def associative_scan(a: jax.Array, u: jax.Array) -> jax.Array:
    """Exact recurrence over [B, T, D, H] by `jax.lax.associative_scan`."""
    a = a[:, :, None].astype(jnp.float32)
    return scans.associative_scan(a, u.astype(jnp.float32)).astype(u.dtype)


def associative_scan_repeated(a: jax.Array, u: jax.Array) -> jax.Array:
    """The same, with the decays repeated for each feature first."""
    a = jnp.broadcast_to(a[:, :, None].astype(jnp.float32), u.shape)
    return scans.associative_scan(a, u.astype(jnp.float32)).astype(u.dtype)


def _kernel(lookback: int | None) -> Callable:
    def run(a: jax.Array, u: jax.Array) -> jax.Array:
        window = {"block_size": 16, "lookback": lookback}
        return block_two_pass_heads_minor(a, u, None, None, None, **window)[0]

    return run


class Contestant(NamedTuple):
    """A recurrence of decays [B, T, H] and of inputs whose axes after B and T are `layout`."""

    run: Callable
    layout: tuple[int, ...]


HEADS_MINOR = (FEATURES, HEADS)
CONTESTANTS = {
    "programs": {
        "associative_scan": Contestant(associative_scan, HEADS_MINOR),
        "associative_scan, repeated decays": Contestant(associative_scan_repeated, HEADS_MINOR),
    },
    "kernels": {
        "row-by-row kernel": Contestant(row_scan, (HEADS * FEATURES,)),
        "window kernel": Contestant(_kernel(1), HEADS_MINOR),
        "exact kernel": Contestant(_kernel(None), HEADS_MINOR),
    },
}
OURS = ("window kernel", "exact kernel")
SCANS = tuple(CONTESTANTS["programs"])
OTHERS = (*SCANS, "row-by-row kernel")


def _arguments(length: int, mode: str, layout: tuple[int, ...]) -> tuple[jax.ShapeDtypeStruct, ...]:
    batch = max(1, TOKENS // length)
    u = jax.ShapeDtypeStruct((batch, length, *layout), jnp.bfloat16)
    a = jax.ShapeDtypeStruct((batch, length, HEADS), jnp.bfloat16)
    return (a, u) if mode == "forward" else (a, u, u)


def _both(fn: Callable) -> Callable:
    def run(a, u, dx):
        x, pull = jax.vjp(fn, a, u)
        return x, pull(dx)

    return run


def predict(chip: str, kind: str) -> Iterator[dict]:
    """Yield predictions for a chip; a process can do one kind only.

    Args:
        chip: one of `CHIPS`.
        kind: "programs" (XLA's) or "kernels".
    """
    for length in LENGTHS:
        for mode in MODES:
            for name, (run, layout) in CONTESTANTS[kind].items():
                fn = run if mode == "forward" else _both(run)
                arguments = _arguments(length, mode, layout)
                compile_ = targets.compile_program if kind == "programs" else targets.compile_for
                report = compile_(chip, fn, *arguments, name=name)
                seconds = report.cycles_seconds if kind == "programs" else report.seconds
                least = report.argument_bytes + report.output_bytes
                yield {
                    "chip": chip,
                    "tokens": length,
                    "batch": arguments[0].shape[0],
                    "mode": mode,
                    "contestant": name,
                    "seconds": seconds,
                    "floor_seconds": least / report.chip.hbm_bytes_per_second,
                    "temporary_bytes": report.temporary_bytes,
                    "jax": report.jax_version,
                }


def table(predictions: list[dict], tokens: int) -> str:
    """Markdown: times and ratios at one length."""
    names = (*OTHERS, *OURS)
    lines = [
        f"| chip | | {' | '.join(f'{name}, us' for name in names)} "
        "| window kernel: times faster than each "
        "| exact kernel: times faster than each "
        "| temporary memory of the scans, of the kernels |",
        f"|---|---|{'---|' * (len(names) + 3)}",
    ]
    for chip in CHIPS:
        for mode in MODES:
            found = {
                row["contestant"]: row
                for row in predictions
                if (row["chip"], row["mode"], row["tokens"]) == (chip, mode, tokens)
            }
            cells = [chip, mode, *(f"{found[name]['seconds'] * 1e6:,.0f}" for name in names)]
            for ours in OURS:
                ratios = (found[name]["seconds"] / found[ours]["seconds"] for name in OTHERS)
                cells.append(", ".join(f"{ratio:.1f}" for ratio in ratios))
            memory = max(found[name]["temporary_bytes"] for name in OURS)
            scans = ", ".join(f"{found[s]['temporary_bytes'] / 2**30:.1f}" for s in SCANS)
            cells.append(f"{scans} GiB, {memory / 2**20:.1f} MiB")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
