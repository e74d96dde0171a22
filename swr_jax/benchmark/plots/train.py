"""Pictures of the suite `train`."""

from pathlib import Path

import matplotlib.pyplot as plt

from swr_jax.benchmark.models import PATTERNS
from swr_jax.benchmark.plots.common import band, legend, log_axes, measured_on, save
from swr_jax.benchmark.plots.device import training

LINES = {
    "transformer++": ("Transformer++", "tab:red", "D"),
    "swa_hybrid": ("SWA hybrid 1:1", "tab:orange", "v"),
    "phalanx_hybrid": ("Phalanx hybrid 1:1", "tab:blue", "o"),
    "swax": ("SWAX", "tab:green", "^"),
}


def models(record: dict, path: Path) -> None:
    """Draw speed, speed over Transformer++, and temporary memory against the length of a row."""
    rows = record["measurements"]
    tokens = [m["tokens"] for m in rows]
    figure, (speed, ratio, memory) = plt.subplots(1, 3, figsize=(15, 5))
    for name in PATTERNS:
        label, color, marker = LINES[name]
        line = {"label": label, "color": color, "marker": marker}
        found = [m["contestants"][name] for m in rows]
        band(speed, tokens, [c["tokens_per_second"] for c in found], **line)
        band(ratio, tokens, [c["speedup"]["transformer++"] for c in found], **line)
        temporary = [c["temporary_bytes"] / 2**20 for c in found]
        memory.plot(tokens, temporary, markersize=4, **line)
    log_axes(speed, tokens, "trained tokens a second")
    log_axes(ratio, tokens, "speed over Transformer++ (times)")
    log_axes(memory, tokens, "temporary memory of an update (MiB)")
    legend(figure, (speed, ratio, memory))
    title = f"Training updates, {record['protocol']['shapes']}"
    save(figure, f"{title}\n{measured_on(record)}", path)


PICTURES = {"models": models, "large": training}
