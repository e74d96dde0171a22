"""Writes every figure of the README and the index of results from the JSON files that hold them.

    python experiments/results_index.py            # rewrites what is out of date
    python experiments/results_index.py --check    # only says what is, and exits with 1

In README.md it replaces what stands between `<!-- figures: NAME -->` and `<!-- end -->`, for every
NAME in `FIGURES`. It writes experiments/results/README.md, the index, and
experiments/results/device_h100_predictions.json: what is predicted of an H100, beside what has been
measured on one, which is nothing until somebody runs `experiments/benchmark.py --suite=device`.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import comparison
import comparison_windows
import plan_study_report
import recall_report
import swap_report
import training_report
from absl import app, flags

from swr_jax.benchmark import chunkwise_tpu_baselines, predictions, tpu_baselines
from swr_jax.benchmark.device import report as device_report
from swr_jax.eval import report as evaluation

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
PREDICTIONS = "device_h100_predictions.json"
HEADLINE = 8192  # tokens at which the README compares

CHECK = flags.DEFINE_bool("check", False, "Write nothing; exit with 1 if something is out of date.")


def read(name: str) -> dict:
    """Returns a committed record."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def kernels(platform: str, chip: str) -> str:
    """The predicted times of all kernels on one chip."""
    reports = read(f"kernels_{platform}")["reports"]
    return predictions.table([report for report in reports if report["chip"]["name"] == chip])


def against_scans() -> str:
    """The TPU kernels beside the scans."""
    return tpu_baselines.table(read("tpu_baselines")["predictions"], HEADLINE)


def against_xla(operator: str) -> str:
    """The TPU kernels of a matrix memory beside XLA's chunkwise form."""
    record = read(f"{operator}_tpu_baselines")
    return chunkwise_tpu_baselines.table(record["predictions"], HEADLINE)


def spread(value: Mapping) -> str:
    """A median with its quartiles."""
    return f"{value['median']:.1f} ({value['lower']:.1f} to {value['upper']:.1f})"


def kept(measurements: list[dict], **same: object) -> dict[str, dict]:
    """The contestants at the headline length, memory being kept, of all groups alike."""
    same |= {"tokens": HEADLINE, "allocator": "kept"}
    found = {}
    for m in measurements:
        if all(m[key] == value for key, value in same.items()):
            found = m["contestants"] | found  # of contestants in both groups, the plain ones
    return found


