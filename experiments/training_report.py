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


def loop(record: Mapping) -> str:
    """What the trainer costs beside its updates, in words."""
    (found,) = record["measurements"]
    parts = {
        name: f"{found[name]['median']:.1%} ({found[name]['lower']:.1%} to "
        f"{found[name]['upper']:.1%})"
        for name in ("overhead", "reports", "checkpoints")
    }
    (target,) = record["targets"]
    aim = "as we aimed for" if target["met"] else "more than the 3% that we aimed for"
    return (
        f"Input pipeline, metrics every 10 updates and checkpoints every 100 make a run of\n"
        f"{found['steps']} updates of {found['seconds']['update']['median'] * 1e3:,.0f} ms longer "
        f"by {parts['overhead']},\n{aim}; {parts['reports']} is spent on reports,\n"
        f"{parts['checkpoints']} on waiting for checkpoints ({found['rounds']} rounds)."
    )
