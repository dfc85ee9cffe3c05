"""``python -m launch.move PATH...``: move runs that are pending for too long to the next candidate of their placement.

A launcher with launch.detach=true leaves this command running. ``launch.slurm.failover`` makes the moves.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from rich.console import Console

import gpt_launch.own_names  # noqa: F401
from launch.errors import CommandParser, refusing
from launch.runs.find import add_paths, find_runs, plain_console
from launch.runs.folder import RunFolder, deny_others_writing
from launch.slurm.client import SlurmError
from launch.slurm.failover import fail_over, promised
from launch.slurm.status import adopt_found, find_run_statuses, poll

POLL_S = 1.0
LONGEST_POLL_S = 60.0


def move(folders: Sequence[RunFolder], console: Console) -> None:
    """Move each run to the next candidate of its placement whenever it has been pending for too long.

    A run is ignored if it has only one possible candidate, and no time after which it is given up. Returns when all
    other runs are over.
    """
    placed = [(point, plan.placement) for point in find_run_statuses(folders) if (plan := promised(point)) is not None]
    placed = [(point, placement) for point, placement in placed if placement.is_watched]
    points = [point for point, _ in placed]
    # A tenth of the shortest time between two moves.
    shortest_s = min((6 * placement.retry_interval_min for _, placement in placed), default=0.0)
    with suppress(SlurmError):  # The first poll below reports the error.
        if poll(points, retries=1) is None:
            adopt_found(points, by="launch.move")
    said = False
    while True:
        problem = poll(points, retries=1)
        points = [point for point in points if not point.is_over]
        if not points:
            console.print("all runs are over")
            return
        problem = problem or fail_over(points, console)
        if problem is not None and not said:
            console.print(f"{problem}\nasking again until Slurm answers")
        said = problem is not None
        time.sleep(min(LONGEST_POLL_S, max(POLL_S, shortest_s)))


@refusing
def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 the runs are over, 2 there is no such run, 130 stopped by Ctrl-C.

    Ctrl-C leaves the runs where they are.
    """
    parser = CommandParser(
        prog="python -m launch.move",
        description="Move waiting runs to the next candidate of their cluster.placement, until they are over. "
        "python -m launch does so itself while it watches; with launch.detach=true it leaves this command running.",
    )
    add_paths(parser)
    args = parser.parse_intermixed_args(arguments)
    deny_others_writing()
    try:
        move(find_runs(args.paths), plain_console())
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
