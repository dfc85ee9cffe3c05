"""Errors that a user can fix, keys of a config with their ranges, and numbers as text in messages. Imports no torch."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import functools
import math
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, ParamSpec, cast, get_args, get_origin, get_type_hints

from gpt_launch import as_typed

P = ParamSpec("P")


@dataclass(frozen=True)
class Problem:
    """A problem with its remedy, in three lines. Refusals, warnings, findings and advice all have this form.

        problem = Problem("nodes=64 in partition gpu", "at most 32 nodes", "nodes=32")
        raise ConfigError(problem.found, problem.expected, problem.fix)  # exit status 2, and nothing is submitted
        print(problem.warning())      # the command continues
        print(problem)                # the three lines

    Code that needs more fields, such as a level or the name of a check, defines a subclass.

    Attributes:
        found: values that are wrong, or a state that costs time or work.
        expected: values or state that would be right.
        fix: command or override to type next, ready to be copied.
    """

    found: str
    expected: str
    fix: str

    def __str__(self) -> str:
        return f"found: {self.found}\nexpected: {self.expected}\ntype next: {self.fix}"

    def warning(self) -> str:
        """Return the problem as one line, for a command that continues."""
        return f"warning: {self.found}; expected: {self.expected}; type {self.fix}"


class ConfigError(ValueError):
    """Raised for a problem that ends the command, before anything is started or overwritten."""

    def __init__(self, found: str, expected: str, fix: str) -> None:
        super().__init__(found, expected, fix)  # pickle calls the class with these three values again.
        self.problem = Problem(found, expected, fix)
        self.found, self.expected, self.fix = found, expected, fix

    def __str__(self) -> str:
        return str(self.problem)


class RepeatedFailureError(RuntimeError):
    """Raised by a rank if a failure comes again, although the ranks have gone back to a checkpoint several times.

    The launcher does not start the program again.
    """


class CommandFailedError(RuntimeError):
    """Raised if a command cannot do its work. ``status`` is the exit status of the command."""

    status = 1


def refusing(main: Callable[P, int]) -> Callable[P, int]:
    """Decorate the ``main`` of a command: print its errors on standard error, and return an exit status.

    The status is 2 for a ConfigError, and for a file that cannot be read or written. A CommandFailedError has its own
    status. Other exceptions are not caught.
    """

    @functools.wraps(main)
    def with_refusals(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except CommandFailedError as error:
            print(as_typed(str(error)), file=sys.stderr, flush=True)
            return error.status
        except ConfigError as error:
            refusal = error
        except OSError as error:
            if error.filename is None or error.errno not in FILE_ERRORS:
                raise
            path = Path(str(error.filename))
            seen = path if path.exists() else path.parent  # If a file could not be written, its folder shows why.
            refusal = ConfigError(
                f"{seen}: {error.strerror}",
                "a file that this user may read and write, on a filesystem that works and has room",
                f"ls -ld {shlex.quote(str(seen))}, and the same command after a change; or another folder, if it has "
                "--out",
            )
        print(as_typed(str(refusal)), file=sys.stderr, flush=True)
        return 2

    return with_refusals


FILE_ERRORS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE),
    *(errno.EISDIR, errno.ENOTDIR),
)
"""Error numbers that come from a file or filesystem, not from a mistake in this code."""


class CommandParser(argparse.ArgumentParser):
    """Parser of a command's arguments that raises ConfigError if they are wrong."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.prog = as_typed(self.prog)

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError with ``message``, the usage in one line, and the option that the user probably meant."""
        usage = " ".join(self.format_usage().split()).removeprefix("usage: ")
        head, _, unknown = message.partition("unrecognized arguments: ")
        if head:
            raise ConfigError(message, usage, f"{self.prog} --help")
        known = [word for action in self._actions for word in action.option_strings]
        likely = [match for word in unknown.split() for match in difflib.get_close_matches(word, known, n=1)]
        fix = f"{self.prog} ... {likely[0]}" if likely else f"{self.prog} --help"
        raise ConfigError(f"{unknown}, which {self.prog} does not take", usage, fix)


# Range checks that schemas share, and similar names for error messages. Does not import torch.


EXAMPLES = {"optim.lr": "0.001", "optim.min_lr": "0.0001", "checkpoint.keep_last": "1, or null to keep all"}
"""Key -> value that an error message proposes for this key. For a key that is absent here, the message proposes 1.