def cpu_recurrence() -> str:
    """The operators beside the scans on a CPU."""
    record = read("cpu_recurrence")
    lines = [
        "| T 8192, H 64, D 16, float32 | | times faster than `associative_scan` | than `lax.scan` "
        "| temporary memory over `associative_scan` |",
        "|---|---|---|---|---|",
    ]
    names = ("sliding_window_recurrence", "linear_recurrence", "gated_sliding_window_recurrence")
    for mode in ("forward", "forward+backward"):
        found = kept(record["measurements"], mode=mode)
        for name in names:
            speedup = found[name]["speedup"]
            cells = (
                f"`{name}`",
                mode,
                spread(speedup["associative_scan"]),
                spread(speedup["sequential_scan"]),
                f"{found[name]['temporary_ratio']['associative_scan']:.2f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cpu_copy() -> str:
    """What a copy would take, and how the aims were met, in words."""
    record = read("cpu_recurrence")
    forward = kept(record["measurements"], mode="forward", group="plain")
    copy = forward["copy"]["speedup"]["associative_scan"]["median"]
    share = forward["sliding_window_recurrence"]["speedup"]["copy"]["median"]
    aims = [t for t in record["targets"] if "times faster than associative_scan" in t["what"]]
    missed = [t for t in aims if t["what"].startswith("sliding") and not t["met"]]
    outcome = ("meets both", "misses one of them", "misses both")[len(missed)]
    return (
        "We aimed at 5 times forward and 3 times forward and backward, and the windowed operator\n"
        f"{outcome}. Forward, copying the input would be {copy:.1f} times faster than\n"
        "`associative_scan`: the recurrence reads the input twice, once for the carriers and once\n"
        f"for the states, and runs at {share:.1f} of the speed of that copy."
    )


def cpu_layers() -> str:
    """Phalanx beside attention on a CPU, in words."""
    rows = {}
    for mode in ("forward", "forward+backward"):
        found = kept(read("cpu_layers")["measurements"], mode=mode, features=512)
        rows[mode] = {k: v["median"] for k, v in found["phalanx"]["speedup"].items()}
    forward, both = rows.values()
    return (
        f"Layers of width 512 at T {HEADLINE}: the forward pass of `Phalanx` is "
        f"{forward['sliding_window_attention']:.1f} times faster than\nwindowed attention (window "
        f"512) and {forward['full_attention']:.0f} times faster than full attention; with the "
        f"backward\npass {both['sliding_window_attention']:.1f} and {both['full_attention']:.0f} "
        "times."
    )


def data_preparation() -> str:
    """What preparing a corpus keeps of the tokenizer's own speed, in words."""
    record = read("data_preparation")
    kept = record["prepare_over_alone"]["time"]
    corpus = record["corpus"]
    (target,) = record["targets"]
    return (
        f"From Parquet to a finished folder, {record['environment']['cores']} cores prepared "
        f"{corpus['text_bytes'] / 2**20:.0f} MiB of text in {corpus['documents']:,}\ndocuments at "
        f"{share(kept['threads'])} of the speed of the tokenizer's own batch call on text in\n"
        f"memory, and at {share(kept['processes'])} of that of a bare process per core (required: "
        f"{target['required']})."
    )


def share(value: Mapping) -> str:
    """A median with its quartiles, in per cent."""
    return (
        f"{100 * value['median']:.0f} % ({100 * value['lower']:.0f} to {100 * value['upper']:.0f})"
    )


def rate(value: float) -> str:
    """A number with two digits at least."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def decoding() -> str:
    """Tokens a second and bytes of state against the context's length."""
    record = read("decode_context")
    rows = record["measurements"]
    shown = [m for m in rows if m["tokens"] in (1024, 8192, 32_768, 131_072)]
    names = {
        "transformer++": "Transformer++",
        "swa_hybrid": "SWA hybrid 1:1",
        "swax": "SWAX",
        "phalanx": "Phalanx only",
    }
    contexts = [f"{m['tokens']:,}" for m in shown]
    lines = [
        "| model | parameters | "
        + " | ".join(f"tokens/s at {tokens}" for tokens in contexts)
        + " | "
        + " | ".join(f"MiB of state at {tokens}" for tokens in contexts)
        + " |",
        "|---" * (2 + 2 * len(shown)) + "|",
    ]
    for name, label in names.items():
        rates = [m["contestants"][name]["tokens_per_second"] for m in shown]
        cells = (
            label,
            f"{shown[0]['parameters'][name]:,}",
            *(f"{rate(r['median'])} ({rate(r['lower'])} to {rate(r['upper'])})" for r in rates),
            *(f"{m['state_bytes'][name] / 2**20:,.2f}" for m in shown),
        )
        lines.append(f"| {' | '.join(cells)} |")
    busy = max(m["cores_used_by_others"] or 0 for m in rows)
    lines.append(
        f"\nMedians and quartiles; other processes used up to {busy:.1f} of the machine's "
        f"{record['environment']['cores']} cores meanwhile."
    )
    return "\n".join(lines)


def h100() -> dict:
    """What is predicted of an H100 and what is asked of it, beside what one has measured."""
    source = read("kernels_gpu")
    measured = device_records("h100")
    predicted = device_report.predictions("h100", source)
    timed = [
        m
        for section in ("recurrence", "mlstm", "gated_delta")
        for m in measured.get(section, {"measurements": []})["measurements"]
    ]
    found = {t["what"]: t for record in measured.values() for t in record["targets"]}
    return {
        "chip": "NVIDIA H100",
        "meaning": f"predicted from compiled code, {source['shape']}; measured "
        "by experiments/benchmark.py --suite=device, null until then",
        "environment": {
            key: source["environment"][key] for key in ("jax", "commit", "date", "command")
        },
        "predictions": list(device_report.compare(predicted, timed)),
        "targets": [
            {
                "what": what,
                "required": f">= {least:g}",
                "measured": found[what]["measured"] if what in found else None,
            }
            for what, least in device_report.TARGETS
        ],
    }


def device_records(chip: str) -> dict[str, dict]:
    """The records of the suite `device` on a chip, by section."""
    found = {}
    for path in sorted(RESULTS.rglob("device_*.json")):
        record = json.loads(path.read_text())
        if "section" in record and device_report.chip_of(record) == chip:
            found[record["section"]] = record
    return found


def h100_targets() -> str:
    """The targets for an H100, with a column to be measured."""
    lines = ["| on an H100 | at least | measured |", "|---|---|---|"]
    for target in h100()["targets"]:
        value = "" if target["measured"] is None else f"{target['measured']:.2f}"
        lines.append(f"| {target['what']} | {target['required'][3:]} | {value} |")
    return "\n".join(lines)


# What stands in the README, by the name of its place.
FIGURES: dict[str, Callable[[], str]] = {
    "kernels_gpu": lambda: kernels("gpu", "h100"),
    "kernels_tpu": lambda: kernels("tpu", "v5e"),
    "tpu_baselines": against_scans,
    "mlstm_tpu_baselines": lambda: against_xla("mlstm"),
    "gated_delta_tpu_baselines": lambda: against_xla("gated_delta"),
    "compare_mixers": lambda: comparison.table(read("compare_mixers")),
    "compare_ablations": lambda: comparison.table(read("compare_ablations")),
    "evaluate": lambda: evaluation.table(read("evaluate")),
    "evaluate_full": lambda: evaluation.table(read("evaluate_full")),
    "swap": lambda: swap_report.table(read("swap_study")),
    "swax_recall": lambda: recall_report.table(read("swax_recall_2000")),
    "compare_windows": lambda: comparison_windows.table(read("compare_windows")),
    "decode": decoding,
    "plan_study": lambda: plan_study_report.tables(read("plan_study")),
    "cpu_recurrence": cpu_recurrence,
    "cpu_copy": cpu_copy,
    "cpu_layers": cpu_layers,
    "data_preparation": data_preparation,
    "train_models": lambda: training_report.models(read("train_models")),
    "train_loop": lambda: training_report.loop(read("train_loop")),
    "h100_targets": h100_targets,
}


def place(name: str) -> re.Pattern:
    """Matches a place for figures in the README, its contents in the middle."""
    return re.compile(rf"(<!-- figures: {name} -->\n)(.*?)\n?(<!-- end -->)", re.DOTALL)


def readme(text: str) -> str:
    """Returns the README with every figure as the JSON files have it."""
    for name, figure in FIGURES.items():
        value = figure().strip()
        text, count = place(name).subn(lambda m, value=value: m[1] + value + "\n" + m[3], text)
        if count != 1:
            sys.exit(f"error: README.md has {count} places for figures: {name}: must be one")
    return text


def source_of(record: Mapping) -> dict[str, str]:
    """Where a record comes from: "chip", "jax", "commit", "date", "command"."""
    where = record.get("environment", record)
    command = record.get("command", where.get("command"))
    command = f"`{command}`" if isinstance(command, str) else "in the file"  # several lines
    chips = {r["chip"]["name"] for r in record.get("reports", ())}
    chips |= {r["chip"] for r in record.get("predictions", ()) if "chip" in r}
    chips |= {record["chip"]} if "chip" in record else set()
    chips |= {plan["topology"] for plan in record.get("plans", ())}
    chip = f"predicted: {', '.join(sorted(chips))}" if chips else where["device"]
    return {
        "chip": chip,
        "jax": where["jax"],
        "commit": where["commit"][:7],
        "date": where["date"],
        "command": command,
    }


def index() -> str:
    """Returns the page that lists every result."""
    lines = [
        "# Results",
        "",
        "Written by `python experiments/results_index.py` from the files beside it: edit those.",
        "A chip that is marked as predicted was not there: its compiler was.",
        "",
        "| result | chip | jax | commit | date | command |",
        "|---|---|---|---|---|---|",
    ]
    for path in sorted({*RESULTS.rglob("*.json"), RESULTS / PREDICTIONS}):
        name = path.relative_to(RESULTS).as_posix()
        cells = source_of(h100() if name == PREDICTIONS else json.loads(path.read_text())).values()
        picture = path.with_suffix(".png")
        link = f"[{name}]({name})"
        if picture.exists():
            link += f", [picture]({picture.relative_to(RESULTS).as_posix()})"
        lines.append(f"| {link} | {' | '.join(cells)} |")
    lines += [
        "",
        "## An H100: predicted, and to be measured",
        "",
        "`python experiments/benchmark.py --suite=device --out=experiments/results/h100` on one, "
        "then",
        "`python experiments/results_index.py`, fills the empty columns. Predictions are the larger"
        " of",
        "memory and issue time of the compiled kernels; B 8, H 128, D 16, bfloat16.",
        "",
        device_report.comparison_table(h100()["predictions"]),
        "",
        h100_targets(),
        "",
    ]
    return "\n".join(lines)


def pages() -> dict[Path, str]:
    """Returns what every generated file should contain."""
    return {
        RESULTS / PREDICTIONS: json.dumps(h100(), indent=1) + "\n",
        RESULTS / "README.md": index(),
        ROOT / "README.md": readme((ROOT / "README.md").read_text()),
    }


def main(argv: list[str]) -> None:
    """Writes, or checks."""
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}: options begin with --")
    stale = [
        path for path, text in pages().items() if not path.exists() or path.read_text() != text
    ]
    for path in stale:
        print(f"{'out of date' if CHECK.value else 'wrote'}: {path.relative_to(ROOT)}")
        if not CHECK.value:
            path.write_text(pages()[path])
    if CHECK.value and stale:
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
