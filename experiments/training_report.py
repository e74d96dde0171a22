"""What the suite `train` has measured, for the README."""

from collections.abc import Mapping

from swr_jax.benchmark.plots.train import LINES


def models(record: Mapping) -> str:
    """Markdown: each model's tokens a second and speed over Transformer++'s at every length."""
    measured = record["measurements"]
    heads = ["model", "parameters", *(f"{m['tokens']:,} tokens a row" for m in measured)]
    heads.append("temporary memory, GiB")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, (label, *_) in LINES.items():
        found = [m["contestants"][name] for m in measured]
        memory = [contestant["temporary_bytes"] / 2**30 for contestant in found]
        cells = [label, f"{measured[0]['parameters'][name]:,}", *map(_cell, found)]
        cells.append(f"{min(memory):.1f} to {max(memory):.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(contestant: Mapping) -> str:
    rate = contestant["tokens_per_second"]["median"]
    ratio = contestant["speedup"]["transformer++"]
    if ratio["lower"] == ratio["upper"] == 1:
        return f"{rate:,.0f} tokens/s"
    return f"{ratio['median']:.2f}x ({ratio['lower']:.2f} to {ratio['upper']:.2f})"
