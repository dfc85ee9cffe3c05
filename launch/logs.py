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

import gpt_launch.own_names  # noqa: F401
from launch.errors import CommandParser, ConfigError, counted, refusing
from launch.runs.files import read_json
from launch.runs.find import find_runs, labels_inside
from launch.slurm.adoption import adopt_found
from launch.slurm.client import SlurmError, output_file
from launch.slurm.handles import SlurmJob, agent_logs
from launch.slurm.status import RunStatus, find_run_statuses, outcome, poll

POLL_S = 0.5
SLURM_POLL_S = 5.0
CHUNK_BYTES = 1 << 20


class Log:
    """A file that is read as it grows. It may not be there yet."""

    def __init__(self, path: Path, title: str) -> None:
        self.path = path
        self._title = title
        self._read = 0

    def copy(self) -> None:
        """Print what is new, under the file's name where several are printed."""
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


def the_run(path: Path) -> RunStatus:
    """The one run in ``path``. Raises ConfigError if there are several, or none."""
    runs = find_runs([path])
    if len(runs) > 1:
        labels = labels_inside({run.path.parent for run in runs})
        names = ", ".join(labels[run.path] for run in runs[:8]) + (", ..." if len(runs) > 8 else "")
        raise ConfigError(
            f"{len(runs)} runs in {path}: {names}",
            "the folder of one",
            f"python -m launch.logs {quote(str(runs[0].path))}",
        )
    point = find_run_statuses(runs)[0]
    if point.job is None:
        adopt_found([point])
    return point


def refuse_absent_rank(point: RunStatus, rank: int, attempt: int | None) -> None:
    """Raise ConfigError for a rank that the attempt does not have, or no attempt where none is named.

    That is as far as the attempts and the plan tell the number of ranks, which may be smaller where nodes are lost.
    """
    recorded = {number: read_json(point.folder.environment(number)).get("ranks") for number in point.folder.attempts()}
    sizes = {number: len(ranks) for number, ranks in recorded.items() if isinstance(ranks, list)}
    planned = read_json(point.folder.plan).get("world_size")
    of, named = "a run", ""
    if attempt in sizes:
        sizes, planned = {attempt: sizes[attempt]}, None
        of, named = f"attempt {attempt}", f" --attempt {attempt}"
    size = max([*sizes.values(), *([planned] if isinstance(planned, int) else [])], default=None)
    if size is not None and not 0 <= rank < size:
        raise ConfigError(
            f"--rank {rank} of {of} with {counted(size, 'rank')}",
            "0" if size == 1 else f"0 to {size - 1}",
            f"python -m launch.logs {quote(str(point.folder.path))} --rank {min(max(rank, 0), size - 1)}{named}",
        )


def default_rank(point: RunStatus, attempt: int | None) -> int:
    """The rank that failed first in the attempt (or in the newest), else rank 0."""
    failure = point.failure(attempt)
    return 0 if failure is None else int(failure["rank"])


def rank_logs(point: RunStatus, rank: int, attempt: int) -> list[Log]:
    """The log of a rank in one attempt."""
    return [Log(point.folder.log(attempt, rank), f"attempt {attempt}, rank {rank}")]


def node_of(point: RunStatus, rank: int) -> int:
    """The node whose agent started a rank: ranks are not numbered in the order of the nodes."""
    for attempt in reversed(point.folder.attempts()):
        ranks = read_json(point.folder.environment(attempt)).get("ranks")
        if isinstance(ranks, list):
            return int(next((r["node"] for r in ranks if r.get("rank") == rank and "node" in r), 0))
    return 0


def agents(point: RunStatus, rank: int) -> list[Log]:
    """Find the logs of a rank's agent, in all attempts of its job."""
    if point.job is None:
        return []
    node = node_of(point, rank)
    paths = agent_logs(point.folder.path, point.job, node)
    if isinstance(point.job, SlurmJob) and not paths[0].parent.is_dir():
        # Not submitted by us: all agents print into the output of the batch script.
        script = output_file(point.job.job_id, point.job.cluster)
        return [] if script is None else [Log(script, "batch script and agents")]
    return [Log(path, f"agent of node {node}") for path in paths]


