"""Sizes as they are typed: ``8,16,32``, or with an ellipsis ``8,16,...,4096``. Owns the grammar."""

from __future__ import annotations

from launch.errors import ConfigError

MOST = 64
"""Sizes of one projection: more rows than anybody reads are a mistyped step."""


def parse_sizes(text: str) -> list[int]:
    """Numbers of nodes, ascending, without doubles.

    An ellipsis goes on as the two numbers before it: by their ratio where the second is a multiple of the first, else
    by their difference. After one number it doubles.

    Raises:
        ConfigError: no such list.
    """
    words = [word.strip() for word in text.split(",")]
    sizes: list[int] = []
    for index, word in enumerate(words):
        if word in ("...", "…"):
            last = words[index + 1] if index + 1 < len(words) else ""
            if not sizes or not last.isdecimal() or int(last) <= sizes[-1]:
                raise refuse(text)
            sizes += between(sizes, int(last))
        elif word.isdecimal() and int(word) > 0:
            sizes.append(int(word))
        else:
            raise refuse(text)
        if len(sizes) > MOST:
            raise refuse(text, f"at most {MOST} sizes")
    return sorted(set(sizes))


def between(before: list[int], last: int) -> list[int]:
    """The sizes that an ellipsis stands for, without ``last``."""
    factor, step = 2, 0
    if len(before) > 1 and before[-1] > before[-2]:
        factor, rest = divmod(before[-1], before[-2])
        step = before[-1] - before[-2] if rest else 0
    found: list[int] = []
    size = before[-1]
    while len(found) <= MOST:
        size = size + step if step else size * factor
        if size >= last:
            break
        found.append(size)
    return found


def refuse(text: str, expected: str = "numbers of nodes: 8,16,32, or with an ellipsis 8,16,...,4096") -> ConfigError:
    """Return the refusal of what is no list of sizes."""
    return ConfigError(f"--nodes {text}", expected, "--nodes 8,16,...,4096")
