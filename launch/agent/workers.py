"""The ranks of one node, through torch elastic: start them, watch them to the end, and say which of them failed.

Owns the processes. Every start is a fresh rendezvous among nodes that the crew has agreed on: elastic's own, shared by
several starts, was seen to close with a dead node as a member.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Collection
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import torch.distributed as dist
from torch.distributed.elastic.agent.server import WorkerSpec
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from launch.agent.heartbeat import POLL_S
from launch.agent.meter import Meter
from launch.agent.monitor import Watch
from launch.agent.node import Node, interface_of
from launch.agent.rendezvous import Crew, Start
from launch.agent.stop import StopRequest
from launch.config import Config
from launch.runs import heartbeat as pulse
from launch.runs.failures import enter_failure
from launch.runs.folder import RunFolder

LAST_WORDS_S = 3.0


class FixedRendezvous(RendezvousHandler):
    """Elastic's rendezvous for agents that have agreed already on who takes part and where."""

    def __init__(self, start: Start, index: int, timeout_s: float) -> None:
        self._start = start
        self._place = start.members.index(index)
        self._store = dist.TCPStore(
            start.address, start.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
        )

    def next_rendezvous(self) -> RendezvousInfo:
        """The place of this node among the members, and the store for the ranks."""
        where = RendezvousStoreInfo(self._start.address, self._start.port)
        store = dist.PrefixStore("agents", self._store)
        return RendezvousInfo(store, self._place, len(self._start.members), where)

    @property
    def use_agent_store(self) -> bool:
        """The ranks meet in the store too: no port is opened that could be taken."""
        return True

    def get_backend(self) -> str:
        """Its name in elastic's logs."""
        return "fixed"

    def is_closed(self) -> bool:
        """Never: it serves one start."""
        return False

    def set_closed(self) -> None:
        """Nothing to close."""

    def num_nodes_waiting(self) -> int:
        """Nobody joins later."""
        return 0

    def get_run_id(self) -> str:
        """A name for this start."""
        return f"attempt-{self._start.attempt}"

    def shutdown(self) -> bool:
        """The store belongs to the first node's crew."""
        return True


class OneLogEach(LogsSpecs):
    """The ranks write their logs themselves (see ``worker_command``); elastic only needs a place for error files."""

    def __init__(self, errors: str) -> None:
        super().__init__()
        self._errors = errors

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """No redirection."""
        nowhere = dict.fromkeys(envs, "")
        files = {rank: f"{self._errors}/{rank}.json" for rank in envs}
        return LogsDest(stdouts=nowhere, stderrs=nowhere, error_files=files)

    @property
    def root_log_dir(self) -> str:
        """Where elastic may write."""
        return self._errors


class RankAgent(LocalElasticAgent):
    """Elastic's agent, with a question of ours asked at every look at the ranks."""

    def __init__(self, spec: WorkerSpec, logs: LogsSpecs, on_look: Callable[[RankAgent], None]) -> None:
        super().__init__(spec, logs)
        self._on_look = on_look
        self._first_exit: float | None = None
        self.killed: set[int] = set()
        """Ranks that were ended from here: their end explains nothing."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._on_look(self)
        if self._others_may_still_tell():
            return RunResult(state=WorkerState.HEALTHY)
        return super()._monitor_workers(worker_group)

    def _others_may_still_tell(self) -> bool:
        """Whether a rank has failed and the others still have a moment to write down why.

        Elastic would end them right away: the echo of a failure, which comes first, would hide the failure. Those
        that are stuck with the lost rank are then killed, where elastic would wait for them for half a minute.
        """
        if not isinstance(self._pcontext, SubprocessContext):
            return False
        codes = [handler.proc.poll() for handler in self._pcontext.subprocess_handlers.values()]
        if None not in codes or not any(codes):
            return False
        if self._first_exit is None:
            self._first_exit = time.monotonic()
        if time.monotonic() - self._first_exit < LAST_WORDS_S:
            return True
        self.send(signal.SIGKILL)
        return False

    def send(self, number: signal.Signals) -> None:
        """Send a signal to every rank of this node that is still there."""
        for rank, pid in self.ranks().items():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
            if number is signal.SIGKILL:
                self.killed.add(rank)

    def ranks(self) -> dict[int, int]:
        """Process ids of this node's ranks that have not been reaped, by rank."""
        if not isinstance(self._pcontext, SubprocessContext):
            return {}
        workers = self._worker_group.workers
        handlers = self._pcontext.subprocess_handlers
        return {workers[i].global_rank: h.proc.pid for i, h in handlers.items() if h.proc.poll() is None}


