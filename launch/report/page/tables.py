"""Tables and notes of the page, with the same cells as in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from launch.report.gpu_tables import gpu_cells, host_cells
from launch.report.loss_tables import loss_cells, units
from launch.report.page.html import escape, section
from launch.report.table import ScalingTable
from launch.report.views import columns, times_cells


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[bool]) -> str:
    """Write a table; on a narrow screen it scrolls by itself."""
    kinds = [' class="n"' if is_number else "" for is_number in numbers]
    top = "".join(f"<th{kind}>{escape(cell)}</th>" for cell, kind in zip(head, kinds, strict=False))
    body = "".join(
        f"<tr>{''.join(f'<td{kind}>{escape(cell)}</td>' for cell, kind in zip(row, kinds, strict=False))}</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def table_sections(table: ScalingTable) -> list[str]:
    """Write the table of each kind of scaling, and that of times and costs."""
    shown = columns(table)
    head, numbers = [column.title.replace("\n", " ") for column in shown], [column.number for column in shown]
    found = [
        section(heading, html_table(head, [[column.cell(row) for column in shown] for row in rows], numbers))
        for heading, rows in table.sections()
    ]
    cells = times_cells(table)
    if cells:
        found.append(section("Time and cost", html_table(cells[0], cells[1:], [False] + [True] * (len(cells[0]) - 1))))
    for unit, rows in units(table.rows):
        cells = loss_cells(rows)
        heading = f"Interruptions, in {unit}-hours"
        found.append(section(heading, html_table(cells[0], cells[1:], [False] + [True] * (len(cells[0]) - 1))))
    gpus, hosts = gpu_cells(table), host_cells(table.gpus[0]) if len(table.gpus) == 1 else []
    for heading, cells in (("GPUs", gpus), ("GPUs by host", hosts)):
        if cells:
            found.append(section(heading, html_table(cells[0], cells[1:], [False] + [True] * (len(cells[0]) - 1))))
    return found


def notes_section(table: ScalingTable) -> str:
    """Write what the figures do and do not say."""
    items = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
    return section("Notes", f"<ul>{items}</ul>" if items else "")
