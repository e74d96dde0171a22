"""What a section has found, in a file that is whole at any time; a later run goes on from it."""

import dataclasses
import json
import time
from collections.abc import Collection, Mapping
from pathlib import Path

# What two runs must have in common for one to go on where the other stopped.
_ORIGIN = ("platform", "device", "jax", "source")


class RecordError(Exception):
    """A file of results cannot be continued."""


def open_record(path: Path, header: Mapping, *, fresh: bool) -> dict:
    """Return the record of an earlier run of the same section on the same device, or a new one.

    Args:
        path: its file.
        header: "suite", "section", "tiny", "environment", "protocol".
        fresh: begin anew whatever is there.

    Raises:
        RecordError: the file is of another device, another version of JAX or of this project, or
            of other sizes.
    """
    if fresh or not path.exists():
        return {**header, "measurements": [], "left_out": [], "targets": []}
    record = read_record(path)
    before, now = record["environment"], header["environment"]
    changed = [key for key in _ORIGIN if before.get(key) != now[key]]
    if record["tiny"] != header["tiny"]:
        changed.append("sizes")
    if changed:
        raise RecordError(
            f"{path.name} was measured with another {' and '.join(changed)}: begin anew with "
            "--fresh, or choose another --out"
        )
    return {**record, **header, "left_out": []}


def read_record(path: Path) -> dict:
    """Return what a section has written."""
    return json.loads(path.read_text())


def predictions_of_others(path: Path, contestants: Collection[str], jax_version: str) -> dict:
    """Return what a record of predictions has for all but some contestants, and where it is from.

    Args:
        path: its file.
        contestants: that are predicted anew.
        jax_version: of which the others must be.

    Raises:
        RecordError: there is no such file, or it is of another JAX.
    """
    if not path.exists():
        raise RecordError(f"there is no {path} with predictions of the others: predict all")
    record = read_record(path)
    predictions = [row for row in record["predictions"] if row["contestant"] not in contestants]
    if versions := {row["jax"] for row in predictions} - {jax_version}:
        raise RecordError(f"{path} is of JAX {sorted(versions)}, not {jax_version}: predict all")
    return {"kept_environment": record["environment"], "predictions": predictions}


def write_record(record: Mapping, path: Path) -> None:
    """Replace the file in one step."""
    unfinished = path.with_suffix(".json.part")
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    unfinished.replace(path)


@dataclasses.dataclass
class Session:
    """What a section has to go by while it runs.

    Attributes:
        record: what it has measured itself, in this run and in those that this one continues.
        others: records of the suite's other sections, by name.
        seconds: how long it may take.
    """

    record: Mapping
    others: Mapping[str, Mapping] = dataclasses.field(default_factory=dict)
    seconds: float = float("inf")

    def __post_init__(self):
        self._began = self._last = time.perf_counter()
        self._longest = 0.0

    def is_done(self, case: str) -> bool:
        """Whether a case has been measured."""
        return any(found["case"] == case for found in self.record["measurements"])

    def is_over(self) -> bool:
        """Whether there is no time for another step, each as long as the longest so far.

        To be asked before each of them.
        """
        now = time.perf_counter()
        self._longest = max(self._longest, now - self._last)
        self._last = now
        return now - self._began + self._longest > self.seconds

    def left_out(self, case: str, reason: str | None = None) -> dict:
        """Return what to yield for a case that is not measured; by default for want of time."""
        if reason is None:
            reason = f"the section's {self.seconds:.0f} s are used up: run the command again"
        return {"case": case, "left_out": reason}


def first_line(error: Exception) -> str:
    """Return what an error says, as a reason to leave something out."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
