"""Checks that parts of the schema share, and a cache for pure functions of a model config. Imports no torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import wraps
from importlib.metadata import entry_points
from operator import attrgetter
from typing import Concatenate, ParamSpec, TypeVar, cast

from gpt.config.model import ModelConfig
from launch.errors import ConfigError, closest

# Checks of the parts of the schema, and numbers for their messages.


def nearest_divisor(number: int, wish: int) -> int:
    """Return the divisor of ``number`` that is nearest to ``wish``, for error messages."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (abs(d - wish), d))


def divisors(number: int) -> list[int]:
    """List the divisors of a number, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def check_custom_name(key: str, name: str, ours: Iterable[str]) -> None:
    """Raise ConfigError unless ``name`` can name a part written by the user. Imports nothing.

    The name is either ``package.module:attribute``, or an entry point of the group ``gpt.<last word of key>``.
    """
    installed = entry_points(group=f"gpt.{key.rpartition('.')[2]}").names
    module, colon, attribute = name.partition(":")
    if (colon and module and attribute) or name in installed:
        return
    names = [*ours, *sorted(installed)]
    raise ConfigError(
        f"{key}={name}",
        f"one of {', '.join(names)}, or one of your own as package.module:NAME",
        f"{key}={(closest(name, names) or names)[0]}",
    )


def is_importable(package: str) -> bool:
    """Tell whether a package can be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False


# Cache of pure functions of a model config, for the life of the process.
#
# A search for layouts needs the same few models thousands of times. Configs are mutable, so the values of their fields
# are the keys of the cache.


P = ParamSpec("P")
Result = TypeVar("Result")
KEPT = 4096
"""Number of results that are kept for one function and one model. When full, all of them are dropped together."""
MODELS = 64
"""Number of models of which results are kept. When full, all of them are dropped together."""
MISSING = object()
VALUES = attrgetter(*(field.name for field in fields(ModelConfig) if field.name != "options"))
"""Values of all hashable fields."""


def cached_by_model(
    function: Callable[Concatenate[ModelConfig, P], Result],
) -> Callable[Concatenate[ModelConfig, P], Result]:
    """Cache the results of a pure function of a model config and of further hashable arguments.

    Every call returns the same object, so callers must not change the result.
    """
    known: dict[object, dict[object, Result]] = {}
    latest: tuple[object, dict[object, Result]] = (None, {})

    @wraps(function)
    def cached(model: ModelConfig, *args: P.args, **kwargs: P.kwargs) -> Result:
        nonlocal latest
        values, of_model = VALUES(model), repr(model.options) if model.options else ""
        if latest[0] != (values, of_model):  # comparing the same objects is faster than hashing forty values
            if len(known) >= MODELS:
                known.clear()
            latest = (values, of_model), known.setdefault((values, of_model), {})
        results = latest[1]
        key = (args, tuple(sorted(kwargs.items()))) if kwargs else args
        found = results.get(key, MISSING)
        if found is not MISSING:
            return cast(Result, found)
        if len(results) >= KEPT:
            results.clear()
        result = results[key] = function(model, *args, **kwargs)
        return result

    return cached
