"""``python -m launch.report FOLDER``: show the scaling table of a sweep and write the report next to its runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from launch.errors import CommandParser, refusing
from launch.report import select, show_and_write, tabulate_selection
from launch.runs.files import deny_others_writing
from launch.runs.find import runs_labelled


@refusing
def main(arguments: Sequence[str] | None = None) -> int:
    """Make the report; returns the exit status: 0, or 2 where there is nothing to report or it cannot be compared."""
    parser = CommandParser(
        prog="python -m launch.report",
        description="The scaling report of a sweep, or the summary of a run. Of a folder with several sweeps it shows "
        "the one that was typed last, and lists the others.",
    )
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="a folder with runs in it, one run folder, or a label"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--sweep", type=int, metavar="N", help="an earlier sweep of the folder")
    which.add_argument("--all", action="store_true", help="all runs of the folder, of whatever command")
    typed = parser.parse_args(arguments)
    deny_others_writing()
    folder = typed.folder if typed.folder.exists() else next(iter(runs_labelled(typed.folder)), typed.folder)
    table = tabulate_selection(select(folder, typed.sweep, every=typed.all))
    show_and_write(table, Console(soft_wrap=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
