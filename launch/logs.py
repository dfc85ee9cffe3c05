"""``python -m launch.logs PATH``: the output of a rank or of its agent; with ``-f``, new output as it is printed.

The command follows the log over the attempts of a run, and changes nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import gpt_launch.own_names  # noqa: F401
from launch.errors import CommandParser, ConfigError, counted, refusing
from launch.runs.find import find_runs, labels_inside
from launch.runs.folder import read_json
from launch.slurm.client import output_file
from launch.slurm.jobs import SlurmJob, agent_logs
from launch.slurm.status import RunStatus, adopt_found, find_run_statuses, outcome, poll

POLL_S = 0.5
SLURM_POLL_S = 5.0
CHUNK_BYTES = 1 << 20


class Log:
    """A log file that is read while other processes write it. The file may not exist yet."""

    def __init__(self, path: Path, title: str) -> None:
        self.path = path
        self._title = title
        self._read = 0

    def copy(self) -> None:
        """Print the text that was written since the last call. Title and path of the log come before the first text."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._read)
                while chunk := file.read(CHUNK_BYTES):
                    if not self._read:
                        print(f"==> {self._title}: {self.path} <==", file=sys.stderr, flush=True)
                    self._read += len(chunk)
                    sys.stdout.buffer.write(chunk)
        except FileNotFoundError:
            return
        sys.stdout.buffer.flush()


def add_run(parser: CommandParser) -> None:
    """Add the argument ``path``, which names one run, to the parser of a command that calls ``find_run``."""
    parser.add_argument("path", type=Path, metavar="RUN", help="a run folder, or the label of a run")


def find_run(path: Path) -> RunStatus:
    """Return the status of the one run in ``path``. Raises ConfigError if ``path`` has several runs, or none."""
    runs = find_runs([path])
    if len(runs) > 1:
        labels = labels_inside({run.path.parent for run in runs})
        names = ", ".join(labels[run.path] for run in runs[:8]) + (", ..." if len(runs) > 8 else "")
        raise ConfigError(
            f"{len(runs)} runs in {path}: {names}",
            "the folder of one",
            f"{quote(str(runs[0].path))} in place of {quote(str(path))}",
        )
    point = find_run_statuses(runs)[0]
    if point.job is None:
        adopt_found([point])
    return point


def refuse_absent_rank(point: RunStatus, rank: int) -> None:
    """Raise ConfigError if a run does not have the rank, by its plan and by the logs of its attempts."""
    size = read_json(point.folder.plan).get("world_size")
    if isinstance(size, int) and not 0 <= rank < size and newest(point, rank) is None:
        raise ConfigError(
            f"--rank {rank} of a run with {counted(size, 'rank')}",
            f"0 to {size - 1}",
            f"python -m launch.logs {quote(str(point.folder.path))} --rank {min(max(rank, 0), size - 1)}",
        )


def agent_of(point: RunStatus, rank: int) -> list[Log]:
    """Return the logs of the agent on a rank's node; empty if the run has no job, or Slurm no longer knows the log.

    The agent writes one output log and one error log for all attempts of a job. In a job of the user's own batch
    script, all agents write into the output of the script.
    """
    if point.job is None:
        return []
    newest_first = (read_json(point.folder.environment(number)) for number in reversed(point.folder.attempts()))
    ranks: list[dict[str, Any]] = next((known["ranks"] for known in newest_first if known.get("ranks")), [])
    # The order of ranks may differ from the order of nodes.
    node = next((int(each["node"]) for each in ranks if each.get("rank") == rank and "node" in each), 0)
    paths = agent_logs(point.folder.path, point.job, node)
    if isinstance(point.job, SlurmJob) and not paths[0].parent.is_dir():
        # For a job of the user's own batch script, all agents print into the output of the script.
        script = output_file(point.job.job_id)
        return [] if script is None else [Log(script, "batch script and agents")]
    return [Log(path, f"agent of node {node}") for path in paths]


