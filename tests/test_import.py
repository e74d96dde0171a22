"""Importing the package is cheap: what one module alone needs, that module imports."""

import subprocess
import sys

HEAVY = {
    "array_record",
    "grain",
    "matplotlib",
    "ml_collections",
    "orbax",
    "pyarrow",
    "safetensors",
    "sentencepiece",
    "tensorboardX",
    "starlette",
    "tokamax",
    "tokenizers",
    "tqdm",
    "uvicorn",
}


def test_importing_loads_no_heavy_dependency():
    """Beyond those that flax itself may load."""
    code = (
        "import sys, flax.nnx; before = set(sys.modules); import swr_jax; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert "swr_jax" in loaded
    assert not loaded & HEAVY
