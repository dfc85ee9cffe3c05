"""Errors meant for the person at the keyboard. Torch-free; imported by everything, imports nothing of ours."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")


class ConfigError(ValueError):
    """A configuration that cannot work, refused before anything is started or overwritten.

    Attributes:
        found: what the user asked for, with the values that clash.
        expected: what would have been accepted.
        fix: what to type next, ready to be copied.
    """

    def __init__(self, found: str, expected: str, fix: str) -> None:
        super().__init__(f"found: {found}\nexpected: {expected}\ntype next: {fix}")
        self.found = found
        self.expected = expected
        self.fix = fix

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.found, self.expected, self.fix)


def refusing(main: Callable[P, int]) -> Callable[P, int]:
    """Have the ``main`` of a command print a ConfigError on standard error and return 2, its exit status."""

    @functools.wraps(main)
    def with_refusals(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except ConfigError as error:
            print(error, file=sys.stderr, flush=True)
            return 2

    return with_refusals
