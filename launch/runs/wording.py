"""Numbers in the words of a message. Torch-free."""

from __future__ import annotations


def counted(number: int, thing: str, things: str | None = None) -> str:
    """Write a number of things for people: 1 rank, 2 ranks.

    Args:
        number: how many there are.
        thing: the word for one of them.
        things: the word for several, where it is not the other with an s.
    """
    return f"{number} {thing if number == 1 else things or f'{thing}s'}"


def how_often(times: int) -> str:
    """Write how often something happened: once, 2 times."""
    return "once" if times == 1 else f"{times} times"
