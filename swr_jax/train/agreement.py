"""Whether all processes of a run are about to do the same, found out before they wait in vain."""

import collections
import hashlib
import json
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib
import numpy as np
from jax.experimental import multihost_utils

import pallas_kernels
import swr_jax
from swr_jax.train.config import TrainConfig, to_dict

_HOST_BYTES = 64  # of a host's name, that is shown


class DisagreementError(ValueError):
    """Processes of one run differ in their configuration or in their code."""


def check_agreement(config: TrainConfig) -> None:
    """Compares code, versions and configuration of all processes; every process must call it.

    Raises:
        DisagreementError: in every process, with the processes that differ from most others, or
            from process 0, and in what.
    """
    if jax.process_count() == 1:
        return
    options = _flat(to_dict(config), "config")
    versions = {
        "code of swr_jax": _code(),
        "version of JAX": f"{jax.__version__}, jaxlib {jaxlib.__version__}",
        "version of flax": flax.__version__,
        "kind of device": jax.local_devices()[0].device_kind,
    }
    # Options are compared one by one where all have the same; that they do is part of the code.
    _compare(versions | {"set of options": sorted(options)})
    _compare(options)


def _compare(values: Mapping[str, Any]) -> None:
    names = sorted(values)
    hosts = multihost_utils.process_allgather(_as_bytes(socket.gethostname()))
    digests = multihost_utils.process_allgather(np.stack([_digest(values[n]) for n in names]))
    hosts = [bytes(host).rstrip(b"\0").decode(errors="replace") for host in hosts]
    if problems := disagreements(names, digests, hosts):
        mine = ", ".join(f"{name} is {values[name]!r}" for name in problems)
        raise DisagreementError(
            f"the processes of this run differ: {'; '.join(problems.values())}. In process "
            f"{jax.process_index()} {mine}. Start all of them with the same command and code"
        )


def disagreements(
    names: Sequence[str], digests: np.ndarray, hosts: Sequence[str]
) -> dict[str, str]:
    """In words, by name, which processes differ from the others in it.

    Args:
        names: of what was compared.
        digests: [processes, len(names), bytes] uint8.
        hosts: name of each process's host.
    """
    problems = {}
    for index, name in enumerate(names):
        found = [bytes(digest) for digest in np.asarray(digests, np.uint8)[:, index]]
        counts = collections.Counter(found)
        # The commonest; of several equally common ones that of the lowest process.
        usual = max(found, key=lambda digest: (counts[digest], -found.index(digest)))
        others = [process for process, digest in enumerate(found) if digest != usual]
        if others:
            shown = ", ".join(f"{process} ({hosts[process]})" for process in others)
            plural = "process" if len(others) == 1 else "processes"
            problems[name] = f"{plural} {shown} in {name}"
    return problems


def _code() -> str:
    """A digest of the source files of this library, as they are on this host."""
    digest = hashlib.sha256()
    for package in (pallas_kernels, swr_jax):
        folder = Path(package.__path__[0])
        for path in sorted(folder.rglob("*.py")):
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _flat(values: Any, path: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        return {path: values}
    return {k: v for name in values for k, v in _flat(values[name], f"{path}.{name}").items()}


def _digest(value: Any) -> np.ndarray:
    text = json.dumps(value, sort_keys=True)
    return np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], np.uint8)


def _as_bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode()[:_HOST_BYTES].ljust(_HOST_BYTES, b"\0"), np.uint8)
