"""Engines, which start the ranks of a node as processes and report the ends of these processes.

The agent decides when ranks start and stop. The key ``resilience.engine`` chooses the engine. docs/resilience.md
compares the engines.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import psutil

from launch.agent.fork_server import ForkedProcess, ForkServer
from launch.config import NVRX, ResilienceConfig
from launch.runs.folder import log_name

START_RANK = 'cd -- "$1" && log="$2/rank_$(printf %05d "$RANK").log" && shift 2 && exec "$@" >>"$log" 2>&1 </dev/null'
"""Shell script that starts a rank. Arguments: working directory, folder of the logs, program and its arguments.

The shell opens the log before the program runs, so the log also has errors of the program's start. ``exec`` replaces
the shell by the program, so the rank has the process id that the engine knows.
"""
END_S = 30.0
"""Seconds between SIGTERM and SIGKILL, when an engine ends ranks."""
LAST_MESSAGES_S = 3.0
"""Seconds after the first failure in which other ranks can still record their own failures."""


@dataclass(frozen=True)
class NodeRanks:
    """The ranks of one node in one attempt: program, variables and folders, with which an engine starts them."""

    args: Sequence[str]
    """Program and arguments, the same for each rank."""
    variables: Mapping[int, Mapping[str, str]]
    """Rank -> environment variables, in the order of the local ranks.

    They are added to the environment of the agent, and include those that torchrun sets, such as RANK and MASTER_ADDR.
    """
    workdir: str
    """Working directory of the ranks."""
    logs: Path
    """Folder of the logs. The engine appends the output of each rank to the file that the method ``log`` returns."""
    scratch: Path
    """Folder on this node for files of the engine. The agent removes the folder after the attempt."""

    def log(self, rank: int) -> Path:
        """Return the path of the log of a rank."""
        return self.logs / log_name(rank)

    @property
    def shell(self) -> tuple[str, ...]:
        """Command of a shell that opens the log of rank ``$RANK`` and then becomes the program; equal for all ranks."""
        return ("/bin/sh", "-c", START_RANK, "sh", self.workdir, str(self.logs), *self.args)


class Engine(Protocol):
    """Methods that every engine has. An engine starts the ranks of one node in one attempt.

    ``resilience.engine=PACKAGE.MODULE.CLASS`` names a class of the user. For each attempt, an agent makes an object of
    the class with a ``NodeRanks``. The agent calls ``start`` once, ``stop`` at the end, and the other methods several
    times a second. It sends signals to the process ids that ``ranks`` returns.
    """

    def start(self) -> None:
        """Start all ranks of the node."""

    def ranks(self) -> Mapping[int, int]:
        """Return rank -> process id, for the ranks that run."""

    def statuses(self) -> Mapping[int, int | None]:
        """Return rank -> exit status, negative for a signal.

        None while a rank runs, and for a rank that the engine itself has killed.
        """

    def stop(self) -> None:
        """End the ranks that still run, and wait for their end.

        The agent calls this method even if ``start`` has failed.
        """


class ProcessEngine:
    """Engine for ``resilience.engine=exec`` and ``fork``: starts each rank as a child process of the agent.

    The fork server ``server`` forks the ranks; None: the agent executes the program of each rank.
    """

    def __init__(self, ranks: NodeRanks, server: ForkServer | None = None) -> None:
        self._ranks, self._server = ranks, server
        self._processes: dict[int, subprocess.Popen[bytes] | ForkedProcess] = {}

    def start(self) -> None:
        """Start all ranks. A rank that cannot be forked is executed."""
        ranks, server = self._ranks, self._server
        for rank, variables in ranks.variables.items():
            env = {**os.environ, **variables}
            forked = server and server.start(ranks.args, env, ranks.workdir, str(ranks.log(rank)))
            self._processes[rank] = forked or subprocess.Popen(ranks.shell, env=env, start_new_session=True)

    def ranks(self) -> Mapping[int, int]:
        """Return rank -> process id, for the ranks that run."""
        return {rank: process.pid for rank, process in self._processes.items() if process.poll() is None}

    def statuses(self) -> Mapping[int, int | None]:
        """Return rank -> exit status, negative for a signal; None while a rank runs."""
        return {rank: process.poll() for rank, process in self._processes.items()}

    def stop(self) -> None:
        """End the ranks that still run, each with its process group."""
        end_sessions(self._processes.values())


def end_sessions(
    processes: Iterable[subprocess.Popen[bytes] | ForkedProcess], first: signal.Signals = signal.SIGTERM
) -> None:
    """End the processes that still run, each with its process group.

    They get the signal ``first``, and after ``END_S`` seconds SIGKILL. After SIGKILL, the function waits at most
    ``END_S`` seconds for each process, because a process that waits for a device cannot end.
    """
    running = [process for process in processes if process.poll() is None]
    for number in (first, signal.SIGKILL):
        for process in running:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        for process in running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_S)
        running = [process for process in running if process.poll() is None]


FAILED_RANK = re.compile(r"local_rank[:=] ?(\d+)\)?,?\s+(?:pid=(\d+), )?exitcode\s*[:=] ?(-?\d+)(?: \(pid: (\d+)\))?")
"""Pattern of a failed rank in the output of torchrun or ft_launcher at its end.

