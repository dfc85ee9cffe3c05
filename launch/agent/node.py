"""This node: its processes, requests to stop, identity in the job, terms of head nodes, and context of its agent."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import msgspec

from launch.config import Config
from launch.runs.events import events_since_submission, select_events
from launch.runs.folder import RunFolder, has_written, numbers_in
from launch.slurm import client as scheduler

if TYPE_CHECKING:
    from launch.agent.fork_server import ForkServer
    from launch.agent.policy import Meter
    from launch.agent.ranks import MemoryStore
    from launch.agent.rendezvous import AgentGroup
    from launch.workload import CodeTree, RankCommand, RankContract

# Processes of this machine: a clock that stops with its process, and the state of a process in /proc. No torch.


TICK_S = 0.5
PAUSED_S = 5.0
"""If two ticks of ``RunningClock`` are further apart than this, in seconds, the process was stopped (SIGSTOP)."""


class RunningClock:
    """Clock that counts, in a thread, the seconds for which this process runs.

    A stop of the process stops the clock.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._over = threading.Event()
        threading.Thread(target=self._count, name="clock", daemon=True).start()

    def now(self) -> float:
        """Return the seconds since the clock was created. The result may be up to ``TICK_S`` seconds too small."""
        return self._seconds

    def close(self) -> None:
        """Stop the counting thread."""
        self._over.set()

    def _count(self) -> None:
        last = time.monotonic()
        while not self._over.wait(TICK_S):
            now = time.monotonic()
            self._seconds += now - last if now - last <= PAUSED_S else TICK_S
            last = now


def process_state(pid: int) -> str:
    """Return the state of a process, a letter of /proc/PID/stat: T if it is stopped, X if it is gone."""
    fields = _stat_fields(pid)
    return "X" if fields is None else fields[0]


def is_gone(pid: int) -> bool:
    """Return whether a process has ended. A process whose parent has not read its exit status counts as ended."""
    return process_state(pid) in "ZX"


def start_time(pid: int) -> str | None:
    """Return the start time of a process in clock ticks since boot; None if no such process exists.

    Process id and start time together identify a process uniquely.
    """
    fields = _stat_fields(pid)
    return None if fields is None else fields[19]


NO_FILE = re.compile(r"^0|sleep|poll|select|futex|pause|do_wait$|sig")
"""Pattern of the kernel functions that wait for something else than one file."""


def describe_wait(pid: int) -> str:
    """Return the state of a process, the kernel function in which it waits, and the file for which it waits.

    For example ``R 0``, ``S anon_pipe_read pipe:[1234]`` or ``D folio_wait_bit_common /data/tokens.bin``. Unknown parts
    are left out.
    """
    parts, proc = [process_state(pid)], Path("/proc", str(pid))
    try:
        parts.append((proc / "wchan").read_text())
        if not NO_FILE.search(parts[1]):
            number = int((proc / "syscall").read_text().split()[1], 16)  # of the file, in the calls that have one
            parts.append(str((proc / "fd" / str(number)).readlink()))
    except (OSError, LookupError, ValueError):
        pass
    return " ".join(parts)


