"""Tables of what an evaluation has found."""

from collections.abc import Mapping

from swr_jax.eval.intervals import wilson


def results(record: Mapping, task: str) -> dict[tuple[str, ...], dict]:
    """Results of a task, by the parts of their cases' names after the task's own."""
    found = {}
    for name, result in record["cases"].items():
        first, *rest = name.split("/")
        if first == task:
            found[tuple(rest)] = result
    return found


def table(record: Mapping) -> str:
    """Write Markdown tables: perplexity, then shares of right answers, then the harness's tasks.

    Brackets hold 95 % intervals: bootstrapped for bits per byte, Wilson's for shares.
    """
    parts = [_perplexity(record), _shares(record), _harness(record)]
    return "\n\n".join(part for part in parts if part)


def _markdown(heads: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _bits(found: Mapping) -> str:
    if found["bits_per_byte"] is None:
        return "-"
    text = f"{found['bits_per_byte']:.3f}"
    if found["interval"]:
        text += " ({:.3f} to {:.3f})".format(*found["interval"])
    return text


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f}"


def _perplexity(record: Mapping) -> str:
    rows = []
    for (length,), found in sorted(
        results(record, "perplexity").items(), key=lambda item: int(item[0][0])
    ):
        last = found["ranges"][-1]
        memory = found["memory"]
        rows.append(
            [
                f"{int(length):,}",
                f"{found['streams']:,}",
                f"{found['all']['perplexity']:.3f}",
                _bits(found["all"]),
                f"{last['from']:,}-{last['to']:,}: {_bits(last)}",
                f"{_mib(memory['state'])} + {_mib(memory['temporary'])}",
            ]
        )
    heads = ["context, tokens", "streams", "perplexity", "bits per byte"]
    heads += ["of its last positions", "MiB of state + of work"]
    return _markdown(heads, rows)


def pooled(record: Mapping) -> dict[str, dict[int, tuple[int, int]]]:
    """Right answers and trials by task and length, depths together."""
    found: dict[str, dict[int, tuple[int, int]]] = {}
    for task in ("needle", "passkey", "babilong", "mqar"):
        for rest, result in results(record, task).items():
            parts = list(rest)
            name = f"{task} {parts.pop(0)}" if task in ("needle", "babilong") else task
            right, trials = found.setdefault(name, {}).get(int(parts[0]), (0, 0))
            found[name][int(parts[0])] = (right + result["right"], trials + result["trials"])
    return found


def _shares(record: Mapping) -> str:
    found = pooled(record)
    lengths = sorted({length for by_length in found.values() for length in by_length})

    def cell(by_length: Mapping, length: int) -> str:
        if length not in by_length:
            return "-"
        right, trials = by_length[length]
        low, high = wilson(right, trials)
        return f"{right / trials:.2f} ({low:.2f} to {high:.2f})"

    rows = [[name, *(cell(by, length) for length in lengths)] for name, by in found.items()]
    return _markdown(["share of right answers", *(f"{n:,} tokens" for n in lengths)], rows)


def _harness(record: Mapping) -> str:
    rows = []
    for (name,), found in results(record, "harness").items():
        for metric, value in found["metrics"].items():
            text = f"{value['value']:.4f}"
            if value["interval"]:
                text += " ({:.4f} to {:.4f})".format(*value["interval"])
            rows.append([name, metric, text])
    return _markdown(["task of the harness", "metric", "value"], rows)
