"""Results of pure functions of a model's config, kept for as long as the process lives. Torch-free.

A search for layouts asks for the same few models thousands of times. Configs can be changed, so results are kept by the
values of their fields.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from operator import attrgetter
from typing import Concatenate, ParamSpec, TypeVar, cast

from gpt.config.model import ModelConfig

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
