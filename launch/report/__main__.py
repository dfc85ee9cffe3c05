"""``python -m launch.report FOLDER``: show the scaling table of a sweep and write the report next to its runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from launch.errors import refusing
from launch.report import build, show, write


@refusing
def main(arguments: Sequence[str] | None = None) -> int:
    """Make the report; returns the exit status: 0, or 2 where there is nothing to report or it cannot be compared."""
    parser = argparse.ArgumentParser(prog="python -m launch.report", description="The scaling report of a sweep.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a folder with runs in it, or one run folder")
    folder = parser.parse_args(arguments).folder
    table = build(folder)
    show(table, Console())
    for path in write(table, folder):
        print(f"written: {path}")
    print(f"dashboard: tensorboard --logdir {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
