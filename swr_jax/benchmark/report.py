"""What a measurement was made on, and how it is shown as text."""

import datetime
import hashlib
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax

_ROOT = Path(__file__).parents[2]


def environment(arguments: Sequence[str]) -> dict:
    """Describe device, software, commit, date and command; nothing of it names a path.

    "source" is a digest of all modules: it tells versions apart where there is no commit.

    Args:
        arguments: of the script, sys.argv without the script itself.
    """
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": _cpu_model() if device.platform == "cpu" else device.device_kind,
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "libc": " ".join(platform.libc_ver()).strip(),
        "commit": commit(),
        "source": source(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command(arguments),
    }


class OtherProcesses:
    """Measures how much of the machine other processes use, so that a busy one is noticed."""

    def __init__(self) -> None:
        self._before = self._now()

    def cores(self) -> float | None:
        """Return the mean number of cores in others' use since the last call; None off Linux."""
        before, self._before = self._before, self._now()
        if before is None:
            return None
        wall, others = (now - then for now, then in zip(self._before, before, strict=True))
        return round(max(0.0, others / wall), 2)

    @staticmethod
    def _now() -> tuple[float, float] | None:
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        user, nice, system, _idle, _wait, irq, soft_irq, steal = map(
            int, stat.read_text().split()[1:9]
        )
        ticks = user + nice + system + irq + soft_irq + steal
        busy = ticks / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy - time.process_time()


def command(arguments: Sequence[str]) -> str:
    """Return the line that repeats this run; an absolute path is replaced by its last part."""
    shown = []
    for argument in arguments:
        option, equals, value = argument.rpartition("=")
        shown.append(option + equals + (Path(value).name if os.path.isabs(value) else value))
    return shlex.join(["python", f"experiments/{Path(sys.argv[0]).name}", *shown])


def commit() -> str:
    """Return the short commit of the source, "dirty" if it differs, or "unknown".

    Results that have been written anew are no difference.
    """

    def git(*arguments: str) -> str:
        call = ["git", "-C", str(_ROOT), *arguments]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()

    try:
        source = "--", ".", ":(exclude)experiments/results"
        changed = git("status", "--porcelain", "--untracked-files=no", *source)
        return git("rev-parse", "--short", "HEAD") + (" dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def source() -> str:
    """Return a digest of the project's modules."""
    digest = hashlib.sha256()
    for package in ("pallas_kernels", "swr_jax"):
        for path in sorted((_ROOT / package).rglob("*.py")):
            digest.update(path.relative_to(_ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# Columns that a table has where its measurements have them: the key, and the heading.
_OPTIONAL = {
    "features": "width",
    "model": "model",
    "group": "group",
    "batch": "rows",
    "tokens": "tokens",
    "mode": "mode",
    "allocator": "allocator",
}
# Likewise of contestants: how much of what the device can do they reach.
_SHARES = {"copy_fraction": "of copy", "product_fraction": "of products"}


def table(measurements: Sequence[dict], references: Sequence[str]) -> str:
    """Return one aligned line per contestant and measurement.

    Args:
        measurements: of one section, with contestants.
        references: labels of the contestants that others are compared with.
    """
    extra = [key for key in _OPTIONAL if key in measurements[0]]
    found = {key for m in measurements for c in m["contestants"].values() for key in c}
    shares = [key for key in _SHARES if key in found]
    lines = [
        (
            "contestant",
            *(_OPTIONAL[key] for key in extra),
            "ms",
            "[quartiles]",
            *(f"x {label}" for label in references),
            *(_SHARES[key] for key in shares),
            "temp MiB",
            *([f"/ {references[0]}"] if references else []),
        )
    ]
    for m in measurements:
        for name, contestant in m["contestants"].items():
            ms = contestant["milliseconds"]
            speedups = (contestant["speedup"].get(label) for label in references)
            ratio = contestant["temporary_ratio"].get(references[0]) if references else None
            lines.append(
                (
                    name,
                    *(str(m[key]) for key in extra),
                    f"{ms['median']:.3f}",
                    f"[{ms['lower']:.3f}, {ms['upper']:.3f}]",
                    *("-" if value is None else _spread(value) for value in speedups),
                    *(_spread(contestant[key]) if key in contestant else "-" for key in shares),
                    f"{contestant['temporary_bytes'] / 2**20:.2f}",
                    *(["-" if ratio is None else f"{ratio:.3f}"] if references else []),
                )
            )
    return align(lines)


def rates_table(measurements: Sequence[dict]) -> str:
    """Return one aligned line per rate of the device: work a second."""
    lines = [("case", "ms", "[quartiles]", "a second")]
    for m in measurements:
        for contestant in m["contestants"].values():
            ms = contestant["milliseconds"]
            lines.append(
                (
                    m["case"],
                    f"{ms['median']:.4f}",
                    f"[{ms['lower']:.4f}, {ms['upper']:.4f}]",
                    f"{contestant['rate']['median']:.4g}",
                )
            )
    return align(lines)


def check_table(measurements: Sequence[dict]) -> str:
    """Return one aligned line per check: the largest error, and whether it is within bounds."""
    lines = [("case", "largest error", "allowed", "")]
    for m in measurements:
        errors = [error for found in m["errors"].values() for error in found.values()]
        lines.append(
            (
                m["case"],
                f"{max(errors):.1e}" if errors else "-",
                f"{m['tolerance']:.0e}",
                f"RED: {m['fault']}" if m["fault"] else "green",
            )
        )
    return align(lines)


def targets_table(targets: Sequence[dict]) -> str:
    """Return one aligned line per target, met or missed."""
    lines = [("target", "required", "measured", "[quartiles]", "")]
    for target in targets:
        quartiles = target.get("quartiles")
        lines.append(
            (
                target["what"],
                target["required"],
                f"{target['measured']:.3f}",
                "[{:.2f}, {:.2f}]".format(*quartiles) if quartiles else "",
                "met" if target["met"] else "MISSED",
            )
        )
    return align(lines)


def _spread(value: dict) -> str:
    return f"{value['median']:.2f} [{value['lower']:.2f}, {value['upper']:.2f}]"


def align(lines: Sequence[tuple[str, ...]]) -> str:
    """Return a table of text: the first line is its head, columns of numbers to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]

    def cell(column: int, text: str) -> str:
        # Numbers to the right, so that they compare at a glance.
        left = lines[1][column][:1].isalpha() if len(lines) > 1 else True
        return text.ljust(widths[column]) if left else text.rjust(widths[column])

    return "\n".join(
        "  ".join(cell(column, text) for column, text in enumerate(line)).rstrip() for line in lines
    )
