"""Measures what `experiments/prepare_data.py` keeps of the speed of the tokenizer alone.

    python experiments/benchmark_data.py

Writes data_preparation.json into --out. How it is measured is described in
swr_jax/benchmark/preparation.py and repeated in the JSON. Run it on an idle machine.
"""

import json
import sys
import tempfile
from pathlib import Path

import jax
from absl import app, flags

from swr_jax.benchmark import preparation, records, report
from swr_jax.data import token_records

OUT = flags.DEFINE_string("out", "experiments/results", "Folder for the result, made if missing.")
TINY = flags.DEFINE_bool("tiny", False, "Small sizes, to see whether everything runs.")
AIM = 0.8  # of the tokenizer's own speed


def main(argv: list[str]) -> None:
    """Measures and reports."""
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}: options begin with --")
    jax.config.update("jax_platforms", "cpu")
    record = {
        "suite": "data",
        "section": "preparation",
        "environment": report.environment(sys.argv[1:]),
        "protocol": " ".join(preparation.__doc__.split()),
        "rounds": [],
    }
    out = Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    sizes = preparation.TINY if TINY.value else preparation.FULL
    with tempfile.TemporaryDirectory() as folder:
        for found in preparation.run(sizes, Path(folder)):
            record["rounds"].append(found)
            took = (f"{name} {value['seconds']:.1f} s" for name, value in found.items())
            print("measured " + ", ".join(took), flush=True)
            metadata = token_records.read_json(Path(folder) / "tokens" / "metadata.json")
            corpus = {key: metadata[key] for key in ("documents", "text_bytes", "tokens")}
            record |= preparation.summary(record["rounds"], corpus)
            ratios = record["prepare_over_alone"]
            least = min(spread["median"] for spread in ratios["time"].values())
            record["targets"] = [
                {
                    "what": "prepare over the tokenizer alone",
                    "required": f">= {AIM}",
                    "measured": least,
                    "met": least >= AIM,
                }
            ]
            records.write_record(record, out / "data_preparation.json")
    print(json.dumps(ratios, indent=1))


if __name__ == "__main__":
    app.run(main)