def newest(point: RunStatus, rank: int, wanted: int | None) -> int | None:
    """The attempt to print: the wanted one, or the newest in which the rank has printed anything."""
    there = [n for n in point.folder.attempts() if point.folder.log(n, rank).is_file()]
    return (wanted if wanted in there else None) if wanted is not None else max(there, default=None)


def missing(point: RunStatus, rank: int, *, of_agent: bool) -> ConfigError:
    """Refusal of a log that is not there yet, or of a run that is over without it."""
    poll([point], trust_log=True)
    what, path = f"{'the agent of ' if of_agent else ''}rank {rank}", quote(str(point.folder.path))
    state = point.state + (f", {point.detail}" if point.detail else "")
    attempts = ", ".join(str(n) for n in point.folder.attempts()) or "none"
    fix = f"python -m launch.logs -f {path}, which waits for it"
    if point.is_over:
        last = newest(point, rank, None)
        fix = f"python -m launch.status {path}"
        if last is not None and not of_agent:
            fix = f"python -m launch.logs {path} --rank {rank} --attempt {last}"
    return ConfigError(
        f"no log of {what} in {point.folder.path} ({state}; attempts: {attempts})",
        "a rank that has printed something",
        fix,
    )


def follow(point: RunStatus, find: Callable[[], list[Log]], only: int | None) -> list[Log]:
    """Print the logs as they grow, until the run is over, or one newer than attempt ``only`` has begun.

    Returns:
        The newest logs; none where there never were any.
    """
    logs: list[Log] = []
    asked_at, unknown = 0.0, False
    while True:
        if time.monotonic() - asked_at >= (SLURM_POLL_S if isinstance(point.job, SlurmJob) else POLL_S):
            unknown = poll([point], retries=1, trust_log=True) is not None
            asked_at = time.monotonic()
        # Where Slurm does not answer, only a run that made its last step is known not to start again.
        over = point.is_over or (unknown and outcome(point.events()) == "finished")
        over = over or (only is not None and max(point.folder.attempts(), default=0) > only)
        found = find()
        for log in logs:
            log.copy()  # to its end, before a newer one
        if [log.path for log in found] != [log.path for log in logs]:
            logs = found
            for log in logs:
                log.copy()
        if over:
            return logs
        time.sleep(POLL_S)


def print_logs(args: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    point = the_run(args.path)
    rank = default_rank(point, args.attempt) if args.rank is None else args.rank
    refuse_absent_rank(point, rank, None if args.agent else args.attempt)
    of_agent = agents(point, rank) if args.agent else []

    def find() -> list[Log]:
        if args.agent:
            return of_agent
        attempt = newest(point, rank, args.attempt)
        return [] if attempt is None else rank_logs(point, rank, attempt)

    logs = follow(point, find, only=args.attempt) if args.follow else find()
    if not any(log.path.is_file() for log in logs):
        raise missing(point, rank, of_agent=args.agent)
    if not args.follow:
        for log in logs:
            log.copy()


def parser() -> CommandParser:
    """The command line."""
    made = CommandParser(prog="python -m launch.logs", description="Print what a rank of a run printed.")
    made.add_argument("path", type=Path, metavar="PATH", help="a run folder, or the label of a run")
    made.add_argument("-f", "--follow", action="store_true", help="go on, over all attempts, until the run is over")
    made.add_argument("--rank", type=int, metavar="N", help="default: the rank that failed first, else rank 0")
    made.add_argument("--attempt", type=int, metavar="N", help="default: the newest")
    made.add_argument("--agent", action="store_true", help="of the agent that started the rank, over all attempts")
    return made


@refusing
def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 where Slurm did not answer, 2 if there is no such log."""
    try:
        print_logs(parser().parse_args(arguments))
    except SlurmError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        sys.stderr.close()
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
