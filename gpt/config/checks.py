"""Checks that parts of the schema share, and a cache of pure functions of a model config. Torch-free."""

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

# Checks that the parts of the schema share, and numbers for their messages. Torch-free.


def nearest_divisor(number: int, wish: int) -> int:
    """Find the divisor of ``number`` that is nearest to ``wish``, for error messages."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (abs(d - wish), d))


def divisors(number: int) -> list[int]:
    """List the divisors of a number, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def check_custom_name(key: str, name: str, ours: Iterable[str]) -> None:
    """Raise ConfigError unless ``name`` can stand for something of the user's; imports nothing.

    Either ``package.module:attribute``, or an entry point of the group ``gpt.<last word of key>``.
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


# Results of pure functions of a model's config, kept for as long as the process lives. Torch-free.
#
# A search for layouts asks for the same few models thousands of times. Configs can be changed, so results are kept by
# the values of their fields.


P = ParamSpec("P")
Result = TypeVar("Result")
KEPT = 4096
"""Results of one function for one model that are kept; they are forgotten together."""
MODELS = 64
"""Models of which results are kept."""
MISSING = object()
VALUES = attrgetter(*(field.name for field in fields(ModelConfig) if field.name != "options"))
"""Values of all fields that can be hashed."""


def cached_by_model(
    function: Callable[Concatenate[ModelConfig, P], Result],
) -> Callable[Concatenate[ModelConfig, P], Result]:
    """Keep the results of a pure function of a model's config and other arguments, which can be hashed.

    The result is the same object each time: it must not be changed.
    """
    known: dict[object, dict[object, Result]] = {}
    latest: tuple[object, dict[object, Result]] = (None, {})

    @wraps(function)
    def cached(model: ModelConfig, *args: P.args, **kwargs: P.kwargs) -> Result:
        nonlocal latest
        values, of_model = VALUES(model), repr(model.options) if model.options else ""
        if latest[0] != (values, of_model):  # a comparison of the same objects, where hashing forty values takes longer
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
