"""Arguments of a script as a user types them, as the config keeps them, and as the program reads them. Torch-free."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

from launch.errors import ConfigError
from launch.runs.overrides import RANK_VALUES
from launch.runs.ranges import closest
from launch.runs.wrong_values import in_shell, quoted

PLACEHOLDER = re.compile(r"%\{(\w+)\}")
REFERENCE = re.compile(r"(?<!\\)\$\{(\w+)\}")
BRACES = re.compile(r"(?<![$%\\])\{(\w+)\}")
"""A name in braces without the sign that makes it a reference."""
PATH = re.compile(r"([$%]\{\w+\}|[\w./=:@,+-])*")
"""Rest of a word that holds nothing but a value of the run, or a path with one."""
ESCAPED = re.compile(r"\\(\{(?:" + "|".join(RANK_VALUES) + r")\})")


class Style(Enum):
    """Spelling of ``script.options``: ``--key=value`` for argparse and the like, or ``key=value`` for Hydra."""

    argparse = "argparse"
    hydra = "hydra"


def split_args(key: str, args: Any) -> list[str]:
    """Arguments as a list, from a string as a shell would split it or from a list.

    Raises:
        ConfigError: a quote is not closed, or it is neither.
    """
    if args is None:
        return []
    if isinstance(args, list):
        refuse_nested(key, args, "a text, or a flat list of texts and numbers", [*flat(args)])
        return [str(arg) for arg in args]
    if isinstance(args, dict):
        raise ConfigError(f"{key}={args}", "a string as a shell would split it, or a list", f"{key}='\"--lr 3e-4\"'")
    try:
        return shlex.split(str(args))
    except ValueError as error:
        raise ConfigError(
            f"{key}={args}: {str(error)[:1].lower()}{str(error)[1:]}",
            "arguments as a shell would split them, every quote closed",
            f"{key}='\"--lr 3e-4\"'",
        ) from error


def flat(values: Sequence[Any]) -> Iterator[Any]:
    """The elements of lists in lists, one after another; a mapping is written as JSON, and null is left out."""
    for value in values:
        if isinstance(value, list):
            yield from flat(value)
        elif value is not None:
            yield json.dumps(value) if isinstance(value, Mapping) else value


def refuse_nested(key: str, values: Sequence[Any], expected: str, meant: Sequence[Any] | str) -> None:
    """Raise ConfigError where the elements of a list are not texts and numbers; proposes what was ``meant``."""
    for value in values:
        if value is None or isinstance(value, list | Mapping):
            what = "null" if value is None else "a list" if isinstance(value, list) else "a mapping"
            typed = json.dumps(list(values), separators=(",", ":"), default=str)
            text = quoted(meant) if isinstance(meant, str) else f"[{','.join(quoted(str(one)) for one in meant)}]"
            raise ConfigError(f"{key}={typed}, with {what} in the list", expected, in_shell(key, text))


def check_options(options: Mapping[str, Any], style: Style, prefix: str = "script.options.") -> None:
    """Raise ConfigError where an option has a list that arguments of this style cannot say."""
    for name, value in options.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            check_options(value, style, f"{key}.")
        elif isinstance(value, list) and style is Style.argparse:
            expected = "a flat list, which is written with commas; a text, or script.style=hydra, for what has more"
            refuse_nested(key, value, expected, json.dumps(value, separators=(",", ":"), default=str))


def hydra_text(value: Any) -> str:
    """A value inside a list as Hydra's grammar reads it."""
    if isinstance(value, list):
        return f"[{','.join(map(hydra_text, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{hydra_text(inner)}' for key, inner in value.items())}}}"
    if value is None:
        return "null"
    return quoted(value) if isinstance(value, str) else str(value)


def written_options(options: Mapping[str, Any], style: Style, prefix: str = "") -> Iterator[str]:
    """Arguments by name as the program reads them; a mapping in them is written by dotted names."""
    for name, value in options.items():
        key = f"{prefix}{name}"
        if value is None:
            continue
        if isinstance(value, Mapping):
            yield from written_options(value, style, f"{key}.")
            continue
        dashes = "--" if style is Style.argparse else ""
        if value == "":
            yield f"{dashes}{key}"
            continue
        if isinstance(value, list):
            text = ",".join(map(str, value)) if style is Style.argparse else hydra_text(value)
        else:
            text = str(value)
        yield f"{dashes}{key}={text}"


def require_known(key: str, value: Any, keys: Collection[str]) -> None:
    """Raise ConfigError where ``${NAME}`` in arguments is neither a value of the run nor a key at the root.

    ``{NAME}`` of such a value is refused too where a word is made of it: a text with other braces is the program's.
    """
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in inner:
        require_known(key, item, keys)
    if not isinstance(value, str):
        return
    for name in REFERENCE.findall(value):
        if name not in RANK_VALUES and name not in keys:
            meant = (closest(name.lower(), RANK_VALUES) or RANK_VALUES)[0]
            raise ConfigError(
                f"${{{name}}} in {key}",
                f"one of {', '.join(f'${{{known}}}' for known in RANK_VALUES)}",
                f"${{{meant}}} in its place, or \\${{{name}}} for these signs themselves",
            )
    for word in value.split():
        names = BRACES.findall(word)
        if names and {*names} <= {*RANK_VALUES} and {*names} != {"name"} and PATH.fullmatch(BRACES.sub("", word)):
            raise ConfigError(
                f"{word} in {key}, which the program would get as it stands",
                "a value of the run as ${...}, in quotes for the shell",
                f"${{{names[0]}}} in its place, or \\{{{names[0]}}} for these signs themselves",
            )


def keep_values(value: Any) -> Any:
    """Arguments in which ``${run_dir}`` and the like, known only when a rank starts, wait for it as ``%{run_dir}``."""
    if isinstance(value, str):
        return re.sub(r"\$\{(" + "|".join(RANK_VALUES) + r")\}", r"%{\1}", value)
    if isinstance(value, list):
        return [keep_values(item) for item in value]
    if isinstance(value, dict):
        return {key: keep_values(item) for key, item in value.items()}
    return value


def fill(text: str, values: Mapping[str, Any]) -> str:
    """Put the values of a run into an argument, in place of ``%{run_dir}`` and the like."""
    filled = PLACEHOLDER.sub(lambda found: str(values.get(found.group(1), found.group(0))), text)
    return ESCAPED.sub(r"\1", filled)