def count_oom_kills() -> int:
    """Return how many processes of this process's cgroup the kernel has killed for memory; 0 if not known."""
    count = 0
    # Versions 2 and 1 of cgroups.
    for names, path in re.findall(r"^\d+:(|memory):(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE):
        file = "memory.oom_control" if names else "memory.events"
        with suppress(OSError):
            text = Path(f"/sys/fs/cgroup/{names}{path}/{file}").read_text()
            count += sum(map(int, re.findall(r"^oom_kill (\d+)", text, re.MULTILINE)))
    return count


def _stat_fields(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat from the third field (the state) on; None if the process is gone.

    The second field, the program's name in parentheses, may contain any character.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


# A request to stop: a signal that the agent receives, or a reason that the agent finds itself.


OWNER = "LAUNCH_OWNER_PID"
"""Environment variable with the process id of a local run's launcher. The run stops when the launcher is gone."""
JOINED = "a node joins"
"""Name of the request to the ranks to save and leave, so that they start again with a node of a spare job."""
STOP_FILE = "STOP"
"""Name of the file in a run folder that requests the ranks to save and leave; also the name of that request."""


class StopRequest:
    """Request to the ranks to save and leave: by SIGTERM or SIGUSR2, the file STOP, the budget, or a node that joins.

    Without Slurm, a second signal ends the ranks at once (Ctrl-C twice). Slurm sends several signals by itself, so
    under Slurm the ranks are ended only after ``resilience.grace_period_s``.
    """

    def __init__(self) -> None:
        self.count = 0
        self.name = ""
        self.since = 0.0
        self.interruptible = False
        """True while a signal raises InterruptedError in the agent, because no ranks run that could save."""

    def install(self) -> None:
        """Handle SIGTERM and SIGUSR2 in this object. SIGHUP and SIGQUIT end the agent, which first ends its ranks.

        The handlers replace those of submitit, which requeue a job without a decision of the agents.
        """
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._handle)
        for number in (signal.SIGHUP, signal.SIGQUIT):  # The agent ends its ranks before it leaves.
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
        signal.signal(signal.SIGCONT, signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.request(signal.Signals(number).name)
        if self.interruptible:
            raise InterruptedError(f"{self.name} before the ranks had started")

    def request(self, name: str) -> None:
        """Count a request to stop. ``name`` is the name of the signal, ``STOP_FILE``, or another reason as text.

        The first request sets the attribute ``name``, and ``since``, its time in monotonic seconds. Later requests only
        raise ``count``. A request that follows ``JOINED`` replaces ``JOINED``, and counts as the first.
        """
        self.count = 1 if self.name == JOINED else self.count + 1
        if self.count == 1:
            self.name, self.since = name, time.monotonic()

    def withdraw(self) -> None:
        """Withdraw the request ``JOINED`` after the ranks have saved and left. Other requests remain."""
        if self.name == JOINED:
            self.count, self.name = 0, ""


# Identity of this node in its job: read from the variables of Slurm, of submitit's local executor, or neither.


VISIBLE_GPUS = "LAUNCH_VISIBLE_GPUS"
"""Environment variable with the GPUs of all agents of a local run, as CUDA_VISIBLE_DEVICES names them."""
TOKEN = "LAUNCH_TOKEN"
"""Environment variable of the agents of a local run: a random name that identifies this start of the run."""
SHARES_JOB = "LAUNCH_SHARES_JOB"
"""Environment variable that is set if several runs share the agent's Slurm job (``cluster.points_per_job``)."""
HOSTS = "LAUNCH_HOSTS"
"""Environment variable of the agents on hosts of a hostfile: the names of these hosts, separated by commas."""
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Node:
    """Identity of one node and its agent in a job."""

    index: int
    count: int
    job: str
    """Name of one start of the job, the same on all its nodes: after a requeue, the job starts again with a new name.

    Slurm's id of the job, which a requeue does not change, is ``slurm_job``.
    """
    is_slurm: bool
    slurm_job: str = ""
    """Slurm's id of this job; empty outside of Slurm.

    ``A_a`` for element a of job array A, since Slurm reads the plain number as the whole array.
    """
    restarts: int = 0
    """Number of times that Slurm has requeued this job."""
    hosts: tuple[str, ...] = ()
    """Names of the job's nodes, in the order of Slurm or of the hostfile; empty on one machine without Slurm."""
    switches: tuple[str, ...] = ()
    """Names of the switches or blocks above this node, the topmost first; empty if Slurm knows no topology."""
    head: int = 0
    """Index of the head node, which decides for all nodes: the first node, until it is lost (``Term``)."""
    late: int = 0
    """Number of nodes that may join from spare jobs (key ``spare_jobs``).

    The indices of these nodes begin at ``count``, the number of nodes of the job.
    """

    @property
    def is_head(self) -> bool:
        """Return whether this is the head node."""
        return self.index == self.head

    @property
    def host(self) -> str:
        """Return the host name of this node."""
        return self.host_of(self.index)

    def host_of(self, index: int) -> str:
        """Return the host name of node ``index``.

        The host of another spare job is not known. For its node, return a text such as ``of spare job 1``.
        """
        if self.index >= self.count and index == self.index:  # The name by which Slurm knows this node.
            return os.environ.get("SLURMD_NODENAME", socket.gethostname())
        if index >= self.count:
            return f"of spare job {index - self.count + 1}"
        return self.hosts[index] if self.hosts else socket.gethostname()

    @classmethod
    def from_env(cls) -> Node:
        """Read the identity of this process from the environment of Slurm or of submitit's local executor.

        In any other environment, the process is the only node of a job.

        Raises:
            SlurmError: scontrol did not return the names of the nodes.
        """
        env = os.environ
        if env.get("SUBMITIT_EXECUTOR") == "local":
            index, count = int(env["SUBMITIT_LOCAL_GLOBALID"]), int(env["SUBMITIT_LOCAL_NTASKS"])
            hosts = tuple(filter(None, env.get(HOSTS, "").split(",")))
            return cls(index, count, f"local-{env['SUBMITIT_LOCAL_JOB_ID']}-{env.get(TOKEN)}", False, hosts=hosts)
        if "SLURM_PROCID" in env and "SLURM_JOB_ID" in env:
            restarts = env.get("SLURM_RESTART_COUNT", "0")
            job = f"slurm-{env['SLURM_JOB_ID']}-{restarts}-{env.get('SLURM_STEP_ID', '0')}"
            array = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}" if "SLURM_ARRAY_TASK_ID" in env else ""
            index, count = int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"])
            names = env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"]
            hosts = tuple(scheduler.run("scontrol", "show", "hostnames", names).split())
            switches = tuple(env.get("SLURM_TOPOLOGY_ADDR", "").split(".")[:-1])
            return cls(index, count, job, True, array or env["SLURM_JOB_ID"], int(restarts), hosts, switches)
        return cls(0, 1, f"process-{os.getpid()}-{socket.gethostname()}", False)

    def own_address(self) -> str:
        """Return the address at which the other nodes of the job reach this node.

        The loopback address if no other host is in the job.
        """
        peer = next((host for host in self.hosts if host != self.host), None)
        return LOOPBACK if peer is None else address_towards(peer)


def address_towards(peer: str) -> str:
    """Return the address of this machine on the route to ``peer``, a name or an address. Sends no packet."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))
        return str(probe.getsockname()[0])


# Terms: which node is the head of a job. A term is a file in the run folder that only one node can create.
#
# The first term is that of node 0. A node that has lost the head node claims the next term, and so does a head node
# that has lost other nodes. The filesystem lets one node succeed, and the other nodes follow. So two halves of a job
# that do not reach each other never both continue.


ROOM_POLL_S = 2.0
WITHOUT_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)
"""Error numbers of filesystems without hard links. There, ``claim_term`` makes a folder in place of a hard link."""


class Term(msgspec.Struct, frozen=True):
    """One term: the time for which one node is the head node, with the address of the agents' store on that node."""

    head: int
    address: str
    port: int
    token: str
    """Secret of this start of the job, with which its agents sign their messages. The same in all terms."""
    number: int = 0
    lost: tuple[tuple[int, str], ...] = ()
    """Index and reason of each lost node. These nodes take no further part in this job."""


def newest_term(folder: RunFolder, job: str) -> Term | None:
    """Return the newest term of one start of the job; None if there is no term yet.

    ``job`` is the name of this start (``Node.job``).
    """
    place = folder.path / ".launch"
    # An NFS client reads the list of a folder anew, but may look up a single name in its cache.
    numbers = numbers_in(place, f"{job}.", ".json")
    return msgspec.json.decode(_file(folder, job, numbers[-1]).read_bytes(), type=Term) if numbers else None


def claim_term(folder: RunFolder, job: str, term: Term) -> bool:
    """Write the file of ``term`` into the run folder. Returns whether this node has begun the term.

    False means that another node has already written a term of this number. Waits while the filesystem is full.
    """
    file = _file(folder, job, term.number)
    own = file.with_name(f".{file.name}.{term.head}")
    while not has_written(own, msgspec.structs.asdict(term), mode=0o600):
        time.sleep(ROOM_POLL_S)
    try:
        os.link(own, file)
    except FileExistsError:
        return own.stat().st_nlink == 2  # NFS repeats a request that succeeded if the answer was lost.
    except OSError as error:
        if error.errno not in WITHOUT_LINKS:
            raise
        try:  # If this node dies between the two calls, no node begins another term.
            file.with_suffix(".claimed").mkdir()
        except FileExistsError:
            return False
        own.rename(file)
    finally:
        own.unlink(missing_ok=True)
    return True


def is_replaced(folder: RunFolder, node: Node) -> bool:
    """Return whether the newest term of the job has another head node than ``node``."""
    term = newest_term(folder, node.job)
    return term is not None and term.head != node.index


def presence_file(folder: RunFolder, job: str, head: int, index: int) -> Path:
    """Return the path of the file with which node ``index`` shows that it runs, but has lost head node ``head``.

    Both are indices of nodes; ``job`` is the name of this start of the job.
    """
    return folder.path / ".launch" / f"{job}.without-{head}.{index}"


def _file(folder: RunFolder, job: str, number: int) -> Path:
    return folder.path / ".launch" / f"{job}.{number}.json"


# Members of the agent group: the nodes of an attempt, and lost or sick nodes.


class RendezvousRound(msgspec.Struct, frozen=True):
    """One start of the ranks: the nodes that take part, and the address of the ranks' store. Equal on all agents."""

    number: int
    attempt: int
    members: tuple[int, ...]
    """Indices of the nodes that take part, the head node first. Ranks are numbered in this order.

    Nodes at one switch are neighbors.
    """
    address: str
    port: int
    """Port of the ranks' store on the head node. Each round has a new port."""
    coordinator_port: int = 0
    """Port on the head node that was free at the start of the round, for a server that rank 0 opens itself."""


@dataclass(frozen=True)
class NodeProblem:
    """A lost or sick node, which does not take part in a start of the ranks, and the reason."""

    index: int
    host: str
    why: str
    is_shared: bool = False
    """True if the same fault affects every node, such as a full filesystem with the run folder."""


class TooFewNodesError(RuntimeError):
    """Raised if fewer healthy nodes are left than a round needs."""

    def __init__(self, why: str, sick: Iterable[NodeProblem] = ()) -> None:
        super().__init__(why)
        self.sick = tuple(sick)


class HeadNodeLostError(RuntimeError):
    """Raised if the head node does not answer. The message is the reason for which the head node counts as lost."""


def problems_text(state: str, nodes: Iterable[NodeProblem]) -> str:
    """Return one text for people that names each node, its ``state`` (``lost`` or ``sick``) and the reason."""
    return "; ".join(f"node {one.host} is {state}: {one.why}" for one in nodes)


# The context of an agent.


@dataclass(frozen=True)
class RunContext:
    """A run as its agent sees it: run folder, identity of the agent's node, and config."""

    folder: RunFolder
    node: Node
    config: Config

    def events(self, *names: str, **fields: Any) -> list[dict[str, Any]]:
        """Return the events since a user last typed the command of the run, oldest first.

        With ``names``, return only events that have one of these names and all values of ``fields``. Without ``names``,
        ``fields`` has no effect.
        """
        events = events_since_submission(self.folder.read_events())
        return select_events(events, *names, **fields) if names else events

    def record(self, event: str, **details: Any) -> None:
        """Append an event to the event log."""
        self.folder.record_event(event, **details)

    def record_problems(self, event: str, attempt: int | None, nodes: Iterable[NodeProblem]) -> None:
        """Append an event for each node. ``event`` is its name: ``node_lost`` or ``node_sick``.

        ``attempt`` is the number of the attempt; None if no attempt runs.
        """
        for one in nodes:
            self.record(event, attempt=attempt, node=one.index, host=one.host, cause=one.why)


@dataclass(frozen=True)
class AgentContext(RunContext):
    """The run, and the objects that the parts of a running agent share."""

    group: AgentGroup
    """The agents of the job."""
    stop: StopRequest
    """The requests to stop that this agent has received."""
    meter: Meter
    """Meter of the allocation's use, which is compared with the budget."""
    server: ForkServer | None
    """Server that forks the ranks; None if ranks are executed."""
    store: MemoryStore
    """Store of checkpoints in the memory of this node."""


@dataclass(frozen=True)
class Attempt(AgentContext):
    """One attempt on this node: one start of its ranks, with the nodes that take part and the program.

    The inherited ``config`` describes only the nodes that take part.
    """

    rdzv: RendezvousRound
    workload: str
    """Name of the workload."""
    command: RankCommand
    contract: RankContract
    """What the ranks do themselves: events that they record, signals and exit statuses that they understand."""
    tree: CodeTree
    """Files of the code that the ranks run."""
    heartbeats: Path
    """Folder of the ranks' heartbeat files, empty at the start of the attempt."""

    @property
    def number(self) -> int:
        """Return the number of the attempt, from 1."""
        return self.rdzv.attempt

    @property
    def place(self) -> int:
        """Return the position of this node among the nodes that take part, from 0."""
        return self.rdzv.members.index(self.node.index)

    @property
    def ranks(self) -> range:
        """Return the numbers of the ranks of this node."""
        each = self.config.ranks_on_node
        return range(self.place * each, (self.place + 1) * each)

    def log(self, rank: int) -> Path:
        """Return the path of the log of a rank."""
        return self.folder.log(self.number, rank)

    def error_file(self, rank: int) -> Path:
        """Path of the file into which torch's decorator ``record`` writes the failure of a rank."""
        return self.heartbeats / f"error_{rank}.json"
