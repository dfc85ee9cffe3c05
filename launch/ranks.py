"""The ranks of one node, through torch elastic: find the other agents, start the ranks, watch them to the end.

Owns everything of the agent that needs torch. Every start is a fresh rendezvous in a fresh store: a rendezvous that is
shared by several starts was seen to close with a dead node as a member.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import torch.distributed as dist
from torch.distributed.elastic.agent.server import WorkerSpec
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

from gpt.failure import enter_failure
from gpt.run_folder import RunFolder, write_json
from launch.agent import OWNER, RunFailedError, StopRequest
from launch.config import Config
from launch.meeting import POLL_S, note_path, wait_for_note
from launch.meter import BUDGET, Meter
from launch.network import address_towards, interface_of
from launch.node import Node

LAST_WORDS_S = 3.0
FAILED = "launch/failed"
"""Key of the store under which a node tells the others that its ranks failed."""


@dataclass(frozen=True)
class Meeting:
    """Where the agents of one start of a job meet."""

    attempt: int
    store: dist.TCPStore
    address: str
    """Address of this node, as the others reach it."""


def meet(folder: RunFolder, node: Node, config: Config, start: int) -> Meeting:
    """Open the store on the first node and find it from the others, through a file in the run folder.

    The first node takes a free port and tells it, so no port is fixed and none can be taken meanwhile.

    Raises:
        TimeoutError: the first node did not show up in ``resilience.rendezvous_timeout_s``.
        RunFailedError: the first node gave the run up.
    """
    timeout = timedelta(seconds=config.resilience.rendezvous_timeout_s)
    note = note_path(folder, node, start)
    if node.index == 0:
        address = node.own_address()
        store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        attempt = folder.create_attempt()
        write_json(note, {"address": address, "port": store.port, "attempt": attempt})
        return Meeting(attempt, store, address)
    told = wait_for_note(note, timeout.total_seconds())
    if "give_up" in told:
        raise RunFailedError(told["give_up"])
    store = dist.TCPStore(told["address"], told["port"], is_master=False, wait_for_workers=False, timeout=timeout)
    return Meeting(told["attempt"], store, address_towards(told["address"]))


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
        for pid in list(self._pcontext.pids().values()) if self._pcontext else []:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue


def worker_command(folder: RunFolder, attempt: int) -> tuple[str, tuple[str, ...]]:
    """The command of a rank: the training script, with everything it prints in one log.

    A shell opens the log, so that what Python prints before it runs a line of ours is kept as well; exec leaves no
    shell behind and the rank under the process id that elastic knows.
    """
    logs = folder.log(attempt, 0).parent
    script = 'exec "$0" -m gpt.train --run "$1" >>"$2/rank_$(printf %05d "$RANK").log" 2>&1 </dev/null'
    return "/bin/sh", ("-c", script, sys.executable, str(folder.path), str(logs))


def prepare_environment(node: Node, config: Config, meeting: Meeting) -> None:
    """Set what the ranks inherit. torchrun's habit of one thread for each rank is kept, and can be overridden."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTHONUNBUFFERED"] = "1"
    os.environ["GPT_ATTEMPT"] = str(meeting.attempt)
    os.environ["GPT_AGENT_PID"] = str(os.getpid())
    # Elastic would kill the ranks on SIGTERM; ours asks them to save. A hang-up of the terminal stays its own.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGHUP,SIGQUIT"
    interface = interface_of(meeting.address)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        if node.count > 1 and interface != "lo":
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    gpus = os.environ.setdefault("LAUNCH_VISIBLE_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    if not node.is_slurm and gpus:
        each = config.ranks_on_node
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus.split(",")[node.index * each : (node.index + 1) * each])


def run_ranks(
    folder: RunFolder, node: Node, config: Config, meeting: Meeting, stop: StopRequest, meter: Meter
) -> str | None:
    """Start this node's ranks and watch them to their end.

    Returns:
        None where all exited with status 0, what went wrong elsewhere. Ranks that could not tell the ledger
        themselves (killed, or dead before our code ran) are entered here.
    """
    prepare_environment(node, config, meeting)
    run_id = f"{node.job}-{meeting.attempt}"
    limit = config.resilience.rendezvous_timeout_s
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint="",
        run_id=run_id,
        min_nodes=config.nodes,
        max_nodes=config.nodes,
        local_addr=meeting.address,
        join_timeout=limit,
    )
    handler = create_handler(meeting.store, C10dRendezvousBackend(meeting.store, run_id), parameters)
    command, words = worker_command(folder, meeting.attempt)
    spec = WorkerSpec(
        role="rank",
        local_world_size=config.ranks_on_node,
        entrypoint=command,
        args=words,
        rdzv_handler=handler,
        max_restarts=0,
        monitor_interval=POLL_S,
        local_addr=meeting.address,
    )
    watch = Watch(folder, node, meeting, stop, config.resilience.stop_grace_s, meter)
    with TemporaryDirectory(prefix="launch-") as errors:
        rank_agent = RankAgent(spec, OneLogEach(errors), watch.look)
        try:
            result = rank_agent.run()
        finally:
            handler.shutdown()
    if result is None or not result.is_failed():
        return None
    tell_the_others(meeting)
    enter_silent_failures(folder, meeting.attempt, result, stop)
    return watch.verdict or "ranks failed on this node"


class Watch:
    """What an agent looks at several times a second, besides its ranks."""

    def __init__(
        self, folder: RunFolder, node: Node, meeting: Meeting, stop: StopRequest, grace_s: float, meter: Meter
    ) -> None:
        self._folder = folder
        self._is_slurm = node.is_slurm
        self._meeting = meeting
        self._stop = stop
        self._grace_s = grace_s
        self._meter = meter
        self._asked = False
        self.verdict: str | None = None

    def look(self, agent: RankAgent) -> None:
        """Hand a request to stop on, end ranks that outstay it, and end the ranks when another node has failed."""
        self._stop.interruptible = False
        owner = os.environ.get(OWNER)
        if owner and not Path(f"/proc/{owner}").exists() and not self._stop.count:
            self._stop.ask("the launcher is gone")
        if not self._stop.count and self._meter.look():
            self._stop.ask(BUDGET)
        if self._stop.count and not self._asked:
            self._asked = True
            self._folder.record_event(
                "signalled", attempt=self._meeting.attempt, host=socket.gethostname(), signal=self._stop.name
            )
            agent.send(signal.SIGTERM)
        at_once = self._stop.count > 1 and not self._is_slurm
        if self._asked and (at_once or time.monotonic() > self._stop.since + self._grace_s):
            agent.send(signal.SIGKILL)
        if self.verdict is None and self._others_failed():
            self.verdict = "another node failed"
            agent.send(signal.SIGKILL)

    def _others_failed(self) -> bool:
        try:
            return bool(self._meeting.store.check([FAILED]))
        except dist.DistError:  # the first node, which holds the store, is gone
            return True


def tell_the_others(meeting: Meeting) -> None:
    """Let the agents of the other nodes end their ranks now rather than at the timeout of a collective."""
    try:
        meeting.store.set(FAILED, socket.gethostname())
    except dist.DistError:
        return  # the first node is gone, and with it the store: they see that themselves


def enter_silent_failures(folder: RunFolder, attempt: int, result: RunResult, stop: StopRequest) -> None:
    """Enter ranks that died without a word into the ledger, with the end of their log."""
    told = {e["rank"] for e in folder.read_events() if e["event"] == "rank_failed" and e.get("attempt") == attempt}
    for rank, failure in sorted(result.failures.items()):
        if rank in told or (stop.count and failure.exitcode < 0):
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
