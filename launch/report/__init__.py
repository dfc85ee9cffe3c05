"""Scaling reports from run folders: a table, figures, a page, and a dashboard in TensorBoard. Does not import torch.

Example: ``write(build(Path("outputs/quick_test")))``.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from launch.report.goodput import PARTS
from launch.report.notes import percent
from launch.report.selection import Selection, select
from launch.report.steps import LOSSES
from launch.report.table import Row, RunDetail, ScalingTable, build, tabulate_selection
from launch.report.text import (
    LEFT,
    csv_text,
    efficiency,
    json_text,
    markdown_text,
    part_tables,
    parts_csv_text,
    point_tables,
    show,
    slowest_table,
)
from launch.runs.folder import ReportFile, write_atomically
from launch.runs.overrides import point_name

if TYPE_CHECKING:
    from launch.runs.event_files import EventWriter


__all__ = [
    "Row",
    "ScalingTable",
    "Selection",
    "build",
    "select",
    "show",
    "show_and_write",
    "tabulate_selection",
    "write",
]

ALL_FILES = frozenset(ReportFile)


def write(table: ScalingTable, reload_s: float | None = None, files: Collection[ReportFile] = ALL_FILES) -> list[Path]:
    """Write the files of a report. They replace the files of an earlier report.

    The files of a sweep's report are ``scaling.*``. They are written into two folders. In the folder of the points, the
    report of the next sweep replaces them. In the folder of the sweep's record, such as ``sweeps/0001``, they remain.
    The files of one run's report are ``summary.*``. The files of a report of all runs in a folder are ``all_runs.*``.

    Args:
        table: the report.
        reload_s: seconds after which a browser reloads the page; None for never.
        files: kinds of files to write. Files of other kinds stay unchanged.

    Returns:
        Paths of what was written, in this order: each file in the first folder; each further folder, which has the same
        files; the folder of the TensorBoard run.
    """
    selection = table.selection
    pictures: dict[str, bytes] = {}
    # Importing matplotlib and jinja2 takes a second, which --help and refusals should not need.
    if not {ReportFile.png, ReportFile.svg, ReportFile.tensorboard}.isdisjoint(files):
        from launch.report.figures import draw_report

        pictures = draw_report(table)
    figure = f"\n![{table.title}]({selection.stem}.png)\n" if ReportFile.png in files else "\n"
    made: dict[str, str | bytes] = {".md": markdown_text(table) + figure, ".csv": csv_text(table)}
    made |= {f".{kind}": drawn for kind, drawn in pictures.items()} | {".json": json_text(table)}
    if ReportFile.html in files:
        made[".html"] = page(table, reload_s)
    made["_parts.csv"] = parts_csv_text(table)
    contents = {
        selection.stem + end: text.encode() if isinstance(text, str) else text
        for end, text in made.items()
        if ReportFile(end.rpartition(".")[2]) in files
    }
    for folder in selection.folders:
        for name, content in contents.items():
            write_atomically(folder / name, content)
    written = [selection.folders[0] / name for name in contents] + selection.folders[1:]
    if ReportFile.tensorboard in files and selection.dashboard is not None:
        written.append(write_dashboard(table, pictures["png"], selection.dashboard))
    return written


def show_and_write(table: ScalingTable, console: Console, files: Collection[ReportFile] = ALL_FILES) -> None:
    """Print a report, write its files of the kinds ``files``, and print their paths.

    Also prints the commands for the other reports of the folder.
    """
    show(table, console)
    for path in write(table, files=files):
        console.print(f"wrote {path}")
    if len(table.rows) > 1 and table.selection.dashboard is not None and ReportFile.tensorboard in files:
        console.print(f"dashboard: tensorboard --logdir {table.selection.folder}")
    for line in table.selection.others():
        console.print(line)


# The page: a first line of tiles with figures, and the content of ``page.html.j2`` below.


MAX_FALLS = 6
"""Largest number of waterfall panels of lost efficiency on the page.

