"""What a device's measurements say: the project's targets, and predictions beside measurements."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from swr_jax.benchmark.device import platform
from swr_jax.benchmark.predictions import floor

HEADLINE = 8192  # tokens
WIDTH = 2048  # of the layers that are judged

# The project's targets for an H100: what, and at least how much.
FORWARD = ("sliding_window_recurrence forward: share of copy bandwidth", 0.85)
BACKWARD = ("sliding_window_recurrence backward: share of copy bandwidth", 0.80)
SCAN = ("sliding_window_recurrence forward+backward: times faster than associative_scan", 20.0)
LAYERS = {
    "sliding_window_attention": (
        "phalanx layer forward: times faster than windowed attention",
        1.8,
    ),
    "full_attention": ("phalanx layer forward: times faster than full attention", 3.3),
}
TRAINING = {
    4096: ("1.3B phalanx hybrid, training at 4k: times faster than transformer++", 1.1),
    32768: ("1.3B phalanx hybrid, training at 32k: times faster than transformer++", 1.4),
}
# Published milliseconds, forward+backward at the headline length.
PUBLISHED = {
    "mlstm": ("mlstm forward+backward at 8k: the published 15.2 ms over its time", 15.2),
    "mlstm, sigmoid": ("mlstm, sigmoid, at 8k: the published 12.8 ms over its time", 12.8),
}
ATTENTION = ("mlstm forward+backward from 4k on: times faster than full attention", 1.0)
TARGETS = (
    *(FORWARD, BACKWARD, SCAN, *LAYERS.values(), *TRAINING.values()),
    *((what, 1.0) for what, _ in PUBLISHED.values()),
    ATTENTION,
)


def recurrence_targets(record: Mapping, _: Any) -> list[dict]:
    """Judge the operators at the headline length."""
    found = {
        m["mode"]: m["contestants"]
        for m in record["measurements"]
        if (m["group"], m["tokens"]) == ("plain", HEADLINE)
    }
    name = "sliding_window_recurrence"
    if any(name not in found.get(mode, {}) for mode in ("forward", "forward+backward")):
        return []
    forward, both = (found[mode][name] for mode in ("forward", "forward+backward"))
    judged = [_judge(FORWARD, forward.get("copy_fraction"))]
    if "copy" in found["forward"]:
        # What the backward adds, in bytes and in time.
        copy = found["forward"]["copy"]
        seconds = both["milliseconds"]["median"] - forward["milliseconds"]["median"]
        rate = (both["bytes"] - forward["bytes"]) / seconds
        share = rate / (copy["bytes"] / copy["milliseconds"]["median"])
        judged.append(_judge(BACKWARD, {"median": share}))
    scans = [both["speedup"].get(s) for s in ("associative_scan", "associative_scan, broadcast")]
    slowest = min((s for s in scans if s), key=lambda s: s["median"], default=None)
    return [target for target in (*judged, _judge(SCAN, slowest)) if target]


def layer_targets(record: Mapping, _: Any) -> list[dict]:
    """Judge the layers at the headline length and width."""
    judged = []
    for m in record["measurements"]:
        shape = (m.get("features"), m.get("tokens"), m.get("mode"))
        if shape == (WIDTH, HEADLINE, "forward") and "phalanx" in m["contestants"]:
            speedup = m["contestants"]["phalanx"]["speedup"]
            judged += [_judge(target, speedup.get(name)) for name, target in LAYERS.items()]
    return [target for target in judged if target]


def training_targets(record: Mapping, _: Any) -> list[dict]:
    """Judge the training of the larger models."""
    judged = []
    for m in record["measurements"]:
        target = TRAINING.get(m["tokens"])
        if m["model"] == "1.3B" and target and "phalanx_hybrid" in m["contestants"]:
            speedup = m["contestants"]["phalanx_hybrid"]["speedup"]
            judged.append(_judge(target, speedup.get("transformer++")))
    return [target for target in judged if target]


def mlstm_targets(record: Mapping, _: Any) -> list[dict]:
    """Judge the mLSTM by what is published, and at every length from 4k on by attention."""
    judged, speedups = [], []
    for m in record["measurements"]:
        if m["mode"] != "forward+backward":
            continue
        for name, (what, published) in PUBLISHED.items():
            if m["tokens"] == HEADLINE and name in m["contestants"]:
                times = m["contestants"][name]["milliseconds"]
                ratios = {"median": published / times["median"]}
                judged.append(_judge((what, 1.0), ratios))
        if m["tokens"] >= 4096 and "mlstm" in m["contestants"]:
            speedups.append(m["contestants"]["mlstm"]["speedup"].get("full_attention"))
    slowest = min((s for s in speedups if s), key=lambda s: s["median"], default=None)
    return [target for target in (*judged, _judge(ATTENTION, slowest)) if target]


def _judge(target: tuple[str, float], value: Mapping | None) -> dict | None:
    if value is None:
        return None
    what, least = target
    judged = {"what": what, "required": f">= {least:g}", "measured": value["median"]}
    if "lower" in value:
        judged["quartiles"] = [value["lower"], value["upper"]]
    return {**judged, "met": value["median"] >= least}


# Contestants that predictions exist for: by group and name, what the prediction is called.
PREDICTED_GPU = {
    ("plain", "sliding_window_recurrence"): "swr/plain/window16",
    ("plain", "linear_recurrence"): "swr/plain/exact",
    ("gated", "gated_sliding_window_recurrence"): "swr/gated/window16",
    ("gated", "gated linear_recurrence"): "swr/gated/exact",
    ("mlstm", "mlstm"): "mlstm/published",
    ("gated_delta", "gated_delta_rule"): "gated_delta/published",
}


def predictions(
    chip: str, kernels: Mapping, baselines: Mapping | None = None
) -> list[dict[str, Any]]:
    """Return what is predicted of contestants of recurrences and matrix memories on a chip.

    Args:
        chip: a name in `pallas_kernels.targets.CHIPS`.
        kernels: the record kernels_gpu.json, for a GPU.
        baselines: the record tpu_baselines.json, for a TPU.

    Returns:
        "group", "contestant", "mode", "tokens" (T), "predicted_seconds", "floor_seconds" (inputs
        and outputs once at the memory's full bandwidth).
    """
    rows = []
    reports = {r["name"]: r for r in kernels["reports"] if r["chip"]["name"] == chip}
    for (group, contestant), name in PREDICTED_GPU.items():
        for mode in ("forward", "forward+backward"):
            if report := reports.get(f"{name}/{mode}"):
                rows.append(
                    {
                        **{"group": group, "contestant": contestant, "mode": mode},
                        "tokens": HEADLINE,
                        "predicted_seconds": report["seconds"],
                        "floor_seconds": floor(report),
                    }
                )
    for row in (baselines or {"predictions": []})["predictions"]:
        if row["chip"] == chip:
            rows.append(
                {
                    **{"group": "heads minor", "contestant": row["contestant"]},
                    **{"mode": row["mode"], "tokens": row["tokens"]},
                    "predicted_seconds": row["seconds"],
                    "floor_seconds": row["floor_seconds"],
                }
            )
    return rows


def compare(predicted: Sequence[Mapping], measurements: Sequence[Mapping]) -> Iterator[dict]:
    """Put measurements beside predictions; "measured_seconds" is None where there is none."""
    measured = {}
    for m in measurements:
        for name, contestant in m["contestants"].items():
            seconds = contestant["milliseconds"]["median"] / 1e3
            measured[m["group"], name, m["mode"], m["tokens"]] = seconds
    for row in predicted:
        key = (row["group"], row["contestant"], row["mode"], row["tokens"])
        yield {**row, "measured_seconds": measured.get(key)}


def comparison_table(rows: Sequence[Mapping]) -> str:
    """Markdown: predicted and measured times; a column stays empty until a device has spoken."""
    lines = [
        "| contestant | | T | floor, us | predicted, us | measured, us | measured over predicted |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds = row["measured_seconds"]
        cells = (
            f"`{row['contestant']}`" + (f" ({row['group']})" if row["group"] != "plain" else ""),
            row["mode"],
            str(row["tokens"]),
            f"{row['floor_seconds'] * 1e6:,.0f}",
            f"{row['predicted_seconds'] * 1e6:,.0f}",
            "" if seconds is None else f"{seconds * 1e6:,.0f}",
            "" if seconds is None else f"{seconds / row['predicted_seconds']:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def chip_of(record: Mapping) -> str | None:
    """Return the chip that a record was measured on, as predictions call it."""
    return platform.chip_of(record["environment"]["device"])
