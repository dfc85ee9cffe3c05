"""Files of measurements, which a command writes and a cost model reads thousands of times: once each, or refused.

Must not know what was measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from launch.errors import ConfigError

Measured = TypeVar("Measured")


def read_measured(
    path: Path, key: str, parse: Callable[[Any], Measured], form: int, command: str, options: str = ""
) -> Measured:
    """Read a file of measurements, or take what was read before where it has not changed since.

    Args:
        path: of the file.
        key: key or option that names it, for refusals.
        parse: makes values of the JSON document; raises ValueError, KeyError, TypeError or AttributeError.
        form: number of the document's format.
        command: writes such a file with ``--output``.
        options: what the command needs besides.

    Raises:
        ConfigError: no such file, or something else in it.
    """
    try:
        read: Measured = _read(path, path.stat().st_mtime_ns, parse, form)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        is_option = key.startswith("-")
        raise ConfigError(
            f"{key}{' ' if is_option else '='}{path}: {_said(error)}",
            f"a file that {command} has written",
            f"{' '.join(filter(None, (command, options)))} --output {path}, or "
            + (f"leave {key} out" if is_option else f"{key}=null"),
        ) from error
    return read


def _said(error: Exception) -> str:
    """Say for people what is wrong with a file."""
    match error:
        case OSError():
            return error.strerror or type(error).__name__
        case json.JSONDecodeError():
            return f"no JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        case UnicodeDecodeError():
            return "no text"
        case KeyError():
            return f"{error} is missing in it"
        case TypeError() | AttributeError():
            return "it holds other kinds of values than such a file"
        case _:
            return str(error)


@lru_cache(maxsize=16)
def _read(path: Path, _changed: int, parse: Callable[[Any], Any], form: int) -> Any:
    document = json.loads(path.read_text())
    if document["format"] != form:
        raise ValueError(f"format {document['format']}, and this is the launcher of format {form}")
    return parse(document)
