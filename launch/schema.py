"""Keys of a config: what a field of a schema says of itself, and the check of its range.

A schema is a dataclass whose fields are made by ``key``, or are dataclasses of that kind. Torch-free.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from types import NoneType
from typing import Any, get_args, get_type_hints

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
        meaning: description, for people.
        unit: of a number.
        least: smallest valid number.
        above: bound below all valid numbers.
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
    """Raise ConfigError for the first number of a config that is infinite or out of the range of its key.

    Args:
        config: a dataclass whose fields were made by ``key``; nested ones, and lists of them, are checked too.
        prefix: of the names of its keys, such as ``cluster.``.
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


def schema_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Yield all dotted keys of a schema, groups included."""
    for field in dataclasses.fields(schema):
        yield prefix + field.name
        inner = field.default_factory
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            yield from schema_keys(inner, f"{prefix}{field.name}.")


def free_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Yield the keys whose value is a mapping with keys of the user's choice."""
    for field in dataclasses.fields(schema):
        inner = field.default_factory
        if inner is dict:
            yield prefix + field.name
        elif isinstance(inner, type) and dataclasses.is_dataclass(inner):
            yield from free_keys(inner, f"{prefix}{field.name}.")


def list_elements(schema: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Yield the dotted keys whose value is a list of dataclasses, each with that dataclass."""
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        inner, arguments = field.default_factory, get_args(hints[field.name])
        element = arguments[0] if inner is list and arguments else None
        if isinstance(element, type) and dataclasses.is_dataclass(element):
            yield f"{prefix}{field.name}", element
        elif isinstance(inner, type) and dataclasses.is_dataclass(inner):
            yield from list_elements(inner, f"{prefix}{field.name}.")


def field_of(schema: type, name: str) -> tuple[Any, Any]:
    """Return the type of a dotted key, without its None, and its default; None twice if the schema has neither."""
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
