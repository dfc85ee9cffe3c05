"""Ranks and step times of each point, one at a time: a reader chooses by radio buttons, which need no script."""

from __future__ import annotations

from launch.report.details import RunDetail
from launch.report.numbers import percent, seconds
from launch.report.page.chart import histogram
from launch.report.page.heat import heat_map
from launch.report.page.html import escape, grid, section
from launch.report.page.tables import html_table
from launch.report.table import ScalingTable

MAX_BINS = 40
MARKED = ("50 %", "95 %", "99 %")
SHOWN_WITHOUT = "Fewer than two ranks recorded the same steps, so none is compared with the others."


def points_section(table: ScalingTable) -> str:
    """Show the ranks and the step times of one point at once, first of the one with the slowest rank."""
    if not table.details:
        return ""
    first = chosen(table.details)
    inputs, panes, rules = [], [], []
    for index, found in enumerate(table.details):
        checked = " checked" if found is first else ""
        inputs.append(
            f'<input type="radio" name="point" id="p{index}"{checked}><label for="p{index}">'
            f"{escape(found.label)}</label>"
        )
        panes.append(f'<div class="pane" id="d{index}">{_pane(found)}</div>')
        rules.append(f"#p{index}:checked ~ #d{index} {{ display: block; }}")
    style = f"<style>{' '.join(rules)}</style>"
    return section("Ranks and step times", style, f'<div class="tabs">{"".join(inputs)}{"".join(panes)}</div>')


def chosen(details: tuple[RunDetail, ...]) -> RunDetail:
    """Choose the point that is shown first: with the slow rank that costs most, else the last one with ranks."""
    slow = [(row.share, found) for found in details for row in found.slowest if row.time.is_slow or row.time.waits_long]
    with_ranks = [found for found in details if found.rank_times is not None] or list(details)
    return max(slow, key=lambda pair: pair[0])[1] if slow else with_ranks[-1]


def _pane(found: RunDetail) -> str:
    ranks = f'<p class="quiet">{SHOWN_WITHOUT}</p>'
    if found.rank_times is not None:
        net = "" if found.rank_times.is_net else " Waiting in collectives was not recorded, and hides a slow rank."
        lead = f'<p class="quiet">Own time of each rank above the median of all, over the run.{net}</p>'
        ranks = f"<h3>Ranks over the run</h3>{lead}{heat_map(found, found.rank_times)}"
    marks = dict(found.percentiles_s)
    bins = min(MAX_BINS, max(5, len(found.step_times_s) // 5))
    drawn = histogram(found.step_times_s, [(f"{name}: {seconds(marks[name])}", marks[name]) for name in MARKED], bins)
    times = f'<div class="card"><h3>Step times after warm-up</h3>{drawn}</div>'
    return grid([f'<div class="card">{ranks}</div>', times]) + _slowest(found)


def _slowest(found: RunDetail) -> str:
    if not found.slowest:
        return ""
    waits = any(row.time.data_wait_s is not None for row in found.slowest)
    head = ["rank", "host", "own time", "above the median of the others", "of the step time"]
    cells = [
        [str(row.time.rank), row.host or "unavailable", seconds(row.time.own_s)]
        + [f"{1000 * row.time.excess_s:.3g} ms", percent(row.share)]
        + ([seconds(row.time.data_wait_s)] if waits else [])
        for row in found.slowest
    ]
    numbers = [True, False, True, True, True, True]
    return "<h3>Slowest ranks</h3>" + html_table([*head, "data wait"] if waits else head, cells, numbers)