For the keys here, 1 would be a bad value: training would fail, or the user rarely means 1.
"""


def require_positive(key: str, value: float) -> None:
    """Raise ConfigError unless ``value`` is above zero and finite."""
    if not 0 < value < float("inf"):
        raise ConfigError(f"{key}={value}", "a finite number above 0", f"{key}={EXAMPLES.get(key, '1')}")


def require_range(key: str, value: float, low: float, high: float) -> None:
    """Raise ConfigError unless ``low <= value <= high``."""
    if not low <= value <= high:
        bound = f"at least {low:g}" if high == float("inf") else f"a number from {low:g} to {high:g}"
        raise ConfigError(f"{key}={value}", bound, f"{key}={low:g}")


def closest(name: str, choices: Iterable[str]) -> list[str]:
    """Return up to three of ``choices`` that look or begin like ``name``, best first, for error messages."""
    known = sorted(choices)
    alike = [choice for choice in known if choice.lower() == name.lower() != choice]
    alike = alike or difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return alike or [choice for choice in known if choice[:3].lower() == name[:3].lower()][:3]


# Keys of a config: description, unit and range of each field of a schema, and the check of the range. A schema is a
# dataclass whose fields are made by ``key``, or are such dataclasses themselves.


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
    """Return the range of a key as text, such as ``1 to 8``; "" if every number is valid.

    ``metadata`` is that of a dataclass field that ``key`` made.
    """
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
        prefix: beginning of the names of the dataclass's keys, such as ``cluster.``.
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
    """Return dotted key -> type, for all keys and all groups of a schema. The type of an Optional[X] is X."""
    found, hints = dict[str, Any](), get_type_hints(schema)
    for field in dataclasses.fields(schema):
        inner, hint = field.default_factory, hints[field.name]
        optional = NoneType in get_args(hint)
        found[field.name] = next(one for one in get_args(hint) if one is not NoneType) if optional else hint
        if dataclasses.is_dataclass(inner):
            found |= {f"{field.name}.{name}": kind for name, kind in key_types(cast(type, inner)).items()}
    return found


def schema_keys(schema: type) -> tuple[str, ...]:
    """Return the dotted names of all keys and all groups of a schema."""
    return tuple(key_types(schema))


@cache
def free_keys(schema: type) -> tuple[str, ...]:
    """Return the dotted keys whose value is a mapping with names that the user chooses."""
    return tuple(name for name, kind in key_types(schema).items() if get_origin(kind) is dict)


@cache
def list_elements(schema: type) -> dict[str, tuple[str, ...]]:
    """Return dotted key -> names of an element's fields, for the keys whose value is a list of dataclasses."""
    lists = {name: get_args(kind)[0] for name, kind in key_types(schema).items() if get_origin(kind) is list}
    return {
        name: tuple(field.name for field in dataclasses.fields(element))
        for name, element in lists.items()
        if dataclasses.is_dataclass(element)
    }


# Numbers and times for people.


def counted(number: int, thing: str, things: str | None = None) -> str:
    """Return a number of things as text for people: 1 rank, 2 ranks.

    Args:
        number: number of things.
        thing: singular.
        things: plural; None for the singular with an s.
    """
    return f"{number} {thing if number == 1 else things or f'{thing}s'}"


def ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers as short text, such as ``0, 2-5``."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def duration_text(seconds: float) -> str:
    """Return a time in seconds as text for people: 350 ms, 12.3 s, 4 min 05 s, 2 h 10 min."""
    if seconds < 99.95:
        return f"{1000 * seconds:.3g} ms" if 0 < seconds < 0.9995 else f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
