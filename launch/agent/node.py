"""This node as its agent sees it: identity in the job, processes, a clock, requests to stop."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from launch.config import Config
from launch.runs.events import events_since_submission
from launch.runs.folder import RunFolder
from launch.slurm import client as scheduler

if TYPE_CHECKING:
    from launch.agent.fork_server import ForkServer
    from launch.agent.policy import Meter
    from launch.agent.rendezvous import AgentGroup
    from launch.worker.memory_store import MemoryStore

# A clock that stands still while the process does, by which silence of others is measured. Torch-free.


TICK_S = 0.5
PAUSED_S = 5.0
"""A tick that is so late has not waited for a processor: the process was stopped."""


class RunningClock:
    """Seconds that this process has been running, counted by a thread, as nothing else tells a pause from a wait."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._count, name="clock", daemon=True)
        self._thread.start()

    def now(self) -> float:
        """Seconds so far, at most ``TICK_S`` behind."""
        return self._seconds

    def close(self) -> None:
        """Count no further."""
        self._over.set()

    def _count(self) -> None:
        last = time.monotonic()
        while not self._over.wait(TICK_S):
            now = time.monotonic()
            self._seconds += now - last if now - last <= PAUSED_S else TICK_S
            last = now


# State of a process of this machine, from /proc/PID/stat and /proc/PID/status. Torch-free.


def is_gone(pid: int) -> bool:
    """Tell whether a process has ended, also where its parent has not asked after it yet."""
    fields = _fields(pid)
    return fields is None or fields[0] in "ZX"


def is_stopped(pid: int) -> bool:
    """Tell whether a process was stopped by a signal (SIGSTOP), or by a debugger."""
    fields = _fields(pid)
    return fields is not None and fields[0] in "Tt"


def start_time(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot, which with its id names it for good. None: not there."""
    fields = _fields(pid)
    return None if fields is None else fields[19]


def is_pending(pid: int, number: int) -> bool:
    """Tell whether a process was sent a signal that none of its threads has begun to handle."""
    return _has_signal(Path(f"/proc/{pid}/status"), "ShdPnd", number)


def threads_blocking(pid: int, number: int) -> set[str]:
    """Ids of the threads of a process that block a signal, as a thread also does while it handles that signal."""
    threads = Path(f"/proc/{pid}/task").glob("*/status")
    return {path.parent.name for path in threads if _has_signal(path, "SigBlk", number)}


def _has_signal(status: Path, field: str, number: int) -> bool:
    """Tell whether a signal is in a set of signals of a status file: hexadecimal, with the lowest bit for signal 1."""
    try:
        lines = status.read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return any(int(line.split()[1], 16) >> (number - 1) & 1 for line in lines if line.startswith(f"{field}:"))


def _fields(pid: int) -> list[str] | None:
    """The fields from the third on, which is the state: the second, a name in parentheses, may hold anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


# A request to stop, as an agent hears it: a signal, or what it finds out by itself. The handler only sets a flag.


OWNER = "LAUNCH_OWNER_PID"
"""Process of the launcher that started a local run; without it the run stops too."""


STOP_FILE = "STOP"
"""File in a run folder that asks its run to save and leave; also what asks an agent then, in place of a signal."""


class StopRequest:
    """SIGTERM or SIGUSR2 ask the ranks to save and leave.

    Without Slurm a second one ends them at once (Ctrl-C twice). Slurm sends several by itself: there only the deadline
    ends them.
    """

    def __init__(self) -> None:
        self.count = 0
        self.name = ""
        self.since = 0.0
        self.interruptible = False
        """True while a signal breaks out of a wait in which there are no ranks to ask."""

    def install(self) -> None:
        """Replace submitit's handlers, which would requeue from inside the handler and on rank 0 only."""
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._handle)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.ask(signal.Signals(number).name)
        if self.interruptible:
            raise InterruptedError(f"{self.name} before the ranks had started")

    def ask(self, name: str) -> None:
        """Note that the run should stop, and why."""
        self.count += 1
        if self.count == 1:
            self.name, self.since = name, time.monotonic()


# Identity of this node in its job: read from the variables of Slurm, of submitit's local executor, or neither.