def worker_command(folder: RunFolder, attempt: int) -> tuple[str, tuple[str, ...]]:
    """The command of a rank: the training script, with everything it prints in one log.

    A shell opens the log, so that what Python prints before it runs a line of ours is kept as well; exec leaves no
    shell behind and the rank under the process id that elastic knows.
    """
    logs = folder.log(attempt, 0).parent
    script = 'exec "$0" -m gpt.train --run "$1" >>"$2/rank_$(printf %05d "$RANK").log" 2>&1 </dev/null'
    return "/bin/sh", ("-c", script, sys.executable, str(folder.path), str(logs))


def prepare_environment(node: Node, config: Config, address: str) -> None:
    """Set what the ranks inherit. torchrun's habit of one thread for each rank is kept, and can be overridden."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTHONUNBUFFERED"] = "1"
    # Elastic would kill the ranks on SIGTERM; ours asks them to save. A hang-up of the terminal stays its own.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGHUP,SIGQUIT"
    interface = interface_of(address)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        if node.count > 1 and interface != "lo":
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    gpus = os.environ.setdefault("LAUNCH_VISIBLE_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    if not node.is_slurm and gpus:
        each = config.ranks_on_node
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus.split(",")[node.index * each : (node.index + 1) * each])


def run_ranks(
    folder: RunFolder, node: Node, config: Config, crew: Crew, start: Start, stop: StopRequest, meter: Meter
) -> str | None:
    """Start this node's ranks and watch them to their end.

    Returns:
        None where all exited with status 0, what went wrong elsewhere. Ranks that could not tell the ledger
        themselves (killed, stuck, or dead before our code ran) are entered here.
    """
    command, words = worker_command(folder, start.attempt)
    with TemporaryDirectory(prefix="launch-") as scratch:
        prepare_environment(node, config, crew.address)
        ours = {"GPT_ATTEMPT": start.attempt, "GPT_AGENT_PID": os.getpid(), pulse.ENVIRONMENT: scratch}
        os.environ |= {name: str(value) for name, value in ours.items()}
        spec = WorkerSpec(
            role="rank",
            local_world_size=config.ranks_on_node,
            entrypoint=command,
            args=words,
            rdzv_handler=FixedRendezvous(start, node.index, config.resilience.rendezvous_timeout_s),
            max_restarts=0,
            monitor_interval=POLL_S,
            local_addr=crew.address,
        )
        watch = Watch(folder, node, config, crew, start, stop, meter, Path(scratch))
        rank_agent = RankAgent(spec, OneLogEach(scratch), watch.look)
        try:
            result = rank_agent.run()
        except dist.DistError as error:  # the store is gone, and with it the first node
            rank_agent.send(signal.SIGKILL)
            return f"the first node's store does not answer: {error}"
    if result is None or not result.is_failed():
        return None
    crew.tell_failed(start.number)
    enter_silent_failures(folder, start.attempt, result, stop, rank_agent.killed)
    return watch.verdict or "ranks failed on this node"


def enter_silent_failures(
    folder: RunFolder, attempt: int, result: RunResult, stop: StopRequest, ended_here: Collection[int]
) -> None:
    """Enter ranks that died without a word into the ledger, with the end of their log."""
    told = {e["rank"] for e in folder.read_events() if e["event"] == "rank_failed" and e.get("attempt") == attempt}
    for rank, failure in sorted(result.failures.items()):
        if rank in told or rank in ended_here or (stop.count and failure.exitcode < 0):
            continue
        number = -failure.exitcode
        cause = f"killed by {signal.Signals(number).name}" if number > 0 else f"exit status {failure.exitcode}"
        enter_failure(folder, attempt, rank, cause=cause, trace=tail(folder.log(attempt, rank)), step=None)


def tail(log: Path, lines: int = 30) -> str:
    """The last lines of a log; nothing where there is none."""
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return ""
