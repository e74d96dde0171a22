"""Rotary positions in config.json, in both spellings that transformers has had.

Older files have rope_theta and rope_scaling (and rope_local_base_freq for windows, in Gemma 3),
newer ones rope_parameters, which Gemma 3 nests by the type of layer.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from swr_jax.nn.convert_families import is_positive
from swr_jax.nn.language_model import LanguageModelConfig
from swr_jax.nn.rotary import RopeScaling

FULL, SLIDING = "full_attention", "sliding_attention"
_SCALING_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


class Rope(NamedTuple):
    """The options of a `LanguageModelConfig` that rotary positions are made of."""

    rope_base: float
    rope_scaling: RopeScaling | None
    rope_local_base: float | None


def read_rope(
    fields: Mapping[str, Any], *, base: float, local_base: float | None, problems: list[str]
) -> Rope:
    """Read the positions that config.json describes; what no model has goes to `problems`.

    Args:
      fields: what config.json holds.
      base: where it names no base.
      local_base: the same for windows; None: they have no base of their own.
      problems: where a value is not one that is known, a sentence is added.
    """
    new, old = fields.get("rope_parameters"), fields.get("rope_scaling")
    if new is not None and old is not None and new != old:
        problems.append(f"rope_parameters={new!r}, rope_scaling={old!r}; there must be one of them")
    name = "rope_scaling" if new is None else "rope_parameters"
    given = old if new is None else new
    if given is not None and not isinstance(given, Mapping):
        problems.append(f"{name}={given!r}; it must be an object, or null")
        given = None
    given = {} if given is None else given
    base = fields.get("rope_theta", base)
    if local_base is None:
        base, scaling = _read_one(name, given, base, fields, problems)
        return Rope(base, scaling, None)
    local_base = fields.get("rope_local_base_freq", local_base)
    if new is None:
        base, scaling = _read_one(name, given, base, fields, problems)
        return Rope(base, scaling, float(local_base))
    if given and not {*given} <= {FULL, SLIDING}:
        problems.append(f"{name}={given!r}; it must have one object for {FULL}, one for {SLIDING}")
        return Rope(base, None, local_base)
    full, local = given.get(FULL) or {}, given.get(SLIDING) or {}
    base, scaling = _read_one(f"{name}.{FULL}", full, base, fields, problems)
    local_base, local_scaling = _read_one(f"{name}.{SLIDING}", local, local_base, fields, problems)
    if local_scaling is not None:
        problems.append(f"{name}.{SLIDING}={local!r}; windows here have no scaled positions")
    return Rope(base, scaling, local_base)


def _read_one(
    name: str,
    given: Mapping[str, Any],
    base: float,
    fields: Mapping[str, Any],
    problems: list[str],
) -> tuple[float, RopeScaling | None]:
    base = given.get("rope_theta", base)
    if not is_positive(base):
        problems.append(f"rope_theta={base!r}; it must be above 0")
        base = 1.0
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in _SCALING_FIELDS:
        problems.append(f"{name} has rope_type={kind!r}; it must be {', '.join(_SCALING_FIELDS)}")
        return float(base), None
    if given.get("partial_rotary_factor", 1) != 1:
        problems.append(
            f"partial_rotary_factor={given['partial_rotary_factor']!r}; it must be 1: all features "
            "of a head are rotated here"
        )
    known = {*_SCALING_FIELDS[kind], "rope_theta", "rope_type", "type", "partial_rotary_factor"}
    # Written along with any type, though only some read it.
    known.add("original_max_position_embeddings")
    if unknown := sorted({*given} - known):
        problems.append(
            f"{name} has {', '.join(unknown)}, of which rope_type={kind!r} knows nothing"
        )
    if kind == "default":
        return float(base), None
    values = {field: given.get(field) for field in _SCALING_FIELDS[kind]}
    if kind == "llama3":
        for place in (given, fields):
            length = place.get("original_max_position_embeddings")
            if length is not None:
                values["original_max_position_embeddings"] = length
        if values["original_max_position_embeddings"] is None:
            values["original_max_position_embeddings"] = fields.get("max_position_embeddings")
    if missing := [
        f"{field}={value!r}" for field, value in values.items() if not is_positive(value)
    ]:
        problems.append(f"{name} has {', '.join(missing)}; it must be above 0")
        return float(base), None
    try:
        return float(base), RopeScaling(
            kind, **{_OPTIONS[field]: value for field, value in values.items()}
        )
    except ValueError as error:
        problems.append(f"{name}: {error}")
        return float(base), None


_OPTIONS = {
    "factor": "factor",
    "low_freq_factor": "low_frequency_factor",
    "high_freq_factor": "high_frequency_factor",
    "original_max_position_embeddings": "original_length",
}


def write_rope(config: LanguageModelConfig) -> dict[str, Any]:
    """Fields of config.json for a model's positions, in the older spelling, which all can read."""
    scaling = None
    if config.rope_scaling is not None:
        kind = config.rope_scaling.kind
        scaling = {"rope_type": kind} | {
            field: getattr(config.rope_scaling, _OPTIONS[field]) for field in _SCALING_FIELDS[kind]
        }
    fields = {"rope_theta": config.rope_base, "rope_scaling": scaling}
    if config.rope_local_base is not None:
        fields["rope_local_base_freq"] = config.rope_local_base
    return fields
