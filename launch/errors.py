"""Errors meant for the person at the keyboard. Torch-free; imported by everything, imports nothing of ours."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec

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


class RenamedOption(argparse.Action):
    """Accept the old spelling of a renamed option for one release, and print the new one on standard error.

    For an option, or for a positional argument that became one (``nargs="?"``, and ``parse_intermixed_args``, since
    ``parse_args`` takes an optional positional for absent as soon as an option stands before it)::

        parser.add_argument("--to", action=RenamedOption, new="--output", type=Path)
    """

    def __init__(self, option_strings: list[str], dest: str, new: str, **kwargs: Any) -> None:
        # No line in --help, and no default: the new option has both.
        super().__init__(option_strings, dest, default=None if not option_strings else argparse.SUPPRESS, **kwargs)
        self.help = argparse.SUPPRESS
        self.new = new

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Store the value under the new option's name."""
        if values is None:  # argparse calls an optional positional that was not given, too
            return
        print(f"{option or self.dest.upper()} is {self.new} now; this release takes both", file=sys.stderr, flush=True)
        setattr(namespace, self.new.lstrip("-").replace("-", "_"), values)
