"""``python -m launch.attach RUN``: a shell on the node of a rank, or the Python stacks of the ranks.

    python -m launch.attach outputs/scaling/nodes=2 --rank 3                  a shell on the node of rank 3, in its job
    python -m launch.attach outputs/scaling/nodes=2 --rank 3 -- nvidia-smi    a command in place of the shell
    python -m launch.attach outputs/scaling/nodes=2 --stacks                  stacks of all ranks, equal ones together

The shell has the environment and the working directory of the rank. It shares CPUs and GPUs with the rank.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import psutil

import gpt_launch.own_names  # noqa: F401
from launch.config.compose import read_point
from launch.errors import CommandParser, ConfigError, ranges, refusing
from launch.logs import add_run, find_run
from launch.runs.events import last_event, select_events
from launch.runs.folder import RunFolder
from launch.slurm.client import job_fields
from launch.slurm.status import RunStatus, poll
from launch.storm.injection import rank_processes

Stacks = dict[int, str]
"""Rank -> its stacks as text, or the reason why there are no stacks."""

PIECE = 150
"""Number of characters of a stack in one line of output.

srun mixes lines of several nodes if the lines are longer than 1,024 bytes. A piece of this length is shorter, even if
JSON needs several bytes for each of its characters.
"""


def job_of_nodes(point: RunStatus) -> str | None:
    """Return the id of the Slurm job on whose nodes the ranks of a run are; None if the ranks are on this machine.

    Raises:
        ConfigError: the run does not run, or its ranks are on another machine without Slurm.
    """
    poll([point])
    path = shlex.quote(str(point.folder.path))
    started = select_events(point.events(), "agent_started")
    if point.state not in ("running", "unknown") or not started:
        raise ConfigError(f"{point.name} is {point.state}", "a run whose ranks run", f"python -m launch.status {path}")
    kind, number = str(started[-1]["job"]).split("-")[:2]  # slurm-123-0-0 or local-4567-...
    if kind == "slurm":
        return number
    host = last_event(point.events(), "submitted").get("host", socket.gethostname())
    if host != socket.gethostname():
        fix = f"ssh {host}, and python -m launch.attach {path} there"
        raise ConfigError(f"{point.name} runs on {host}", "a run on this machine, or a job of Slurm", fix)
    return None


def on_nodes(job: str | None, run: Path, words: Sequence[str], *options: str) -> list[str]:
    """Return the command that runs this module, with the Python of the agents, on the nodes of a job.

    Args:
        job: id of the job; None for this machine.
        run: the run folder.
        words: arguments of this module.
        options: options of srun.
    """
    cluster = read_point(RunFolder(run)).cluster  # This module runs outside of the run's container.
    python = sys.executable if cluster.container else cluster.python or sys.executable
    here = [python, "-m", "gpt_launch", "launch.attach", "--here", *words]
    return here if job is None else ["srun", f"--jobid={job}", "--overlap", "--cpu-bind=none", *options, *here]


def answers(job: str | None, run: Path, *words: str) -> list[str]:
    """Run this module with the arguments ``words`` on all nodes of a run, and return the lines that it prints.

    Raises ConfigError if srun fails.
    """
    nodes = "1" if job is None else job_fields(job)["NumNodes"]
    command = on_nodes(job, run, [*words, str(run)], f"--nodes={nodes}", "--ntasks-per-node=1")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        fix = f"python -m launch.status {shlex.quote(str(run))}"
        raise ConfigError(f"nodes of {run} that do not answer: {done.stderr.strip()}", "a run whose nodes work", fix)
    return done.stdout.splitlines()


def stacks_of(point: RunStatus) -> Stacks:
    """Return the stacks of all ranks of a run. Raises ConfigError if the run does not run, or if srun fails."""
    stacks: Stacks = {}
    for line in answers(job_of_nodes(point), point.folder.path, "--stacks"):
        rank, piece = json.loads(line)
        stacks[rank] = stacks.get(rank, "") + piece
    return stacks


# On every node: the processes of the ranks.


def stacks_here(run: Path) -> Stacks:
    """Return the stacks of the ranks on this host.

    Each rank that handles SIGQUIT gets this signal, and then writes its stacks. A rank that does not handle SIGQUIT
    would be killed by the signal. It gets no signal, and its text is the reason.
    """
    from launch.agent.watch import STACK_SIGNAL, stack_of  # with torch, which a login node may lack

    folder = RunFolder(run)
    attempt, ranks = max(folder.attempts(), default=0), rank_processes(run)

    def stacks(rank: int) -> str:
        process = ranks[rank]
        try:
            caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
            if caught is None or not int(caught[1], 16) >> (STACK_SIGNAL - 1) & 1:
                return f"no stacks: no launch.worker in it; py-spy dump --pid {process.pid}, on {socket.gethostname()}"
            if process.status() == psutil.STATUS_STOPPED:
                return "no stacks: the process is stopped"
        except (OSError, psutil.NoSuchProcess):
            return "no stacks: the process has ended"
        return stack_of(process.pid, folder.log(attempt, rank)) or "no stacks: the process does not answer"

    with ThreadPoolExecutor(max(1, len(ranks))) as pool:
        return dict(zip(ranks, pool.map(stacks, ranks), strict=True))


def enter(process: psutil.Process, command: list[str]) -> NoReturn:
    """Replace this process by ``command``, with the environment and the working directory of the rank ``process``."""
    os.chdir(process.cwd())
    environment = {**process.environ(), "TERM": os.environ.get("TERM", "dumb"), "LAUNCH_RANK_PID": str(process.pid)}
    os.execvpe(command[0], command, environment)


def act_here(args: argparse.Namespace) -> None:
    """Do on this host what the command line requests for its ranks.

    Print stacks (``--stacks``), print the name of a rank's node (``--find``), or replace this process by a command.
    Does nothing if the rank is not on this host.
    """
    process = rank_processes(args.path).get(args.rank)
    if args.stacks:
        for rank, text in stacks_here(args.path).items():
            for start in range(0, len(text), PIECE):
                print(json.dumps([rank, text[start : start + PIECE]]))
    elif process is not None and args.find:
        print(os.environ.get("SLURMD_NODENAME", socket.gethostname()))
    elif process is not None:
        enter(process, args.command or [os.environ.get("SHELL", "/bin/bash")])


# On the machine where the command was typed.


def grouped(stacks: Stacks) -> str:
    """Return the stacks as text. Ranks with equal stacks are one group, and the smallest group comes first."""
    groups: dict[str, list[int]] = {}
    for rank, text in sorted(stacks.items()):
        groups.setdefault(re.sub(r"0x[0-9a-f]+ ?", "", text), []).append(rank)
    ordered = sorted(groups.items(), key=lambda group: len(group[1]))
    return "\n\n".join(f"{len(ranks)} of {len(stacks)} ranks: {ranges(ranks)}\n{text}" for text, ranks in ordered)


def attach(args: argparse.Namespace) -> int:
    """Print the stacks of a run, or run a command on the node of a rank. Returns the exit status of the command.

    Raises:
        ConfigError: the run does not run, has no such rank, or its nodes do not answer.
    """
    point = find_run(args.path)
    if args.stacks:
        print(grouped(stacks_of(point)))
        return 0
    job, run = job_of_nodes(point), point.folder.path
    rank = f"--rank={args.rank}"
    found = answers(job, run, rank, "--find")
    if not found:
        fix = f"python -m launch.status {shlex.quote(str(run))}"
        raise ConfigError(f"no process of rank {args.rank} in {run}", "a rank that runs", fix)
    print(f"rank {args.rank} is on {found[0]}", file=sys.stderr, flush=True)
    options = ["--nodes=1", "--ntasks=1", f"--nodelist={found[0]}", *(["--pty"] if sys.stdin.isatty() else [])]
    command = on_nodes(job, run, [rank, str(run), "--", *args.command], *options)
    return subprocess.run(command, check=False).returncode


@refusing
def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status of the command that ran on the node; 0 if stacks were printed.

    1 if Slurm does not answer. 2 if the run does not run or has no such rank.
    """
    parser = CommandParser(
        prog="python -m launch.attach", description="Open a shell on the node of a rank, or print its Python stacks."
    )
    parser.add_argument("--rank", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--stacks", action="store_true", help="print the stacks of all ranks, equal ones together")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # on a node of the run
    parser.add_argument("--find", action="store_true", help=argparse.SUPPRESS)
    add_run(parser)
    parser.epilog = "After -- comes a command to run in place of the shell: ... --rank 3 -- nvidia-smi"
    words = list(sys.argv[1:] if arguments is None else arguments)
    end = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:end])
    args.command = words[end + 1 :]
    if args.here:
        act_here(args)
        return 0
    return attach(args)


if __name__ == "__main__":
    sys.exit(main())
