"""``python -m launch.report FOLDER``: show the scaling table of a sweep and write the report next to its runs."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from shlex import join, quote

import gpt_launch.own_names  # noqa: F401
from launch.errors import FILE_ERRORS, CommandParser, ConfigError, refusing
from launch.report import ALL_FILES, ScalingTable, select, show, show_and_write, tabulate_selection, write
from launch.report.points import PointState
from launch.report.selection import compare_selections, writing_to
from launch.runs.find import ARCHIVE, plain_console
from launch.runs.folder import ReportFile, deny_others_writing

WATCH_S = 30.0
UNENDED = (PointState.RUNNING, PointState.NO_RECORDS, PointState.NOT_STARTED)


@refusing
def main(arguments: Sequence[str] | None = None) -> int:
    """Print and write the report. Returns the exit status: 0, or 2 if there is no run or points are not comparable."""
    parser = CommandParser(
        prog="python -m launch.report",
        description="The scaling report of a sweep, or the summary of a run. Of a folder with several sweeps it shows "
        "the newest one, and lists the other sweeps. Several folders are compared in one report, each with a "
        "baseline of its own.",
    )
    what = "a folder with runs in it, a sweep's record such as outputs/scaling/sweeps/0001, a run folder, or a label"
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help=what)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--sweep", type=int, metavar="N", help="an earlier sweep of the folder")
    which.add_argument("--all", action="store_true", help="all runs of the folder, of whatever command")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="write the files into this folder; default: next to the runs, of several folders the first",
    )
    parser.add_argument(
        "--watch",
        type=_seconds,
        nargs="?",
        const=WATCH_S,
        metavar="SECONDS",
        help=f"make it again every so many seconds ({WATCH_S:g}) until all runs have ended, or Ctrl-C; the HTML page, "
        "open in a browser, follows",
    )
    parser.add_argument(
        "--files",
        type=_files,
        default=ALL_FILES,
        metavar="KIND,KIND",
        help=f"write these files only, of {', '.join(file.value for file in ReportFile)}",
    )
    typed = parser.parse_intermixed_args(arguments)
    deny_others_writing()
    folders = typed.folders
    if len(folders) > 1 and typed.sweep is not None:
        again = " ".join(quote(str(one)) for one in (folders[0] / ARCHIVE / f"{typed.sweep:04d}", *folders[1:]))
        raise ConfigError(
            f"--sweep {typed.sweep} with {len(folders)} folders",
            "an earlier sweep by its own folder",
            f"python -m launch.report {again}",
        )
    console = plain_console()

    def make() -> ScalingTable:
        chosen = [select(folder, typed.sweep, every=typed.all) for folder in folders]
        selection = compare_selections(chosen) if len(chosen) > 1 else chosen[0]
        return tabulate_selection(selection if typed.out is None else writing_to(selection, typed.out))

    if typed.watch is None:
        table = make()
        try:
            show_and_write(table, console, typed.files)
        except OSError as error:  # Often the runs are those of another user.
            if error.errno not in FILE_ERRORS:
                raise
            again = join(["python", "-m", "launch.report", *map(str, folders), "--out"])
            found = f"{table.selection.folders[0]}: {error.strerror}"
            raise ConfigError(found, "a folder for the files of the report", f"{again} FOLDER") from error
        return 0
    try:
        while True:
            table = make()
            # A run that was killed without an event counts as running.
            is_over = not any(row.state in UNENDED for row in table.rows)
            if console.is_terminal:
                console.clear()
            show(table, console)
            # A browser reloads the page at the same interval.
            written = write(table, reload_s=None if is_over else typed.watch, files=typed.files)
            console.print(f"wrote {', '.join(path.name for path in written)} in {table.selection.folders[0]}")
            if is_over:
                break
            console.print(f"again in {typed.watch:g} s; Ctrl-C ends this, and the runs continue")
            time.sleep(typed.watch)
    except KeyboardInterrupt:
        write(make(), files=typed.files)
    return 0


def _files(text: str) -> frozenset[ReportFile]:
    """Return the kinds of files that the text of the option ``--files`` names.

    Raises argparse.ArgumentTypeError for another kind.
    """
    kinds = text.split(",")
    if unknown := sorted(set(kinds) - {file.value for file in ReportFile}):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)!r}, and not kinds of files, such as --files md,csv")
    return frozenset(map(ReportFile, kinds))


def _seconds(text: str) -> float:
    """Return the seconds that the text of the option ``--watch`` states.

    Raises argparse.ArgumentTypeError if the text is not a number above 0.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}, and not seconds above 0, such as --watch {WATCH_S:g}")
    return value


if __name__ == "__main__":
    sys.exit(main())
