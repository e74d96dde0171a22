"""Pictures of measurements and predictions; the only part of the benchmarks with matplotlib."""

import importlib
from pathlib import Path


def draw(record: dict, path: Path) -> Path | None:
    """Draw the record of a suite's section; returns where, or None for one without a picture."""
    pictures = importlib.import_module(f"{__name__}.{record['suite']}").PICTURES
    picture = pictures.get(record["section"])
    if picture is None or not any(m.get("contestants") for m in record["measurements"]):
        return None
    picture(record, path)
    return path
