"""A report that is made again while its runs go on.

Owns when it ends. Must not know what a report says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from rich.console import Console

from launch.report.points import State
from launch.report.table import ScalingTable
from launch.report.views import show
from launch.report.write import ALL_FILES, write
from launch.runs.report_files import ReportFile

WATCH_S = 30.0
ENDED = frozenset(map(str, (State.FINISHED, State.FAILED, State.STOPPED, State.CANCELLED, State.BUDGET_EXCEEDED)))


def watch(
    make: Callable[[], ScalingTable], interval_s: float, console: Console, files: Collection[ReportFile] = ALL_FILES
) -> None:
    """Show and write a report every ``interval_s`` seconds, until all its runs have ended or the user interrupts.

    A run that was killed without a word looks as if it went on. While the report is watched its page asks the browser
    to load it again as often.
    """
    try:
        while True:
            table = make()
            is_over = all(row.state in ENDED for row in table.rows)
            if console.is_terminal:
                console.clear()
            show(table, console)
            written = write(table, reload_s=None if is_over else interval_s, files=files)
            told = f"wrote {', '.join(path.name for path in written)} in {table.selection.folders[0]}"
            console.print(told, highlight=False, markup=False)  # brackets in a path are no markup
            if is_over:
                return
            console.print(f"again in {interval_s:g} s; Ctrl-C ends this, and leaves the runs alone")
            time.sleep(interval_s)
    except KeyboardInterrupt:
        write(make(), reload_s=None, files=files)
