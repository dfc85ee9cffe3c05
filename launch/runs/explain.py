"""Hydra's and OmegaConf's complaints as refusals: found, expected, and what to type next. Torch-free."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import get_args, get_type_hints

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from launch.errors import ConfigError
from launch.runs.ranges import closest
from launch.runs.renamed import is_former

CONFIG_ERRORS = (HydraException, OmegaConfBaseException)


def schema_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """All dotted keys of a schema of nested dataclasses, groups included."""
    for field in dataclasses.fields(schema):
        yield prefix + field.name
        inner = field.default_factory
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            yield from schema_keys(inner, f"{prefix}{field.name}.")


def free_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Keys whose value is a mapping with keys of the user's choice."""
    for field in dataclasses.fields(schema):
        inner = field.default_factory
        if inner is dict:
            yield prefix + field.name
        elif isinstance(inner, type) and dataclasses.is_dataclass(inner):
            yield from free_keys(inner, f"{prefix}{field.name}.")


def explain(error: BaseException, schema: type) -> ConfigError:
    """Say what Hydra or OmegaConf refused: found, expected, and what to type next."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    text = "\n".join(str(e) for e in chain)
    found_key = re.search(r"full_key: (\S+)", text)
    key = found_key.group(1) if found_key else ""
    first = str(error).strip().splitlines()[0]
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        likely = closest(choice, error.options) or sorted(error.options)
        return ConfigError(f"{group}={choice}", f"one of {', '.join(sorted(error.options))}", f"{group}={likely[0]}")
    if isinstance(error, OverrideParseException):
        key, _, value = error.override.partition("=")
        fix = f"'{key}=\"{value}\"'" if value else f"{key}=VALUE"
        if value.startswith("["):
            fix = f"""'{key}=[{",".join(f'"{word.strip()}"' for word in value.strip("[]").split(","))}]'"""
        return ConfigError(
            f"{error.override}, which cannot be read", "KEY=VALUE, quoted where it holds []{}:, or =", fix
        )
    if "is not in struct" in text or "not in '" in text or "No match in the defaults list" in text:
        of_list = unknown_in_list(text, schema)
        return of_list or unknown_key(key or (re.findall(r"'([\w./+]+)'", text) or [first])[0], schema)
    if any(isinstance(e, MissingMandatoryValue) for e in chain):
        return ConfigError(f"no value for {key}", "a value", f"{key}=VALUE")
    typed = re.search(r"override (\S+)", text)
    return wrong_value(typed.group(1) if typed else first, key or "KEY", text)


def wrong_value(found: str, key: str, text: str) -> ConfigError:
    """Say which values a key takes, from OmegaConf's validation message."""
    choices = re.search(r"expected one of \[([^]]+)\]", text)
    if choices:
        return ConfigError(found, f"one of {choices.group(1)}", f"{key}={choices.group(1).split(',')[0]}")
    kind = re.search(r"could not be converted to (\w+)", text)
    names = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}
    if kind:
        expected = names.get(kind.group(1), f"a value of type {kind.group(1)}")
        example = {"Integer": "1", "Float": "0.1", "Boolean": "true"}.get(kind.group(1), "VALUE")
        return ConfigError(found, expected, f"{key}={example}")
    lines = [line for line in text.splitlines() if line.strip() and "$" not in line]
    return ConfigError(found, lines[-1] if lines else "a value that fits", f"{key}=VALUE with a value that fits")


def unknown_in_list(text: str, schema: type) -> ConfigError | None:
    """Name the keys of the elements of a list, where OmegaConf says that one of them has no such key; else None."""
    found = re.search(r"Key '([^']+)' not in '(\w+)'", text)
    for path, element in list_elements(schema):
        if found and element.__name__ == found.group(2):
            keys = [field.name for field in dataclasses.fields(element)]
            example = (closest(found.group(1), keys) or keys)[0]
            return ConfigError(
                f"unknown key {found.group(1)} in {path}",
                f"one of {', '.join(keys)}",
                f"{path}='[{{{example}: VALUE}}]'",
            )
    return None


def list_elements(schema: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Dotted keys whose value is a list of dataclasses, and that dataclass."""
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        inner, arguments = field.default_factory, get_args(hints[field.name])
        element = arguments[0] if inner is list and arguments else None
        if isinstance(element, type) and dataclasses.is_dataclass(element):
            yield f"{prefix}{field.name}", element
        elif isinstance(inner, type) and dataclasses.is_dataclass(inner):
            yield from list_elements(inner, f"{prefix}{field.name}.")


def unknown_key(key: str, schema: type) -> ConfigError:
    """Name the keys that look like the one that does not exist."""
    keys = [known for known in schema_keys(schema) if not is_former(known)]
    likely = closest(key, keys) or [k for k in keys if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    parent = key.rpartition(".")[0]
    siblings = [k for k in keys if k.rpartition(".")[0] == parent] or [k for k in keys if "." not in k]
    suggestion = f"{likely[0]}=VALUE" if likely else f"{siblings[0]}=VALUE"
    return ConfigError(f"unknown key {key}", f"one of {', '.join(siblings)}", suggestion)
