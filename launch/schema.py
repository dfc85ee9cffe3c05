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
        config: dataclass whose fields were made by ``key``. Nested ones, and lists of them, are checked too.
        prefix: prefix of the names of its keys, such as ``cluster.``.
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


def schema_keys(schema: type) -> tuple[str, ...]:
    """Return all dotted keys of a schema, groups included."""
    return _keys_below(schema, "")


@cache
def _keys_below(schema: type, prefix: str) -> tuple[str, ...]:
    keys: list[str] = []
    for field in dataclasses.fields(schema):
        keys.append(prefix + field.name)
        if dataclasses.is_dataclass(field.default_factory):
            keys += _keys_below(cast(type, field.default_factory), f"{prefix}{field.name}.")
    return tuple(keys)


@cache
def free_keys(schema: Any) -> tuple[str, ...]:
    """Return the dotted keys whose value is a mapping with names that the user chooses."""
    return tuple(name for name in schema_keys(schema) if get_origin(field_of(schema, name)[0]) is dict)


@cache
def list_elements(schema: type) -> dict[str, type]:
    """Return dotted key -> dataclass of the elements, for the keys whose value is a list of dataclasses."""
    kinds = {name: field_of(schema, name)[0] for name in schema_keys(schema)}
    lists = {name: get_args(kind)[0] for name, kind in kinds.items() if get_origin(kind) is list}
    return {name: cast(type, element) for name, element in lists.items() if dataclasses.is_dataclass(element)}


@cache
def field_of(schema: type, name: str) -> tuple[Any, Any]:
    """Return type (X for Optional[X]) and default of a dotted key; (None, None) if the schema has no such key."""
    kind: Any = schema
    default: Any = None
    for part in name.split("."):
        if not dataclasses.is_dataclass(kind) or not isinstance(kind, type):
            return None, None
        field = next((field for field in dataclasses.fields(kind) if field.name == part), None)
        if field is None:
            return None, None
        hint = get_type_hints(kind)[part]
        kind = next(one for one in get_args(hint) if one is not NoneType) if NoneType in get_args(hint) else hint
        default = None if field.default is dataclasses.MISSING else field.default
    return kind, default
