"""Draw what a token sees, from the operator itself: python experiments/window_picture.py

Writes window.png: the derivative of every output with respect to every input, for each lookback.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
from absl import app, flags

from swr_jax import sliding_window_recurrence

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_OUT = flags.DEFINE_string("out", "experiments/results", "Folder for the picture.")

TIME, BLOCK_SIZE, DECAY = 64, 16, 0.96
TITLES = {
    0: "lookback=0\nits own block",
    1: "lookback=1: SWR\nown and previous block",
    None: "lookback=None\neverything before",
}


def sensitivity(lookback: int | None) -> jax.Array:
    """Return dx_i / du_j [T, T] of one head with one feature and a constant decay."""
    decay = jnp.full((1, TIME, 1), DECAY)

    def outputs(inputs: jax.Array) -> jax.Array:
        x = sliding_window_recurrence(
            decay, inputs.reshape(1, TIME, 1, 1), block_size=BLOCK_SIZE, lookback=lookback
        )
        return x.reshape(TIME)

    return jax.jacrev(outputs)(jnp.zeros(TIME))


def main(_: list[str]) -> None:
    """Draw one panel per lookback."""
    figure, axes = plt.subplots(
        1, len(TITLES), figsize=(10, 3.9), sharey=True, layout="constrained"
    )
    for axis, (lookback, title) in zip(axes, TITLES.items(), strict=True):
        weights = sensitivity(lookback)
        image = axis.imshow(
            jnp.where(weights == 0, jnp.nan, weights), cmap="viridis", vmin=0, vmax=1
        )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("input token j")
        axis.set_xticks(range(0, TIME + 1, BLOCK_SIZE))
        axis.set_yticks(range(0, TIME + 1, BLOCK_SIZE))
        axis.grid(color="0.85", linewidth=0.6)
        axis.set_axisbelow(True)
    axes[0].set_ylabel("output token i")
    figure.colorbar(image, ax=axes, label=f"weight of j in i, decay {DECAY}", shrink=0.85)
    path = Path(_OUT.value) / "window.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


if __name__ == "__main__":
    app.run(main)