def newest(point: RunStatus, rank: int, wanted: int | None = None) -> int | None:
    """Return the number of the newest attempt in which the rank has a log; None if there is none.

    With ``wanted``, the number of an attempt, return this number if the rank has a log in this attempt, else None.
    """
    there = [n for n in point.folder.attempts() if point.folder.log(n, rank).is_file() and wanted in (None, n)]
    return max(there, default=None)


def absent_log(point: RunStatus, rank: int, *, of_agent: bool) -> ConfigError:
    """Return the ConfigError for a log that does not exist.

    The log is that of the agent on the rank's node if ``of_agent`` is True, else that of the rank.
    """
    poll([point], trust_log=True)
    what, path = f"{'the agent of ' if of_agent else ''}rank {rank}", quote(str(point.folder.path))
    state = point.state + (f", {point.detail}" if point.detail else "")
    attempts = ", ".join(str(n) for n in point.folder.attempts()) or "none"
    last = newest(point, rank)
    fix = f"python -m launch.logs -f {path}, which waits for it"
    if point.is_over and last is not None and not of_agent:
        fix = f"python -m launch.logs {path} --rank {rank} --attempt {last}"
    elif point.is_over:
        fix = f"python -m launch.status {path}"
    found = f"no log of {what} in {point.folder.path} ({state}; attempts: {attempts})"
    return ConfigError(found, "a rank that has printed something", fix)


def follow(point: RunStatus, find: Callable[[], list[Log]], only: int | None) -> list[Log]:
    """Print the logs that ``find`` returns, as they grow, until the run is over or an attempt after ``only`` begins.

    ``only`` is None to follow all attempts. Returns the newest logs; empty if there were none.
    """
    logs: list[Log] = []
    asked_at, unknown = 0.0, False
    while True:
        if time.monotonic() - asked_at >= (SLURM_POLL_S if isinstance(point.job, SlurmJob) else POLL_S):
            unknown = poll([point], retries=1, trust_log=True) is not None
            asked_at = time.monotonic()
        # Without an answer of Slurm, only a run that made its last step certainly does not start again.
        over = point.is_over or (unknown and outcome(point.events()) == "finished")
        over = over or (only is not None and max(point.folder.attempts(), default=0) > only)
        found = find()
        for log in logs:
            log.copy()  # Print this log to its end before a newer one.
        if [log.path for log in found] != [log.path for log in logs]:
            logs = found
            for log in logs:
                log.copy()
        if over:
            return logs
        time.sleep(POLL_S)


def print_logs(args: argparse.Namespace) -> None:
    """Print the log that the command line names. Raises ConfigError if there is none."""
    point = find_run(args.path)
    failure = point.failure(args.attempt) if args.rank is None else None
    rank = args.rank or (0 if failure is None else int(failure["rank"]))
    refuse_absent_rank(point, rank)
    of_agent = agent_of(point, rank) if args.agent else []

    def find() -> list[Log]:
        attempt = newest(point, rank, args.attempt)
        if args.agent or attempt is None:
            return of_agent
        return [Log(point.folder.log(attempt, rank), f"attempt {attempt}, rank {rank}")]

    logs = follow(point, find, only=args.attempt) if args.follow else find()
    if not any(log.path.is_file() for log in logs):
        raise absent_log(point, rank, of_agent=args.agent)
    if not args.follow:
        for log in logs:
            log.copy()


@refusing
def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status: 0, 1 if Slurm did not answer, 2 if there is no such log."""
    parser = CommandParser(prog="python -m launch.logs", description="Print what a rank of a run printed.")
    add_run(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="print new output until the run is over")
    parser.add_argument("--rank", type=int, metavar="N", help="default: the rank that failed first, else rank 0")
    parser.add_argument("--attempt", type=int, metavar="N", help="default: the newest")
    parser.add_argument("--agent", action="store_true", help="of the agent that started the rank, over all attempts")
    try:
        print_logs(parser.parse_args(arguments))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # The reader, such as `| head`, has closed the pipe.
        sys.stderr.close()
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
