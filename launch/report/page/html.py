"""Pieces of the page: escaped text, elements, and coordinates that are no longer than a screen can show."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape as _escape

Attributes = dict[str, str | float]

SERIES = 7
"""Colors of series and parts that the style knows, ``--c0`` to ``--c6``."""


def escape(text: object) -> str:
    """Make text fit between tags and in attributes."""
    return _escape(str(text), quote=True)


def element(name: str, content: str = "", /, **attributes: str | float) -> str:
    """Write an element; ``content`` is markup. ``class_`` is class, and _ in a name is -."""
    told = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items())
    return f"<{name}{told}>{content}</{name}>"


def section(heading: str, *blocks: str, lead: str = "") -> str:
    """Write a section of the page; empty where no block has anything."""
    told = "".join(filter(None, blocks))
    quiet = f'<p class="quiet">{escape(lead)}</p>' if lead else ""
    return f"<section><h2>{escape(heading)}</h2>{quiet}{told}</section>" if told else ""


def number(value: float) -> str:
    """A coordinate to a hundredth, without zeros at its end."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def grid(blocks: Iterable[str]) -> str:
    """Put blocks beside each other where there is room, else below."""
    told = "".join(filter(None, blocks))
    return f'<div class="grid">{told}</div>' if told else ""


def color(index: int) -> str:
    """Return the color of a series."""
    return f"var(--c{index % SERIES})"
