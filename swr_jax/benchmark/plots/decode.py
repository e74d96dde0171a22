"""Picture of the suite `decode`."""

from pathlib import Path

import matplotlib.pyplot as plt

from swr_jax.benchmark.plots.common import band, legend, log_axes, measured_on, save

_LINES = {
    "transformer++": ("Transformer++", "tab:red", "D"),
    "swa_hybrid": ("SWA hybrid 1:1", "tab:orange", "v"),
    "swax": ("SWAX", "tab:green", "^"),
    "phalanx": ("Phalanx only", "tab:blue", "o"),
}


def context(record: dict, path: Path) -> None:
    """Draw tokens a second, and memory of the state, against the context's length."""
    rows = record["measurements"]
    tokens = [m["tokens"] for m in rows]
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(12, 5))
    for name, (label, color, marker) in _LINES.items():
        rates = [m["contestants"][name]["tokens_per_second"] for m in rows]
        band(speed, tokens, rates, label=label, color=color, marker=marker)
        state = [m["state_bytes"][name] / 2**20 for m in rows]
        memory.plot(tokens, state, label=label, color=color, marker=marker, markersize=4)
    weights = [m["parameter_bytes"]["transformer++"] / 2**20 for m in rows]
    memory.plot(tokens, weights, label="parameters", color="tab:gray", linestyle=":")
    log_axes(speed, tokens, "decoded tokens a second")
    log_axes(memory, tokens, "state of one stream (MiB)")
    for axis in (speed, memory):
        axis.set_xlabel("tokens of context")
    legend(figure, (speed, memory))
    title = f"Decoding, {record['protocol']['shapes']}"
    save(figure, f"{title}\n{measured_on(record)}", path)


PICTURES = {"context": context}
