"""Processes of a run on this host, and signals to them: ``python -m launch.storm.processes RUN SIGNAL WHAT RANK``.

A drill starts this module by srun on a node whose processes it cannot see. Only processes of the run that belong to
this user are signalled.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from launch.errors import CommandParser, ConfigError, refusing
from launch.runs.folder import RunFolder
from launch.slurm.jobs import SUBMISSION

AGENTS = ({SUBMISSION}, {"gpt_launch", "agent"})
"""Words in the command line of an agent: one that submitit started, or a plain batch script."""
PATIENCE_S = 120.0
"""A process that is to be signalled may just be starting."""
QUICK_S = 0.001


def own_processes() -> dict[int, tuple[list[str], dict[str, str], int]]:
    """Command line, environment and parent of every process of this user on this host, by its number."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            if folder.stat().st_uid != os.getuid():
                continue
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
            entries = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            if fields[0] not in "ZX" and words:
                variables = dict(entry.split("=", 1) for entry in entries if "=" in entry)
                found[int(folder.name)] = (words, variables, int(fields[1]))
    return found


def of_run(run_dir: Path) -> dict[int, tuple[list[str], dict[str, str], int]]:
    """Processes of ranks of a run, and what those have started."""
    name = str(run_dir)
    return {
        pid: told
        for pid, told in own_processes().items()
        if told[1].get("LAUNCH_RUN_DIR") == name or ("RANK" in told[1] and name in told[0])
    }


def ranks_of(run_dir: Path) -> dict[int, int]:
    """Process of each rank of a run on this host; not those that a rank has started."""
    there = of_run(run_dir)
    ranks = {}
    for pid, (_, variables, parent) in sorted(there.items()):
        rank = variables.get("RANK", "")
        if rank.isdigit() and there.get(parent, ([], {}, 0))[1].get("RANK") != rank:
            ranks[int(rank)] = pid
    return ranks


def is_agent(words: list[str]) -> bool:
    """Return whether a command line is that of an agent, or of the srun that starts it."""
    return any(agent <= {*words} for agent in AGENTS)


def agent_of(pid: int) -> int | None:
    """Agent that a rank runs under: the nearest process above it that is one."""
    there = own_processes()
    while pid in there:
        if is_agent(there[pid][0]):
            return pid
        pid = there[pid][2]
    return None


def of_job(job: str, program: str, conf: str | None) -> list[int]:
    """Processes of a Slurm job on this host that start agents, or are some: those named ``program``, children first.

    Args:
        job: Slurm's id of it.
        program: beginning of the program's name: ``srun``, or ``python`` for agents.
        conf: file by which the job knows its cluster: another one has the same ids.
    """
    found = {
        pid: parent
        for pid, (words, variables, parent) in own_processes().items()
        if Path(words[0]).name.startswith(program) and is_agent(words)
        if variables.get("SLURM_JOB_ID") == job and variables.get("SLURM_CONF") == conf
    }
    return sorted(found, key=lambda pid: found[pid] not in found)  # a child that outlives its parent may act on it


def kill_srun(job: str, *, alone: bool) -> list[int]:
    """Kill the srun of a job's batch script here, with the helper that would end its step unless ``alone``.

    Returns:
        Those that were killed; none where no srun is left.
    """
    found = of_job(job, "srun", os.environ.get("SLURM_CONF"))
    return [pid for pid in (found[-1:] if alone else found) if send(pid, signal.SIGKILL)]


def send(pid: int, number: signal.Signals) -> bool:
    """Signal a process; whether it was still there."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False


def find(run_dir: Path, what: str, rank: int, is_over: Callable[[], bool] = lambda: False) -> int | None:
    """Wait for a rank of a run on this host, or for its agent; None if it does not come, or ``is_over``."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and not is_over():
        pid = ranks_of(run_dir).get(rank)
        found = pid if pid is None or what == "rank" else agent_of(pid)
        if found is not None:
            return found
        time.sleep(0.05)
    return None


def entries(folder: Path) -> Mapping[str, int]:
    """List what lies in a folder of checkpoints, with the time of its last change."""
    found = {}
    with suppress(FileNotFoundError), os.scandir(folder) as inside:
        for entry in inside:
            with suppress(FileNotFoundError):
                found[entry.name] = entry.stat().st_mtime_ns
    return found


def wait_for_save(run_dir: Path, is_over: Callable[[], bool] = lambda: False) -> bool:
    """Wait, closely, until something new lies in a run's folder of checkpoints; whether it came."""
    folder = RunFolder(run_dir).checkpoints
    before, deadline = entries(folder), time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        now = entries(folder)
        if any(before.get(name) != changed for name, changed in now.items()):
            return True
        if is_over():
            return False
        time.sleep(QUICK_S)
    return False


@refusing
def main() -> int:
    """Signal one process of a run on this host. Exit status 1 if there is none."""
    parser = CommandParser(prog="python -m launch.storm.processes", description="Signal a process of a run here.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("signal", choices=("SIGKILL", "SIGTERM", "SIGSTOP", "SIGCONT"))
    parser.add_argument("what", choices=("rank", "agent", "agents", "srun", "srun_alone"))
    parser.add_argument("which", help="number of the rank, or of the job of agents or an srun")
    parser.add_argument("--in-save", action="store_true", help="as soon as something new is among the checkpoints")
    args = parser.parse_args()
    number = signal.Signals[args.signal]
    if args.what == "agents":
        found = of_job(args.which, "python", os.environ.get("SLURM_CONF"))
        return 0 if [pid for pid in found if send(pid, number)] else 1
    if args.what.startswith("srun"):
        return 0 if kill_srun(args.which, alone=args.what == "srun_alone") else 1
    if not args.which.isdigit():
        raise ConfigError(f"rank {args.which}", "the number of a rank", f"{args.what} 0")
    pid = find(args.run_dir, args.what, int(args.which))
    if pid is None or (args.in_save and not wait_for_save(args.run_dir)):
        return 1
    return 0 if send(pid, number) else 1


if __name__ == "__main__":
    sys.exit(main())
