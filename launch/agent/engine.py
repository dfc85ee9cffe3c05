"""Engines: they start the ranks of a node as processes, and report which ranks have left.

The agent decides when ranks start and stop; ``resilience.engine`` chooses what starts them. docs/resilience.md compares
the engines.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
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
"""Shell script that starts a rank. The shell opens the log, which then also has output from before the program's first
line.

``exec`` leaves no shell behind, and the rank keeps the process id that the engine knows.
"""
END_S = 30.0
"""Seconds between SIGTERM and SIGKILL for ranks that an engine ends."""


@dataclass(frozen=True)
class NodeRanks:
    """The ranks of one node in one attempt, which an engine starts."""

    args: Sequence[str]
    """Program and arguments, the same for each rank."""
    variables: Mapping[int, Mapping[str, str]]
    """Rank -> its variables, besides those of the agent's environment: RANK, MASTER_ADDR and the others that torchrun
    sets. In the order of the local ranks."""
    workdir: str
    """Working directory of the ranks."""
    logs: Path
    """Folder of the logs. The engine appends the output of each rank to a file that ``log`` names."""
    scratch: Path
    """Folder on this node for files of the engine; it is removed after the attempt."""

    def log(self, rank: int) -> Path:
        """Return the path of the log of a rank."""
        return self.logs / log_name(rank)

    @property
    def shell(self) -> tuple[str, ...]:
        """Return the command that starts any rank: a shell that opens the log by the variable RANK."""
        return ("/bin/sh", "-c", START_RANK, "sh", self.workdir, str(self.logs), *self.args)


class Engine(Protocol):
    """Starts the ranks of one node in one attempt. ``resilience.engine=PACKAGE.MODULE.CLASS`` names a class of yours.

    An agent makes an object with a ``NodeRanks`` for each attempt. It calls ``start`` once, the other methods several
    times a second, and ``stop`` at the end. It sends signals to the process ids that ``ranks`` returns.
    """

    def start(self) -> None:
        """Start all ranks of the node."""

    def ranks(self) -> Mapping[int, int]:
        """Return rank -> process id for the ranks that run."""

    def statuses(self) -> Mapping[int, int | None]:
        """Return rank -> exit status, negative for a signal; None while a rank runs, or if the engine has ended it."""

    def stop(self) -> None:
        """End the ranks that still run, and wait for their end. Also called if ``start`` fails."""


class ProcessEngine:
    """Executes each rank as a child of the agent, or forks it from ``server``: ``exec`` and ``fork``."""

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
        """Return rank -> process id for the ranks that run."""
        return {rank: process.pid for rank, process in self._processes.items() if process.poll() is None}

    def statuses(self) -> Mapping[int, int | None]:
        """Return rank -> exit status, negative for a signal; None while a rank runs."""
        return {rank: process.poll() for rank, process in self._processes.items()}

    def stop(self) -> None:
        """End the sessions of ranks that still run."""
        end_sessions(self._processes.values())


def end_sessions(processes: Iterable[subprocess.Popen[bytes] | ForkedProcess]) -> None:
    """Send SIGTERM to the sessions of processes that still run, and after ``END_S`` seconds SIGKILL.

    Returns after ``END_S`` further seconds in any case: a process that waits for a device cannot end.
    """
    running = [process for process in processes if process.poll() is None]
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in running:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        for process in running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_S)
        running = [process for process in running if process.poll() is None]


SET_VARIABLES = '. "$1/$LOCAL_RANK.sh" && shift && '
"""Beginning of a shell script that sets the variables of a rank by its local rank."""
FAILED_RANK = re.compile(r"local_rank[:=] ?(\d+)\)?,?\s+(?:pid=\d+, )?exitcode\s*[:=] ?(-?\d+)")
"""Local rank and exit status of a failed rank in what torchrun, or ft_launcher, prints at its end."""


class TorchrunEngine:
    """Runs torchrun on the node, which starts, watches and ends the ranks. The agents still decide on restarts.

    A torchrun knows one node. The ranks get the variables of the whole run, and meet in the agents' store.
    """

    module: ClassVar[str] = "torch.distributed.run"

    def __init__(self, ranks: NodeRanks) -> None:
        self._ranks = ranks
        self._numbers = [*ranks.variables]
        """The ranks of this node, by local rank."""
        self._process: subprocess.Popen[bytes] | None = None
        self._found: dict[int, psutil.Process] = {}
        self._output = ranks.logs / f"engine_{self._numbers[0]:05d}.log"
        self._ends: Mapping[int, int | None] = {}

    def start(self) -> None:
        """Start torchrun. Its output goes into a file beside the logs of the ranks."""
        ranks = self._ranks
        for local, variables in enumerate(ranks.variables.values()):
            lines = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
            (ranks.scratch / f"{local}.sh").write_text("\n".join(lines))
        command = [
            *(sys.executable, "-m", self.module, "--standalone", f"--nproc-per-node={len(ranks.variables)}"),
            *("--max-restarts=0", "--no-python", "/bin/sh", "-c", SET_VARIABLES + START_RANK, "sh"),
            *(str(ranks.scratch), ranks.workdir, str(ranks.logs), *ranks.args),
        ]
        with self._output.open("ab") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )

    def ranks(self) -> Mapping[int, int]:
        """Return rank -> process id for the ranks that run: the children of torchrun with a variable LOCAL_RANK."""
        if self._process is not None and len(self._found) < len(self._numbers):
            with suppress(psutil.Error):
                for child in psutil.Process(self._process.pid).children():
                    with suppress(psutil.Error, KeyError):
                        self._found[self._numbers[int(child.environ()["LOCAL_RANK"])]] = child
        return {rank: child.pid for rank, child in self._found.items() if is_running(child)}

    def statuses(self) -> Mapping[int, int | None]:
        """Return rank -> exit status by the table that torchrun prints at its end; None before.

        A rank that torchrun has ended, because another rank failed, has None. If torchrun fails without such a table,
        each rank gets the exit status of torchrun, and the end of its output goes into the log of the first rank.
        """
        status = None if self._process is None else self._process.poll()
        if not status:
            return dict.fromkeys(self._numbers, status)
        self._ends = self._ends or self._read_ends(status)
        return self._ends

    def _read_ends(self, status: int) -> Mapping[int, int | None]:
        """Return the exit statuses of the ranks after torchrun has failed with ``status``."""
        printed = self._output.read_text(errors="replace")
        failed = {self._numbers[int(local)]: int(code) for local, code in FAILED_RANK.findall(printed)}
        if not failed:
            with self._ranks.log(self._numbers[0]).open("a") as log:
                log.write("\n".join(printed.splitlines()[-30:]) + "\n")
            return dict.fromkeys(self._numbers, status)
        ended = {rank for rank, code in failed.items() if code == -signal.SIGTERM}
        if len(ended) == len(failed):  # A SIGTERM of somebody else was the failure.
            ended = set()
        return {rank: None if rank in ended else failed.get(rank, 0) for rank in self._numbers}

    def stop(self) -> None:
        """End torchrun, which ends the ranks; kill ranks that are left."""
        if self._process is not None:
            end_sessions([self._process])
        for pid in self.ranks().values():
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


def is_running(process: psutil.Process) -> bool:
    """Return whether a process exists and has not ended."""
    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


class NvrxEngine(TorchrunEngine):
    """Runs ft_launcher of nvidia-resiliency-ext on the node, which also monitors ranks that send it heartbeats."""

    module = f"{NVRX}.fault_tolerance.launcher"


ENGINES: Mapping[str, Callable[[NodeRanks], Engine]] = {
    "fork": ProcessEngine,
    "exec": ProcessEngine,
    "torchrun": TorchrunEngine,
    "nvrx": NvrxEngine,
}


def engine_class(limits: ResilienceConfig) -> Callable[[NodeRanks], Engine]:
    """Return the class of the engine that ``resilience.engine`` names."""
    return limits.own_engine or ENGINES[limits.engine]