Groups: local rank, process id of ft_launcher's form, exit status, process id of torchrun's form.
"""
ENDED_RANK = re.compile(r"Sending process (\d+) closing signal")
"""Pattern of the line that torchrun or ft_launcher prints when it ends a rank, because another rank has failed.

Group: process id of the rank that it ends.
"""

SHIELD = """
import ctypes, os, runpy, signal, sys

agent = int(sys.argv.pop(1))
signal.signal(signal.SIGHUP, signal.SIG_DFL)
ctypes.CDLL(None).prctl(1, signal.SIGHUP, 0, 0, 0)  # PR_SET_PDEATHSIG
if os.getppid() != agent:
    sys.exit("the agent has ended")
shielded, set_handler = (signal.SIGTERM, signal.SIGUSR2), signal.signal
for number in shielded:
    set_handler(number, lambda *_: None)
signal.signal = lambda number, handler: None if number in shielded else set_handler(number, handler)
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
"""Python program that runs the module of torchrun or ft_launcher, and does not end at SIGTERM or SIGUSR2.

Arguments: process id of the agent, name of the module, arguments of the module.

Slurm sends these signals to all processes of a job before a stop. The ranks also get the signals, and have time to
save. The program handles the signals instead of ignoring them, because ranks would inherit SIG_IGN. If the agent is
killed, the kernel sends SIGHUP to this program, and torchrun then ends the ranks.
"""


