"""``python -m launch.move PATH...``: move runs that are pending for too long to the next candidate of their placement.

A launcher leaves this command behind for runs that continue without it. ``launch.slurm.failover`` makes the moves.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console

import gpt_launch.own_names  # noqa: F401
from launch.errors import CommandParser, refusing
from launch.runs.files import deny_others_writing
from launch.runs.find import find_runs
from launch.runs.folder import RunFolder
from launch.slurm.adoption import adopt_found
from launch.slurm.client import SlurmError
from launch.slurm.failover import PlacementFailover, is_watched, promised
from launch.slurm.status import RunStatus, find_run_statuses, poll

POLL_S = 1.0
LONGEST_POLL_S = 60.0


def move(folders: Sequence[RunFolder], console: Console) -> None:
    """Move what waits until all runs are over."""
    points = list(filter(is_watched, find_run_statuses(folders)))
    adopt_waiting(points)
    failover, said = PlacementFailover(console), False
    while True:
        problem = poll(points, retries=1)
        points = [point for point in points if not point.is_over]
        if not points:
            console.print("nothing waits any more", highlight=False)
            return
        problem = problem or failover.step(points)
        if problem is not None and not said:
            console.print(f"{problem}\nasking again until Slurm answers", highlight=False, markup=False)
        said = problem is not None
        time.sleep(poll_s(points))


def adopt_waiting(points: Sequence[RunStatus]) -> None:
    """Enter jobs that wait and that no event log names. Where Slurm does not answer, the first poll says so."""
    with suppress(SlurmError):
        if poll(points, retries=1) is None:
            adopt_found(points, by="launch.move")


def poll_s(points: Sequence[RunStatus]) -> float:
    """Seconds between two polls: a fraction of the shortest patience."""
    shortest = min((plan.placement.retry_interval_min for point in points if (plan := promised(point))), default=1.0)
    return min(LONGEST_POLL_S, max(POLL_S, 60 * shortest / 10))


@refusing
def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 the runs are over, 2 there is no such run, 130 stopped by Ctrl-C: they stay where they are."""
    parser = CommandParser(
        prog="python -m launch.move",
        description="Move runs that wait to the next candidate of their cluster.placement, until they are over. "
        "python -m launch does so itself while it watches; with launch.detach=true it leaves this command behind.",
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a run folder, or a folder with runs in it")
    args = parser.parse_intermixed_args(arguments)
    deny_others_writing()
    try:
        move(find_runs(args.paths), Console(soft_wrap=True))
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
