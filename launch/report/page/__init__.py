"""The report as one HTML page: no script, nothing from elsewhere, light and dark.

Owns what is on the page and in which order: in ten seconds how well the run scaled, what was lost to what, and which
rank is slow; then the figures behind it. Must not compute figures.
"""

from __future__ import annotations

import math

from launch.report.page.html import escape
from launch.report.page.points import points_section
from launch.report.page.scaling import scaling_section
from launch.report.page.style import CSS
from launch.report.page.tables import notes_section, table_sections
from launch.report.page.tiles import tiles
from launch.report.page.times import interruptions_section, losses_section, times_section
from launch.report.table import ScalingTable

__all__ = ["page"]


def page(table: ScalingTable, reload_s: float | None = None) -> str:
    """Write the whole page of a report; with ``reload_s`` a browser loads it again after so many seconds."""
    reload = "" if reload_s is None else f'<meta http-equiv="refresh" content="{max(1, math.ceil(reload_s))}">\n'
    headings = [heading for heading, _ in table.sections()]
    title = headings[0] if len(headings) == 1 else table.title
    also = "".join(f"<p>{escape(heading)}</p>" for heading in headings) if len(headings) > 1 else ""
    chosen = f"<p>{escape(table.selection.text)}</p>" if table.selection.text else ""
    sections = [
        tiles(table),
        scaling_section(table),
        losses_section(table),
        times_section(table),
        interruptions_section(table),
        points_section(table),
        *table_sections(table),
        notes_section(table),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{reload}"
        f"<title>{escape(title)}</title>\n<style>\n{CSS}</style>\n</head>\n<body>\n"
        f'<header><h1>{escape(title)}</h1>{also}<p class="quiet">{escape(table.conditions)}</p>{chosen}</header>\n'
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )
