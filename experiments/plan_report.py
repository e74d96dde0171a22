"""Text and picture of what experiments/plan.py predicts."""

from collections.abc import Mapping, Sequence
from pathlib import Path

GIB, MIB = 2**30, 2**20
DAY = 86_400


def text(plan: Mapping, tokens: float) -> str:
    """A paragraph of figures."""
    lines = [
        f"\n{plan['topology']} ({plan['devices']} devices): {_mesh(plan)}",
        f"  model           {plan['parameters']:,} parameters",
    ]
    if "mode" in plan:
        return "\n".join([*lines, *_inference(plan)])
    lines.append(
        f"  update          {plan['rows']} rows of {plan['length']:,} tokens = "
        f"{plan['tokens_per_update']:,}"
    )
    lines.append(_memory(plan))
    model = plan["flops_per_token"] * plan["tokens_per_update"]
    lines.append(
        f"  matrix products {plan['traced_flops'] / 1e15:,.2f} PFLOP an update, "
        f"{plan['traced_flops'] / model:.2f} x the model's"
    )
    lines += _parts(plan)
    if "seconds" in plan:
        lines.append(
            f"  step            {plan['seconds'] * 1e3:,.0f} ms (all but collectives "
            f"{plan['compute_seconds'] * 1e3:,.0f}; {plan['seconds_if_overlapped'] * 1e3:,.0f} if "
            f"they overlap), MFU {plan['mfu']:.1%}"
        )
        days = tokens / plan["tokens_per_second"] / DAY
        lines.append(
            f"  speed           {plan['tokens_per_second']:,.0f} tokens/s; {tokens / 1e9:,.0f} "
            f"billion tokens in {days:,.1f} days"
        )
    return "\n".join(lines)


def _inference(plan: Mapping) -> list[str]:
    """The rest of the paragraph, for a step of generation."""
    does = "one token each" if plan["mode"] == "decode" else "a chunk of each prompt"
    lines = [
        f"  {plan['mode']:15} {plan['streams']} streams, {does} = {plan['tokens_per_step']:,} "
        f"tokens; context {plan['context']:,}, state {plan['state_bytes_per_stream'] / MIB:,.2f} "
        "MiB a stream",
        _memory(plan),
        *_parts(plan),
        f"  floor           {plan['floor_seconds'] * 1e3:,.3f} ms to move parameters and states "
        "once",
    ]
    if "seconds" in plan:
        lines.append(
            f"  step            {plan['seconds'] * 1e3:,.3f} ms "
            f"({plan['seconds_if_overlapped'] * 1e3:,.3f} if collectives overlap), "
            f"{plan['tokens_per_second']:,.0f} tokens/s"
        )
    return lines


def _memory(plan: Mapping) -> str:
    limit = plan["memory_limit"] / GIB
    kept = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in plan["held"].items())
    if "failure" in plan:
        return f"  memory          unknown: the compiler fails ({plan['failure']})"
    if plan["memory"] is None:
        return f"  memory          DOES NOT FIT {limit:.0f} GiB ({kept})"
    temporary = f", temporary {plan['temporary'] / GIB:.2f}" if "temporary" in plan else ""
    fits = "" if plan["fits"] else "  DOES NOT FIT"
    return (
        f"  memory          {plan['memory'] / GIB:.2f} of {limit:.0f} GiB ({kept}{temporary}){fits}"
    )


def _parts(plan: Mapping) -> list[str]:
    lines = [
        f"  {kind:15} {found['calls']:,} x, {found['bytes'] / GIB:.3f} GiB, "
        f"{found['seconds'] * 1e3:.1f} ms"
        for kind, found in plan.get("collectives", {}).items()
    ]
    lines += [
        f"  kernel          {name} x {found['calls']}: {found['seconds'] * 1e3:.1f} ms"
        for name, found in plan.get("kernels", {}).items()
    ]
    return lines + [
        f"  TOO LOW BY      {plan[key]} {key.replace('_', ' ')}"
        for key in ("unknown_loops", "unestimated_operations")
        if plan.get(key)
    ]


def ranking(plans: Sequence[Mapping]) -> str:
    """A line for each plan that has a time, the fastest first."""
    timed = [plan for plan in plans if plan["fits"] and "seconds" in plan]
    lines = ["tokens/s per device   MFU   memory GiB   rows   topology and mesh"]
    for plan in sorted(timed, key=speed, reverse=True):
        lines.append(
            f"{speed(plan):19,.0f} {plan['mfu']:5.1%} {plan['memory'] / GIB:12.1f} "
            f"{plan['rows']:6}   {plan['topology']}: {_mesh(plan)}"
        )
    lost = len(plans) - len(timed)
    return "\n".join([*lines, f"{lost} that do not fit"] if lost else lines)


def draw(record: Mapping, path: Path) -> None:
    """Bars of the step's parts, per token, for every plan that fits."""
    import matplotlib.pyplot as plt

    plans = [plan for plan in record["plans"] if plan["fits"] and "seconds" in plan]
    figure, axis = plt.subplots(figsize=(10, 1.2 + 0.5 * len(plans)), layout="constrained")
    labels = []
    for place, plan in enumerate(plans):
        scale = 1e6 * plan["devices"] / plan["tokens_per_update"]  # device microseconds a token
        kernels = plan["compute_seconds"] - plan["xla_seconds"]
        left = 0.0
        for part, color in (
            (plan["xla_seconds"], "tab:blue"),
            (kernels, "tab:orange"),
            (plan["collective_seconds"], "tab:gray"),
        ):
            axis.barh(place, part * scale, left=left, color=color)
            left += part * scale
        labels.append(f"{plan['config']}, {plan['topology']}, {_mesh(plan)}, T {plan['length']:,}")
    axis.set_yticks(range(len(plans)), labels)
    axis.invert_yaxis()
    axis.set_xlabel("predicted device time per token (us)")
    for name, color in (("XLA", "tab:blue"), ("kernels", "tab:orange"), ("links", "tab:gray")):
        axis.barh(0, 0, color=color, label=name)
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def speed(plan: Mapping) -> float:
    """Tokens a second of one device."""
    return plan["tokens_per_second"] / plan["devices"]


def _mesh(plan: Mapping) -> str:
    sizes = [f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1]
    return ", ".join(sizes) or "one device"
