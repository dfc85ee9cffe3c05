"""Arguments of a script as a user types them, as the config keeps them, and as the program reads them. Torch-free."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from typing import Any

from launch.errors import ConfigError
from launch.runs.ranges import closest

VALUES = ("nodes", "ranks_per_node", "world_size", "run_dir", "checkpoint_dir", "attempt", "name")
"""Names that ``${...}`` in arguments may stand for."""
PLACEHOLDER = re.compile(r"%\{(\w+)\}")
REFERENCE = re.compile(r"(?<!\\)\$\{(\w+)\}")


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
            joined = ",".join(map(str, value))
            text = joined if style is Style.argparse else f"[{joined}]"
        else:
            text = str(value)
        yield f"{dashes}{key}={text}"


def require_known(key: str, value: Any, keys: Collection[str]) -> None:
    """Raise ConfigError where ``${NAME}`` in arguments is neither a value of the run nor a key at the root."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in inner:
        require_known(key, item, keys)
    for name in REFERENCE.findall(value) if isinstance(value, str) else ():
        if name not in VALUES and name not in keys:
            meant = (closest(name, VALUES) or VALUES)[0]
            raise ConfigError(
                f"${{{name}}} in {key}",
                f"one of {', '.join(f'${{{known}}}' for known in VALUES)}",
                f"${{{meant}}} in its place, or \\${{{name}}} for these signs themselves",
            )


def keep_values(value: Any) -> Any:
    """Arguments in which ``${run_dir}`` and the like, known only when a rank starts, wait for it as ``%{run_dir}``."""
    if isinstance(value, str):
        return re.sub(r"\$\{(" + "|".join(VALUES) + r")\}", r"%{\1}", value)
    if isinstance(value, list):
        return [keep_values(item) for item in value]
    if isinstance(value, dict):
        return {key: keep_values(item) for key, item in value.items()}
    return value
