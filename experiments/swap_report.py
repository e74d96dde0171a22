"""What `swap_study.py` makes of its runs: a table and a plot."""

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def _show(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def perplexity_above(record: dict, name: str) -> list[float]:
    """By how much a student's perplexity per byte ends above its teacher's, as a share, by seed."""
    pairs = zip(record["students"][name]["runs"], record["teachers"], strict=True)
    return [2 ** (s["bits_per_byte"][-1] - t["bits_per_byte"][-1]) - 1 for s, t in pairs]


def _after(student: dict, step: int) -> str:
    """Bits per byte after some updates, where they were measured."""
    runs = [dict(zip(run["step"], run["bits_per_byte"], strict=True)) for run in student["runs"]]
    return _show([run[step] for run in runs]) if all(step in run for run in runs) else ""


def table(record: dict) -> str:
    """Write validation bits per byte, before, on the way and after, as a Markdown table."""
    measured = record["students"]["distilled"]["runs"][0]["step"]
    steps = (0, measured[len(measured) // 2], measured[-1])
    heads = ["model", "parameters trained", *(f"after {step} updates" for step in steps)]
    heads.append("perplexity above the teacher's")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    teachers = _show([run["bits_per_byte"][-1] for run in record["teachers"]])
    lines.append(f"| the teacher, {record['teacher_steps']:,} updates | | | | {teachers} | |")
    for name, student in record["students"].items():
        cells = [_after(student, step) for step in steps]
        above = statistics.mean(perplexity_above(record, name))
        lines.append(
            f"| {name} | {student['trained_parameters']:,} | {' | '.join(cells)} | {above:.1%} |"
        )
    return "\n".join(lines) + "\n"


def draw(record: dict, path: Path) -> None:
    """Plot bits per byte against updates; the teacher's as a line."""
    figure, axis = plt.subplots(figsize=(8.5, 4.4), layout="constrained")
    for number, (name, student) in enumerate(record["students"].items()):
        steps = student["runs"][0]["step"]
        curves = list(zip(*(run["bits_per_byte"] for run in student["runs"]), strict=True))
        axis.plot(steps, [statistics.mean(v) for v in curves], f"C{number}.-", label=name)
        low, high = [min(v) for v in curves], [max(v) for v in curves]
        axis.fill_between(steps, low, high, color=f"C{number}", alpha=0.2, linewidth=0)
    teacher = statistics.mean(run["bits_per_byte"][-1] for run in record["teachers"])
    axis.axhline(teacher, color="black", linestyle="--", linewidth=1, label="teacher")
    share = record["steps"] / record["teacher_steps"]
    axis.set(
        xlabel=f"updates (the last: {share:.0%} of the teacher's)",
        ylabel="validation bits per byte",
        ylim=(teacher - 0.1, teacher + 2.6),
    )
    axis.grid(alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    seeds = f"mean and range of {record['seeds']} seeds" if record["seeds"] > 1 else "one seed"
    figure.suptitle(
        f"Half of the mixers swapped, {seeds}; {record['environment']['device']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)
