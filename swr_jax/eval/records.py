"""The results of an evaluation in a file that is whole at any time; a later run goes on from it."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from swr_jax.nn.language_model import LanguageModel, num_parameters


class RecordError(Exception):
    """A file of results is of another model."""


def describe(model: LanguageModel, *, step: int, trained_length: int) -> dict:
    """Say which model was tested; "digest" is that of its configuration and its parameters."""
    digest = hashlib.sha256(repr(sorted(dataclasses.asdict(model.config).items())).encode())
    for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)):
        digest.update(np.asarray(leaf).tobytes())
    return {
        "parameters": num_parameters(model),
        "pattern": list(model.config.pattern),
        "window": model.config.window if "swa" in model.config.pattern else None,
        "step": step,
        "trained_length": trained_length,
        "digest": digest.hexdigest()[:16],
    }


def open_record(path: Path, *, model: Mapping, fresh: bool) -> dict:
    """Return the record of an earlier run on the same model, or a new one.

    Raises:
        RecordError: the file is of another model.
    """
    if path.exists() and not fresh:
        found = read_record(path)
        if found["model"] != model:
            raise RecordError(
                f"{path} holds results of another model (digest {found['model']['digest']}, this "
                f"one has {model['digest']}): begin anew with --fresh, or choose another --name or "
                "--out"
            )
        return found
    return {"environment": {}, "model": model, "cases": {}}


def read_record(path: Path) -> dict:
    """Return what an evaluation has written."""
    return json.loads(path.read_text())


def is_done(record: Mapping, name: str, settings: Mapping) -> bool:
    """Whether a case has a result for the same settings."""
    return record["cases"].get(name, {}).get("settings") == settings


def add_case(record: dict, name: str, result: Mapping, *, environment: Mapping) -> None:
    """Put the result of a case, its settings included, into a record, and where it was done."""
    record["cases"][name] = result
    record["environment"] = environment


def write_record(record: Mapping, path: Path) -> None:
    """Replace the file in one step; lists and objects that hold no others take one line each."""
    text = json.dumps(record, indent=1)
    text = re.sub(r"\[[^][{}]*\]|{[^][{}]*}", lambda m: " ".join(m[0].split()), text)
    unfinished = path.with_suffix(".json.part")
    unfinished.write_text(text + "\n")
    unfinished.replace(path)
