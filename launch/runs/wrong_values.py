"""Refusals of a value that its key cannot take: what a key takes is read from the schema. Torch-free."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Sequence
from enum import Enum
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from launch.errors import ConfigError
from launch.runs.overrides import NOT_IN_POINT, typed_key
from launch.runs.ranges import EXAMPLES, closest

NUMBER = re.compile(r"[+-]?[\d_]*\.?[\d_]*(e[+-]?\d+)?|[+-]?inf|nan", re.IGNORECASE)
"""Numbers, and what else Hydra's grammar of overrides takes for one."""
PLAIN = re.compile(r"[\w./+-]+", re.ASCII)
"""Values that Hydra's grammar of overrides reads without quotes."""


def wrong_value(found: str, key: str, schema: type, overrides: Sequence[str] = ()) -> ConfigError:
    """Say which values ``key`` takes, and propose one of them: what was meant, the default, or a pattern."""
    key = key.partition("[")[0]  # of an element, the list
    typed = next((arg for arg in overrides if typed_key(arg) == key), found).removeprefix("++")
    value = typed.partition("=")[2]
    kind, default = field_of(schema, key)
    if isinstance(kind, type) and issubclass(kind, Enum):
        options = [option.name for option in kind]
        likely = (closest(value, options) or options)[0]
        return ConfigError(typed, f"one of {', '.join(options)}", f"{key}={likely}")
    if kind is bool:
        return ConfigError(typed, "true or false", f"{key}={meant_bool(value)}")
    if kind in (int, float):
        usual = default if type(default) in (int, float) else EXAMPLES.get(key, "1" if kind is int else "0.1")
        fix = f"{key}={in_unit_of(key, value) or (whole(value) if kind is int else None) or usual}"
        if len(several := points_of_range(key, value) or elements(value)) > 1:
            fix = f"python -m launch -m {key}={','.join(several)}"
        return ConfigError(typed, "a whole number" if kind is int else "a number", fix)
    inner = get_args(kind)[0] if get_origin(kind) is list else None
    if isinstance(inner, type) and issubclass(inner, Enum):
        options = [option.name for option in inner]
        alike = dict.fromkeys(next(iter(closest(word, options)), options[0]) for word in elements(value) or options[:1])
        return ConfigError(typed, f"a list of {', '.join(options)}", in_shell(key, f"[{','.join(alike)}]"))
    if get_origin(kind) is list:
        return ConfigError(typed, "a list", listed(key, value))
    if get_origin(kind) is dict:
        return ConfigError(typed, f"keys of your own below {key}, each with its value", f"{key}.NAME=VALUE")
    if kind is str and (meant := ",".join(elements(value))):
        return ConfigError(typed, "one text", in_shell(key, quoted(meant)))
    return ConfigError(typed, "a text" if kind is str else "a value that fits", f"the same without {typed}")


def field_of(schema: type, key: str) -> tuple[Any, Any]:
    """Type of a dotted key, without its None, and its default; None twice where the schema does not tell."""
    kind: Any = schema
    default: Any = None
    for name in key.split("."):
        if not dataclasses.is_dataclass(kind) or not isinstance(kind, type):
            return None, None
        field = next((field for field in dataclasses.fields(kind) if field.name == name), None)
        if field is None:
            return None, None
        hint = get_type_hints(kind)[name]
        optional = NoneType in get_args(hint)
        kind = next(one for one in get_args(hint) if one is not NoneType) if optional else hint
        default = None if field.default is dataclasses.MISSING else field.default
    return kind, default


def could_take(key: str, value: str, schema: type) -> bool:
    """Tell whether a key may take a value as it was typed, of a sweep all of them: False for words where a number is
    expected, or a choice of others."""
    kind, _ = field_of(schema, key)
    several = {word.strip() for word in value.split(",")} - {"null", "VALUE"}
    if kind in (int, float):
        return all(re.fullmatch(NUMBER, word) for word in several)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return several <= kind.__members__.keys()
    return kind is not bool or several <= {"true", "false"}


def meant_bool(value: str) -> str:
    """Return the truth value that a mistyped one begins like."""
    return "false" if value.strip().lower()[:1] in ("f", "n", "0") or value.lower() == "off" else "true"


def listed(key: str, value: str) -> str:
    """Write a single value as the list that its key takes."""
    return in_shell(key, f"[{','.join(quoted(word) for word in words(key, value))}]")


def words(key: str, value: str) -> list[str]:
    """Elements that were meant by a single value: the words of a command, as a shell would split it, else the value."""
    try:
        return shlex.split(value) if key.rpartition(".")[2] == "command" else [value]
    except ValueError:  # a quote that is never closed
        return [value]


def elements(value: str) -> list[str]:
    """Elements of a list as it is typed, or the value alone; nothing of an empty list or null."""
    bare = value.strip()
    if bare in ("null", "[]", "{}"):
        return []
    return [word.strip() for word in bare[1:-1].split(",")] if bare[:1] in ("[", "{") else [bare]


RANGE = re.compile(r"(\d{1,9})(?:\.\.|-)(\d{1,9})")
"""A range of whole numbers, as ``1..4`` or ``1-4``."""
SIZES = ("nodes", "ranks_per_node")
"""Keys of which a scaling sweep takes each value twice as large as the one before."""
MOST_POINTS = 12
"""Points of a sweep that a refusal lists."""


def points_of_range(key: str, value: str) -> list[str]:
    """Values that were meant by a range such as ``1..4``; none where there are too many, or the key makes no points."""
    found = RANGE.fullmatch(value)
    if found is None or key.partition(".")[0] in NOT_IN_POINT:
        return []
    first, last = int(found[1]), int(found[2])
    if key in SIZES and first:
        return [str(first << power) for power in range((last // first).bit_length())]
    return [] if last - first >= MOST_POINTS else [str(number) for number in range(first, last + 1)]


def whole(value: str) -> str | None:
    """Whole number above 0 that was meant by a number with a point or an exponent, as ``1e3``; None for others."""
    try:
        number = float(value)
    except ValueError:
        return None
    return str(int(number)) if 1 <= number < 1e15 and number.is_integer() else None


def quoted(value: str) -> str:
    """Quote a value for Hydra's grammar of overrides, where it needs that."""
    if PLAIN.fullmatch(value):
        return value
    bare = value.strip("\"'").replace("\\", "\\\\").replace('"', '\\"')
    return f'"{bare}"'


def in_shell(key: str, value: str) -> str:
    """Write an override as it is typed into a shell."""
    return f"{key}={value}" if PLAIN.fullmatch(value) else shlex.quote(f"{key}={value}")


def in_unit_of(key: str, value: str) -> str | None:
    """Convert a time such as ``1h`` or ``1:30:00``, or a size such as ``64G``, to the unit that the name of a key ends
    with; None for anything else."""
    if size := re.fullmatch(r"(\d+) ?G(B|iB)?", value, re.IGNORECASE):
        return size.group(1) if key.endswith(("_gb", "_gib")) else None
    if clock := re.fullmatch(r"(\d+):(\d\d):(\d\d)", value):
        hours, minutes, seconds = map(int, clock.groups())
        value = f"{3600 * hours + 60 * minutes + seconds}s"
    units = {"s": 1, "min": 60, "m": 60, "h": 3600, "hours": 3600, "d": 86400}
    told = re.fullmatch(r"(\d+)(s|min|m|h|d)", value)
    unit = units.get(key.rpartition("_")[2])
    if told is None or unit is None:
        return None
    return str(max(1, int(told.group(1)) * units[told.group(2)] // unit))