@dataclass(frozen=True)
class Node:
    """One agent among ``count``."""

    index: int
    count: int
    job: str
    """Names this start of the job: another one, a requeue included, has another name."""
    is_slurm: bool
    slurm_job: str = ""
    """Slurm's id of this job, ``A_a`` for an element of an array: the plain number can mean its siblings too."""
    restarts: int = 0
    """Number of times that Slurm has put this job back into the queue."""
    hosts: tuple[str, ...] = ()
    """Names of the job's nodes, in order, as Slurm knows them; empty elsewhere."""

    @property
    def slurm_names(self) -> tuple[str, ...]:
        """Ids by which Slurm knows this job: an element of an array has a number of its own besides."""
        return (self.slurm_job, self.job.split("-")[1]) if self.is_slurm else ()

    @property
    def slurm_step(self) -> str:
        """Slurm's id of the step that the agents are."""
        return f"{self.slurm_job}.{self.job.rpartition('-')[2]}"

    @property
    def is_head(self) -> bool:
        """Tell whether this node decides for all. Its loss is the loss of the job: the batch script runs there too."""
        return self.index == 0

    @property
    def host(self) -> str:
        """The name of this node."""
        return self.host_of(self.index)

    def host_of(self, index: int) -> str:
        """The name of node ``index`` of the job."""
        return self.hosts[index] if self.hosts else socket.gethostname()

    @classmethod
    def from_env(cls, token: str | None) -> Node:
        """Read where this process stands. ``token`` tells local jobs apart whose process ids are the same."""
        env = os.environ
        if env.get("SUBMITIT_EXECUTOR") == "local":
            index, count = int(env["SUBMITIT_LOCAL_GLOBALID"]), int(env["SUBMITIT_LOCAL_NTASKS"])
            return cls(index, count, f"local-{env['SUBMITIT_LOCAL_JOB_ID']}-{token}", False)
        if "SLURM_PROCID" in env and "SLURM_JOB_ID" in env:
            job = f"slurm-{env['SLURM_JOB_ID']}-{env.get('SLURM_RESTART_COUNT', '0')}-{env.get('SLURM_STEP_ID', '0')}"
            array = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}" if "SLURM_ARRAY_TASK_ID" in env else ""
            restarts = int(env.get("SLURM_RESTART_COUNT", "0"))
            index, count = int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"])
            names = env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"]
            hosts = tuple(scheduler.run("scontrol", "show", "hostnames", names).split())
            return cls(index, count, job, True, array or env["SLURM_JOB_ID"], restarts, hosts)
        return cls(0, 1, f"process-{os.getpid()}-{socket.gethostname()}", False)

    def taken_hosts(self) -> set[str]:
        """Names of the nodes that Slurm has taken from this job since its start; none where it does not answer."""
        if not self.is_slurm:
            return set()
        try:
            left = scheduler.nodes_left(self.slurm_job, retries=1)
        except scheduler.SlurmError:
            return set()
        return {*self.hosts} - left if self.host in left else set()  # else it is being requeued, and not told anew

    def own_address(self) -> str:
        """The address at which the other nodes of the job reach this one."""
        if not self.is_slurm or self.count == 1:
            return LOOPBACK
        peer = next((host for host in self.hosts if host != self.host), None)
        return LOOPBACK if peer is None else address_towards(peer)


LOOPBACK = "127.0.0.1"
SIOCGIFADDR = 0x8915  # linux/sockios.h: get the address of an interface


def address_towards(peer: str) -> str:
    """The address of this machine on the route to ``peer`` (a name or an address). Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """The interface that has ``address``, or None."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


@dataclass(frozen=True)
class RunContext:
    """The run that an agent works for, and the node that the agent runs on."""

    folder: RunFolder
    node: Node
    config: Config

    def events(self) -> list[dict[str, Any]]:
        """Return the event log since the last submission."""
        return events_since_submission(self.folder.read_events())

    def record(self, event: str, **details: Any) -> None:
        """Append an event to the event log."""
        self.folder.record_event(event, **details)

    def alone(self) -> RunContext:
        """Return the context without the other agents, for a decision that must not restart the ranks in place."""
        return RunContext(self.folder, self.node, self.config)


@dataclass(frozen=True)
class AgentContext(RunContext):
    """All that the parts of a running agent share."""

    group: AgentGroup
    """The agents of the job."""
    stop: StopRequest
    """The request to stop that this agent has received."""
    meter: Meter
    """The use of the allocation, and its budget."""
    server: ForkServer | None
    """Forks the ranks; None where ranks are executed."""
    store: MemoryStore
    """Checkpoints in the memory of this node."""
