"""``python -m launch.cancel PATH...``: request a save from runs, then end their jobs and processes.

Ctrl-C at the launcher does the same. The cancel is in the event log before any signal is sent, so that the end never
looks like a preemption.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from rich.console import Console

import gpt_launch.own_names  # noqa: F401
from launch.errors import CommandParser, ConfigError, refusing
from launch.runs.find import add_paths, find_runs, plain_console
from launch.runs.folder import deny_others_writing
from launch.slurm.follow import leaving_text, others_in_job, outcome_text, stop_points
from launch.slurm.jobs import ACTIVE
from launch.slurm.status import adopt_found, find_run_statuses, poll


def cancel(paths: Sequence[Path], console: Console, *, now: bool) -> bool:
    """Cancel the runs in ``paths``, and print how each ended. Returns whether all runs are over.

    With ``now``, the ranks end at once. Otherwise they have time to save.

    Raises:
        ConfigError: there is no run; or ``now`` would also end points that are not in ``paths``, but share a job with
            a run in ``paths``.
        SlurmError: Slurm does not answer.
    """
    points = find_run_statuses(find_runs(paths))
    problem = poll(points, trust_log=True)
    if problem is not None:
        raise problem
    adopt_found(points, by="launch.cancel")
    ours = [point for point in points if point.state in ACTIVE]
    for point in points:
        if point not in ours:
            why = f", {point.detail}" if point.detail else ""
            console.print(f"{point.name}: nothing to cancel, {point.state}{why}")
    for point in ours if now else ():
        others = [path for path in others_in_job(point) if path not in {one.folder.path for one in ours}]
        if others:
            raise ConfigError(
                f"--now for {point.name}, whose job has other points: {', '.join(path.name for path in others)}",
                "all points of the job, or a point that has its grace period to leave",
                f"python -m launch.cancel {quote(str(point.folder.path))}; --now with {quote(str(others[0].parent))}",
            )
    if ours and not now:
        names = ", ".join(point.name for point in ours)
        text = f"{names}: {leaving_text(ours)}; --now would not wait for that"
        console.print(text)
    stops = stop_points(ours, console, now=now)
    for stop in stops:
        console.print(outcome_text(stop))
    return all(stop.error is None for stop in stops) and all(point.state != "unknown" for point in points)


@refusing
def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 all runs are over, 1 a run could not be ended, 2 there is no such run."""
    parser = CommandParser(
        prog="python -m launch.cancel", description="Have runs save a checkpoint and leave, and wait until they have."
    )
    add_paths(parser)
    parser.add_argument("--now", action="store_true", help="end them at once, whether or not they have saved")
    args = parser.parse_intermixed_args(arguments)
    deny_others_writing()
    try:
        return 0 if cancel(args.paths, plain_console(), now=args.now) else 1
    except KeyboardInterrupt:
        print("not waiting any longer; the runs still leave", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