class TorchrunEngine:
    """Engine that runs torchrun on the node. torchrun starts, watches and ends the ranks; agents decide on restarts.

    Each torchrun knows only its own node. The ranks get the variables of the whole run, and connect to the agents'
    store.
    """

    module: ClassVar[str] = "torch.distributed.run"

    def __init__(self, ranks: NodeRanks) -> None:
        self._ranks = ranks
        self._numbers = [*ranks.variables]
        """Numbers of this node's ranks, in the order of their local ranks."""
        self._process: subprocess.Popen[bytes] | None = None
        self._found: dict[int, psutil.Process] = {}
        self._output = ranks.logs / f"engine_{self._numbers[0]:05d}.log"
        self._ends: Mapping[int, int | None] = {}
        self._ending_since: float | None = None
        """Time when torchrun began to end ranks because another rank failed, monotonic seconds; None before."""

    def start(self) -> None:
        """Start torchrun. Its output goes into a file in the folder of the ranks' logs."""
        ranks = self._ranks
        for local, variables in enumerate(ranks.variables.values()):
            lines = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
            (ranks.scratch / f"{local}.sh").write_text("\n".join(lines))
        script = ranks.scratch / "start.sh"  # torchrun takes options of the program for its own, such as --run.
        script.write_text(f'. {shlex.quote(str(ranks.scratch))}/"$LOCAL_RANK.sh"\nexec {shlex.join(ranks.shell)}\n')
        command = [
            *(sys.executable, "-c", SHIELD, str(os.getpid()), self.module, "--standalone", "--max-restarts=0"),
            *(f"--nproc-per-node={len(ranks.variables)}", f"--log-dir={ranks.scratch}"),
            *("--no-python", "/bin/sh", str(script)),
        ]
        with self._output.open("ab") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )

    def ranks(self) -> Mapping[int, int]:
        """Return rank -> process id, for the ranks that run: the children of torchrun with a variable LOCAL_RANK."""
        if self._process is not None and len(self._found) < len(self._numbers):
            with suppress(psutil.Error):
                for child in psutil.Process(self._process.pid).children():
                    with suppress(psutil.Error, KeyError):
                        self._found[self._numbers[int(child.environ()["LOCAL_RANK"])]] = child
        return {rank: child.pid for rank, child in self._found.items() if is_running(child)}

    def statuses(self) -> Mapping[int, int | None]:
        """Return rank -> exit status, from the table that torchrun prints if ranks have failed.

        All are None while torchrun runs, and 0 if torchrun has succeeded. A rank that torchrun has killed, because
        another rank failed, has None. If torchrun fails without such a table, each rank gets the exit status of
        torchrun, and the end of torchrun's output goes into the log of the first rank.
        """
        status = None if self._process is None else self._process.poll()
        if status is None:
            self._kill_late_ranks()
        if not status:
            return dict.fromkeys(self._numbers, status)
        self._ends = self._ends or self._read_ends(status)
        return self._ends

    def _kill_late_ranks(self) -> None:
        """Kill ranks that still run ``LAST_MESSAGES_S`` seconds after torchrun's SIGTERM. torchrun itself would wait 30
        s.
        """
        late = self.ranks()
        if not 0 < len(late) < len(self._numbers) or not ENDED_RANK.search(self._printed()):
            return
        self._ending_since = self._ending_since or time.monotonic()
        if time.monotonic() > self._ending_since + LAST_MESSAGES_S:
            kill_sessions(late.values())

    def _printed(self) -> str:
        return self._output.read_text(errors="replace")

    def _read_ends(self, status: int) -> Mapping[int, int | None]:
        """Return rank -> exit status, after torchrun has failed with ``status``; None for a rank that torchrun killed.

        If torchrun's output has no table of failed ranks, each rank gets ``status``, and the end of the output goes
        into the log of the first rank.
        """
        printed = self._printed()
        ended, failed = ENDED_RANK.findall(printed), {}
        for local, before, code, after in FAILED_RANK.findall(printed):
            failed[self._numbers[int(local)]] = None if (before or after) in ended else int(code)
        if not failed:
            with self._ranks.log(self._numbers[0]).open("a") as log:
                log.write("\n".join(printed.splitlines()[-30:]) + "\n")
            return dict.fromkeys(self._numbers, status)
        return {rank: failed.get(rank, 0) for rank in self._numbers}

    def stop(self) -> None:
        """End torchrun, which ends the ranks. Ranks that still run afterwards are killed."""
        if self._process is not None:
            end_sessions([self._process], signal.SIGHUP)
        kill_sessions(self.ranks().values())


def kill_sessions(pids: Iterable[int]) -> None:
    """Kill the processes ``pids``, each with its process group. A process that has ended is skipped."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def is_running(process: psutil.Process) -> bool:
    """Return whether a process exists and has not ended."""
    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


class NvrxEngine(TorchrunEngine):
    """Engine that runs ft_launcher of nvidia-resiliency-ext on the node.

    ft_launcher also monitors ranks that send it heartbeats.
    """

    module = f"{NVRX}.fault_tolerance.launcher"


ENGINES: Mapping[str, Callable[[NodeRanks], Engine]] = {
    "fork": ProcessEngine,
    "exec": ProcessEngine,
    "torchrun": TorchrunEngine,
    "nvrx": NvrxEngine,
}


def engine_class(limits: ResilienceConfig) -> Callable[[NodeRanks], Engine]:
    """Return the class of the engine that ``resilience.engine`` names.

    Raises:
        ConfigError: the class cannot be imported or lacks a method, or a package is missing.
    """
    return limits.own_engine or ENGINES[limits.engine.partition(":")[0]]