The points with the most ranks have a panel. The table of losses has all points.
"""
MAX_RUNS = 8
"""Largest number of runs whose ranks and step times are drawn, because each drawing takes some 50 ms and 20 kB."""


def page(table: ScalingTable, reload_s: float | None = None) -> str:
    """Return the HTML of a report's page. A browser reloads the page every ``reload_s`` seconds; never if None."""
    # Importing matplotlib and jinja2 takes a second, which --help and refusals should not need.
    from jinja2 import StrictUndefined, Template

    from launch.report import figures

    points = point_tables(table)
    text = Path(__file__).with_name("page.html.j2").read_text()
    template = Template(text, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    return template.render(
        table=table,
        reload_s=None if reload_s is None else max(1, math.ceil(reload_s)),
        title=points[0].heading if len(points) == 1 else table.title,
        palette=figures.PALETTE,
        left=LEFT,
        tiles=tiles(table),
        scaling=figures.scaling_panels(table),
        bars=[*figures.loss_panels(table)[:MAX_FALLS], *figures.times_panels(table)],
        runs=shown_runs(table.details),
        run_panels=figures.run_panels,
        slowest=slowest_table,
        inline_svg=figures.inline_svg,
        points=points,
        parts=part_tables(table),
    )


def shown_runs(details: Sequence[RunDetail]) -> list[RunDetail]:
    """Return at most ``MAX_RUNS`` runs to draw: first those with the slowest ranks, then those with the most ranks."""

    def worth(found: RunDetail) -> tuple[float, int]:
        slow = [row.share for row in found.slowest if row.time.is_slow]
        return max(slow, default=0.0), len(found.rank_times.ranks if found.rank_times else ())

    return sorted(details, key=worth, reverse=True)[:MAX_RUNS]


# The first line of the page: scaling, the largest loss, slow ranks, and cost.


MAX_SERIES = 3
"""Largest number of series for which the page has a tile with the efficiency of the largest point."""
GOOD, POOR = 0.9, 0.7
"""A tile is green if its efficiency or goodput is at least ``GOOD``, and red if it is below ``POOR``."""


@dataclass(frozen=True)
class Tile:
    """A figure at the top of the page: its name, its value and a sentence. ``kind`` is ``good``, ``bad`` or empty."""

    name: str
    value: str
    text: str
    kind: str = ""


def tiles(table: ScalingTable) -> list[Tile]:
    """Return the tiles of the first line of the page."""
    return [*_scaling(table), *_losses(table), *_slow_rank(table), *_goodput(table)]


def _largest(table: ScalingTable) -> list[Row]:
    """Return one row for each series: its largest point with an efficiency.

    If no point of a series has an efficiency, the row is the largest point with a speedup. A series without speedups
    has no row.
    """
    found: dict[tuple[str | None, str], Row] = {}
    for row in table.rows:
        before = found.get((row.scaling, row.series))
        if row.speedup not in (None, 1) and not (before and before.efficiency and row.efficiency is None):
            found[row.scaling, row.series] = row
    return list(found.values())


def _scaling(table: ScalingTable) -> Iterator[Tile]:
    for row in _largest(table)[:MAX_SERIES]:
        text = f"speedup {row.speedup:.2f} on {row.ranks} ranks"
        if row.efficiency_low is not None and row.efficiency_high is not None:
            text += f"; 95 % interval {100 * row.efficiency_low:.1f} to {100 * row.efficiency_high:.1f} %"
        kind = "" if row.efficiency is None else _kind(row.efficiency)
        yield Tile(f"Efficiency at {row.label}", efficiency(row), text, kind)


def _losses(table: ScalingTable) -> Iterator[Tile]:
    rows = [row for row in _largest(table) if row.losses]
    if not rows:
        return
    row = max(rows, key=lambda row: row.ranks or 0)
    (phase, share), *others = sorted(row.losses.items(), key=lambda part: -part[1])
    name = f"Most lost at {row.label}"
    if share <= 0:
        yield Tile(name, "nothing", "no phase takes more than its part", "good")
    else:
        more = "".join(f"; {LOSSES[other]} {100 * lost:.1f} %" for other, lost in others[:2])
        yield Tile(name, LOSSES[phase], f"{100 * share:.1f} % of the step{more}")


def _slow_rank(table: ScalingTable) -> Iterator[Tile]:
    for run in shown_runs(table.details)[:1]:
        slow = [row for row in run.slowest if row.time.is_slow]
        if slow:
            row, on = slow[0], "" if slow[0].host is None else f"on {slow[0].host}, "
            more = f"; {len(slow) - 1} more" if len(slow) > 1 else ""
            text = f"{on}+{1000 * row.time.excess_s:.3g} ms, {percent(row.share)} of the step time, {run.label}{more}"
            yield Tile("Slow rank", f"rank {row.time.rank}", text, "bad")
        elif run.rank_times is not None:
            is_net = run.rank_times.is_net
            how = "own times agree within their spread" if is_net else "as far as step times show it"
            yield Tile("Ranks slow throughout", "none", how, "good")


def _goodput(table: ScalingTable) -> Iterator[Tile]:
    rows = [row for row in table.rows if row.goodput is not None]
    if not rows:
        return
    worst = min(rows, key=lambda row: row.goodput or 0.0)
    spent = {part: worst.parts_s.get(part, 0.0) for part in PARTS if part not in ("steps", "fewer", "waiting")}
    part = max(spent, key=lambda name: spent[name])
    whole = sum(worst.parts_s.values())  # As in the bars, the wait for nodes is included.
    most = f"{PARTS[part]} {percent(spent[part] / whole)} of the whole time" if whole else ""
    of = f" at {worst.label}" if len(rows) > 1 else ""
    yield Tile(f"Goodput{of}", percent(worst.goodput), most, _kind(worst.goodput or 0.0))


def _kind(share: float) -> str:
    return "good" if share >= GOOD else "bad" if share < POOR else ""


# Output for TensorBoard: the dashboard of a sweep, and the summary of one run.


RUN, RUN_OF_ONE = "Scaling", "Summary"
IDEAL = "ideal"
"""Name of the subfolder with the ideal curves, in the folder of a TensorBoard run or of one of its series."""
SUFFIX = ".scaling"  # marks the event files that a report owns


def write_dashboard(table: ScalingTable, png: bytes, folder: Path) -> Path:
    """Write the TensorBoard run of a report: ``Scaling`` for several points, ``Summary`` for one. Returns its folder.

    An earlier TensorBoard run of the report is replaced. The new files are complete before the old files are removed.
    When TensorBoard reads a new file, it drops the values of the old files. So a reader always sees a whole report,
    even after a crash. A TensorBoard with ``--load_fast=false`` must be restarted, because it waits forever at a
    removed file.

    ``png`` is the picture of the report.
    """
    from launch.runs.event_files import EventWriter  # loads TensorBoard

    root = folder / (RUN if len(table.rows) > 1 else RUN_OF_ONE)
    old = list(root.rglob(f"events.out.tfevents.*{SUFFIX}"))
    with tempfile.TemporaryDirectory() as scratch:
        name = "scaling" if len(table.rows) > 1 else "summary"
        with EventWriter(Path(scratch), suffix=SUFFIX) as whole:
            whole.text(f"{name}/table", markdown_text(table))
            whole.image(f"{name}/figure", png)  # The picture of one run includes the heat map of its ranks.
            if len(table.rows) > 1:
                _write_curves(table, whole, Path(scratch))
        for path in sorted(Path(scratch).rglob("events.out.tfevents.*")):
            write_atomically(root / path.relative_to(scratch), path.read_bytes())
    for path in old:
        path.unlink()
    for left in sorted({path.parent for path in old}, reverse=True):
        if not any(left.iterdir()):
            left.rmdir()
    return root


def _write_curves(table: ScalingTable, whole: EventWriter, root: Path) -> None:
    """Write charts over the number of ranks. Each series has its own curves.

    TensorBoard's step is the number of ranks. If no throughput is known, the chart of the throughput is left out.

    Args:
        table: report of several points.
        whole: open writer of the event file in ``root``.
        root: folder of the TensorBoard run.
    """
    from launch.runs.event_files import Curve, EventWriter

    per_s = f"{table.unit}_per_s"
    shown = {
        f"{table.unit.capitalize()} per second": (per_s, f"{per_s}_low", f"{per_s}_high"),
        "Efficiency": ("efficiency",),
        "Step time in seconds": ("step_time_s", "step_time_s_low", "step_time_s_high"),
    }
    if all(row.throughput is None for row in table.rows):
        del shown[f"{table.unit.capitalize()} per second"]
    charts = {title: Curve(*(f"scaling/{name}" for name in names)) for title, names in shown.items()}
    names = [*chain(*shown.values()), "loss"]
    whole.layout({"Scaling: measured and ideal over the number of ranks": charts})
    for series in dict.fromkeys(row.series for row in table.rows):
        rows = [row for row in table.rows if row.series == series and row.ranks is not None]
        folder = root / point_name([series], exclude=()) if series else root
        # A second file in a folder would make TensorBoard forget the first file.
        with EventWriter(folder, suffix=SUFFIX) if series else nullcontext(whole) as writer:
            for row in rows:
                values = {name: getattr(row, name.replace(per_s, "throughput")) for name in names}
                _write_point(writer, row, values)
        if any(row.throughput_ideal is not None for row in rows):
            with EventWriter(folder / IDEAL, suffix=SUFFIX) as writer:
                for row in rows:
                    # The band around a line has no width, but TensorBoard requires one.
                    band = dict.fromkeys((name for name in names if "_per_s" in name), row.throughput_ideal)
                    _write_point(writer, row, band | {"efficiency": None if row.efficiency is None else 1.0})


def _write_point(writer: EventWriter, row: Row, values: Mapping[str, float | None]) -> None:
    for name, value in values.items():
        if value is not None:
            writer.scalar(f"scaling/{name}", value, step=row.ranks or 0)
