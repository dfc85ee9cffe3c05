"""Keys of a config: description, unit and range of each field of a schema, and the check of the range.

A schema is a dataclass whose fields are made by ``key``, or are such dataclasses themselves. Does not import torch.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from types import NoneType
from typing import Any, cast, get_args, get_origin, get_type_hints

from launch.errors import ConfigError


def key(
    default: Any,
    meaning: str,
    *,
    unit: str = "",
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
) -> Any:
    """Return a dataclass field for one key of a config.

        timeout_min: int = key(60, "Time limit of a job (sbatch --time).", unit="min", above=0)

    Args:
        default: value, MISSING if a file in configs/ has it, or a class that makes the value (list, dict, a dataclass).
        meaning: description of the key, for users.
        unit: unit of a number; empty if it has none.
        least: smallest valid number.
        above: lower bound, which is itself not valid.
        most: largest valid number.
    """
    metadata = {"meaning": meaning, "unit": unit, "least": least, "above": above, "most": most}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def range_text(metadata: Any) -> str:
    """Return the range of a key in words; empty if every number is valid."""
    least, above, most = (metadata.get(name) for name in ("least", "above", "most"))
    if above is not None:
        return f"above {above:g}" if most is None else f"above {above:g}, at most {most:g}"
    if least is None:
        return ""
    return f"at least {least:g}" if most is None else f"{least:g} to {most:g}"


def check_ranges(config: Any, prefix: str = "") -> None:
    """Raise ConfigError for the first number of a config that is infinite or outside the range of its key.

    Args:
        config: dataclass whose fields were made by ``key``. Nested dataclasses, and lists of them, are checked too.
        prefix: prefix of the names of the dataclass's keys, such as ``cluster.``.
    """
    for field in dataclasses.fields(config):
        name, value, known = f"{prefix}{field.name}", getattr(config, field.name), field.metadata
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{name}.")
        elif isinstance(value, list):
            for index, element in enumerate(value):
                if dataclasses.is_dataclass(element):
                    check_ranges(element, f"{name}[{index}].")
        elif type(value) in (int, float) and known:
            least, above, most = known["least"], known["above"], known["most"]
            is_low = (least is not None and value < least) or (above is not None and value <= above)
            if is_low or (most is not None and value > most) or not math.isfinite(value):
                expected = range_text(known) or "a finite number"
                fix = least if least is not None else most if most is not None else 1
                raise ConfigError(f"{name}={value}", expected, f"{name}={fix:g}")


@cache
def key_types(schema: type) -> dict[str, Any]:
    """Return dotted key -> type of all keys of a schema, groups included. The type of an Optional[X] is X."""
    found, hints = dict[str, Any](), get_type_hints(schema)
    for field in dataclasses.fields(schema):
        inner, hint = field.default_factory, hints[field.name]
        optional = NoneType in get_args(hint)
        found[field.name] = next(one for one in get_args(hint) if one is not NoneType) if optional else hint
        if dataclasses.is_dataclass(inner):
            found |= {f"{field.name}.{name}": kind for name, kind in key_types(cast(type, inner)).items()}
    return found


def schema_keys(schema: type) -> tuple[str, ...]:
    """Return all dotted keys of a schema, groups included."""
    return tuple(key_types(schema))


@cache
def free_keys(schema: type) -> tuple[str, ...]:
    """Return the dotted keys whose value is a mapping with names that the user chooses."""
    return tuple(name for name, kind in key_types(schema).items() if get_origin(kind) is dict)


@cache
def list_elements(schema: type) -> dict[str, tuple[str, ...]]:
    """Return dotted key -> names of the fields of an element, for the keys whose value is a list of dataclasses."""
    lists = {name: get_args(kind)[0] for name, kind in key_types(schema).items() if get_origin(kind) is list}
    return {
        name: tuple(field.name for field in dataclasses.fields(element))
        for name, element in lists.items()
        if dataclasses.is_dataclass(element)
    }
