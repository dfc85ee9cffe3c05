"""The last part of a refusal, tried before it is made: what to type next must not be refused in its turn.

Must not know what is checked: whoever refuses hands in the check. Torch-free.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence

from launch.errors import ConfigError
from launch.runs.overrides import typed_key

Check = Callable[[list[str]], object]
"""Raises ConfigError where a run with these overrides cannot work."""
SEPARATOR = ", or "
"""Between the alternatives of a fix."""
DEEPEST = 3
"""Refusals in a row that are followed before an alternative is given up."""
OVERRIDE = re.compile(r"[a-z]\w*([./]\w+)*=\S.*", re.DOTALL)
PLACEHOLDER = re.compile(r"[A-Z]+|\.\.\.")
"""Values that stand for one of the user's: VALUE, FILE, N."""


def with_checked_fix(error: ConfigError, overrides: Sequence[str], check: Check) -> ConfigError:
    """Return the refusal of ``overrides`` with a fix that ``check`` does not refuse, as far as it can be tried.

    An alternative that is refused for something else is completed by what that asks for; one that leads nowhere is left
    out. Words, and commands, are kept as they are.
    """
    if not refuses(check, list(overrides), error.found):  # the check sees another config than the refused one
        return error
    settled = [settle(alternative, overrides, check, (error.found,)) for alternative in error.fix.split(SEPARATOR)]
    by_words = {frozenset(alternative.split()): alternative for alternative in settled[::-1] if alternative}
    kept = [alternative for alternative in dict.fromkeys(settled) if alternative and alternative in by_words.values()]
    if not kept:
        return ConfigError(
            error.found, error.expected, f"{error.fix.split(SEPARATOR)[0]}, and what the next refusal then asks for"
        )
    return ConfigError(error.found, error.expected, SEPARATOR.join(kept))


def refuses(check: Check, overrides: list[str], found: str) -> bool:
    """True where ``check`` refuses ``overrides`` for what was ``found``."""
    try:
        check(overrides)
    except ConfigError as error:
        return error.found == found
    return False


def settle(alternative: str, overrides: Sequence[str], check: Check, before: tuple[str, ...]) -> str | None:
    """Return an alternative, completed until ``check`` takes it, or untried where it is no list of overrides.

    None where it leads nowhere. ``before`` are the findings of the refusals that led to it.
    """
    words = read_overrides(alternative)
    if words is None:
        return alternative
    try:
        check(replace_typed(overrides, words))
    except ConfigError as error:
        if error.found in before or len(before) == DEEPEST:
            return None
        for further in error.fix.split(SEPARATOR):
            more = read_overrides(further)
            if more is not None:
                joined = shlex.join(replace_typed(words, more))
                if settled := settle(joined, overrides, check, (*before, error.found)):
                    return settled
        return None
    return alternative


def read_overrides(alternative: str) -> list[str] | None:
    """Return the overrides that an alternative consists of; None where it holds words or placeholders."""
    try:
        words = shlex.split(alternative)
    except ValueError:  # an apostrophe in a word
        return None
    fits = all(OVERRIDE.fullmatch(word) and not PLACEHOLDER.fullmatch(word.split("=", 1)[1]) for word in words)
    return words if words and fits else None


def replace_typed(overrides: Sequence[str], words: Sequence[str]) -> list[str]:
    """Return overrides with others in place of those of the same keys."""
    keys = {typed_key(word) for word in words}
    return [*(override for override in overrides if typed_key(override) not in keys), *words]
