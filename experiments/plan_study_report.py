"""What `plan_study.py` makes of its plans: tables and a picture."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from plan_report import GIB, speed

FIRST = "transformer_1b"  # what those of its size are compared with
# By how much a Phalanx hybrid trains faster than Transformer++, from 4k to 32k tokens.
PUBLISHED = (1.1, 1.4)


def is_timed(plan: Mapping) -> bool:
    """Whether the compiler has estimated all of it: no loop of a length that it does not know."""
    return "seconds" in plan and not plan["unknown_loops"]


def over_first(plans: Sequence[Mapping], plan: Mapping) -> float | None:
    """A plan's speed over that of Transformer++, of its size, with rows of the same length."""
    for other in plans:
        alike = all(other[key] == plan[key] for key in ("topology", "length"))
        alike &= 0.8 < other["parameters"] / plan["parameters"] < 1.25
        if alike and other["config"] == FIRST and is_timed(other):
            return speed(plan) / speed(other)
    return None


def tables(record: Mapping) -> str:
    """Markdown: every slice, model and length; then how one model grows with the slice."""
    return f"{_lengths(record['plans'])}\n\n{_growth(record['plans'])}\n"


def _lengths(plans: Sequence[Mapping]) -> str:
    lengths = sorted({plan["length"] for plan in plans})
    heads = ["slice", "model", "tokens of a device"]
    heads += [f"step at {length:,}, s" for length in lengths]
    lines = [f"| {' | '.join(heads)} | most memory, GiB |", "|---" * (len(heads) + 1) + "|"]
    found: dict[tuple[str, str], dict[int, Mapping]] = {}
    for plan in plans:
        found.setdefault((plan["topology"], plan["config"]), {})[plan["length"]] = plan
    for (topology, config), by_length in sorted(found.items()):
        some = next(iter(by_length.values()))
        cells = [_cell(plans, by_length.get(length)) for length in lengths]
        most = max(plan["memory"] or 0 for plan in by_length.values())
        lines.append(
            f"| {topology} | `{config}` | {some['tokens_per_update'] // some['devices']:,} | "
            f"{' | '.join(cells)} | {most / GIB:.1f} of {some['memory_limit'] / GIB:.0f} |"
        )
    return "\n".join(lines)


def _cell(plans: Sequence[Mapping], plan: Mapping | None) -> str:
    if plan is None:
        return ""
    if "failure" in plan:
        return "the compiler fails"
    if not plan["fits"]:
        return "does not fit"
    if not is_timed(plan):
        return "fits"
    ratio = over_first(plans, plan)
    ratio = "" if ratio is None or plan["config"] == FIRST else f" ({ratio:.2f}x)"
    sequence = plan["mesh"]["sequence"]
    split = f", sequence {sequence}" if sequence > 1 else ""
    return f"{plan['seconds']:.2f}{ratio}{split}"


def growing(plans: Sequence[Mapping]) -> Iterator[tuple[str, str, int, list[Mapping]]]:
    """Each chip, model and length that was planned on slices of several sizes, smallest first."""
    found: dict[tuple[str, str, int], list[Mapping]] = {}
    for plan in plans:
        if is_timed(plan):
            key = (plan["topology"].partition(":")[0], plan["config"], plan["length"])
            found.setdefault(key, []).append(plan)
    for key, group in sorted(found.items()):
        if len(group) > 2:
            yield *key, sorted(group, key=lambda plan: plan["devices"])


def _growth(plans: Sequence[Mapping]) -> str:
    lines = [
        "| chip | model | tokens a row | chips | tokens/s of a chip | efficiency | if links and "
        "cores overlap |",
        "|---" * 7 + "|",
    ]
    for chip, config, length, group in growing(plans):
        for plan in group:
            least = group[0]
            both = plan["seconds_if_overlapped"] / least["seconds_if_overlapped"]
            lines.append(
                f"| {chip} | `{config}` | {length:,} | {plan['devices']:,} | {speed(plan):,.0f} | "
                f"{speed(plan) / speed(least):.1%} | {1 / both:.1%} |"
            )
    return "\n".join(lines)


def draw(record: Mapping, path: Path) -> None:
    """Plot speeds over Transformer++'s against row length, one panel for each kind of chip."""
    plans = [plan for plan in record["plans"] if is_timed(plan)]
    slices = sorted({plan["topology"] for plan in plans if over_first(plans, plan)})
    if not slices:
        return
    figure, axes = plt.subplots(
        1,
        len(slices),
        figsize=(2.5 + 3.6 * len(slices), 4.2),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    colors = {name: f"C{n}" for n, name in enumerate(sorted({p["config"] for p in plans}))}
    for axis, topology in zip(axes[0], slices, strict=True):
        lengths = set()
        for config, color in colors.items():
            points = sorted(
                (plan["length"], ratio)
                for plan in plans
                if (plan["topology"], plan["config"]) == (topology, config)
                and (ratio := over_first(plans, plan)) is not None
            )
            if points:
                axis.plot(*zip(*points, strict=True), ".-", color=color, label=config)
                lengths |= {length for length, _ in points}
        axis.axhspan(*PUBLISHED, color="gray", alpha=0.15, label="published, Phalanx hybrid")
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted(lengths), [f"{length // 1024}k" for length in sorted(lengths)])
        axis.set(title=topology, xlabel="tokens of a row")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("predicted speed over Transformer++'s")
    found = [axis.get_legend_handles_labels() for axis in axes[0]]
    lines = {label: line for pair in found for line, label in zip(*pair, strict=True)}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=len(lines), fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
