"""The ranks of one node, through torch elastic: start them, watch them to the end, and say which of them failed.

Owns the processes. Every start is a fresh rendezvous among nodes that the agent group has agreed on: elastic's own,
shared by several starts, was seen to close with a dead node as a member.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import torch.distributed as dist
from torch.distributed.elastic.agent.server import WorkerSpec
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from launch.agent.environment import EnvironmentRecord
from launch.agent.heartbeat import POLL_S
from launch.agent.meter import Meter
from launch.agent.monitor import Watch
from launch.agent.node import Node, interface_of
from launch.agent.progress import Progress
from launch.agent.rendezvous import AgentGroup, RendezvousRound
from launch.agent.stop import STOP_FILE, StopRequest
from launch.config import Config
from launch.config.compose import workload_of
from launch.runs import heartbeat
from launch.runs.failures import enter_failure
from launch.runs.folder import RunFolder
from launch.runs.records import recent_records
from launch.workload import RankCommand, RankContract

LAST_MESSAGES_S = 3.0
LEFT = "left"
"""Key in the store of a start: how many nodes have seen all their ranks leave in order."""
LAST_LINE = re.compile(r"^((?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception|Interrupt|Exit)\b.*)$", re.MULTILINE)
"""The line of a Python traceback that names the exception."""


class FixedRendezvous(RendezvousHandler):
    """Elastic's rendezvous for agents that have agreed already on who takes part and where."""

    def __init__(self, rdzv: RendezvousRound, index: int, timeout_s: float) -> None:
        self._round = rdzv
        self._place = rdzv.members.index(index)
        self._store = dist.TCPStore(
            rdzv.address, rdzv.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
        )

    def next_rendezvous(self) -> RendezvousInfo:
        """The place of this node among the members, and the store for the ranks."""
        where = RendezvousStoreInfo(self._round.address, self._round.port)
        store = dist.PrefixStore("agents", self._store)
        return RendezvousInfo(store, self._place, len(self._round.members), where)

    @property
    def use_agent_store(self) -> bool:
        """The ranks meet in the store too: no port is opened that could be taken."""
        return True

    def get_backend(self) -> str:
        """Its name in elastic's logs."""
        return "fixed"

    def is_closed(self) -> bool:
        """Never: it serves one round."""
        return False

    def set_closed(self) -> None:
        """Nothing to close."""

    def num_nodes_waiting(self) -> int:
        """Nobody joins later."""
        return 0

    def get_run_id(self) -> str:
        """A name for this round."""
        return f"attempt-{self._round.attempt}"

    def shutdown(self) -> bool:
        """The store belongs to the head node's agent group."""
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
    """Elastic's agent, with a question of ours asked at every poll of the ranks."""

    def __init__(
        self,
        spec: WorkerSpec,
        logs: LogsSpecs,
        on_poll: Callable[[RankAgent], None],
        contract: RankContract,
        grace_s: float,
    ) -> None:
        super().__init__(spec, logs)
        self._on_poll = on_poll
        self._requeue_exit = contract.requeue_exit
        self._grace_s = grace_s
        self._first_exit: float | None = None
        self.killed: set[int] = set()
        """Ranks that were ended from here: their end explains nothing."""
        self.is_given_up = False
        """Whether nothing is to be waited for any more: another node has failed, or is lost."""
        self.asks_for_requeue = False
        """Whether ranks have left with the exit status that means: saved, put me back into the queue."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._on_poll(self)
        codes = self._exit_codes()
        if self._wait_for_others(codes):
            return RunResult(state=WorkerState.HEALTHY)
        asking = self._requeue_exit
        if asking is not None and asking in codes and all(code in (0, asking) for code in codes):
            self.asks_for_requeue = True
            left = {worker.global_rank: None for worker in worker_group.workers}
            return RunResult(state=WorkerState.SUCCEEDED, return_values=left)
        return super()._monitor_workers(worker_group)

    def _exit_barrier(self) -> None:
        """Wait until the ranks of all other nodes have left, too, and look on meanwhile.

        Elastic's own barrier gives up after five minutes, also where ranks of another node have failed or work on, and
        says nothing: the run then counted as finished.
        """
        store, members = self._store, self._worker_group.group_world_size
        assert store is not None
        with contextlib.suppress(dist.DistError):  # the head node knows how it ended, and has closed its store
            store.add(LEFT, 1)
            while not self.is_given_up and store.add(LEFT, 0) < members:
                self._on_poll(self)
                time.sleep(POLL_S)

    def _exit_codes(self) -> list[int | None]:
        """Exit status of each rank of this node, None of one that runs; nothing before they are started."""
        if not isinstance(self._pcontext, SubprocessContext):
            return []
        return [handler.proc.poll() for handler in self._pcontext.subprocess_handlers.values()]

    def _wait_for_others(self, codes: Sequence[int | None]) -> bool:
        """Whether a rank has failed, or left, and the others still have a moment to do what they have to.

        Elastic would end them right away: the echo of a failure, which comes first, would hide the failure. Those
        that are stuck with the lost rank are then killed, where elastic would wait for them for half a minute.
        """
        if None not in codes or not any(codes):
            return False
        if self._first_exit is None:
            self._first_exit = time.monotonic()
        left = {code for code in codes if code}
        patience_s = self._grace_s if left == {self._requeue_exit} else LAST_MESSAGES_S  # others may save still
        if time.monotonic() - self._first_exit < patience_s:
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


START_RANK = 'cd "$1" && log="$2/rank_$(printf %05d "$RANK").log" && shift 2 && exec "$@" >>"$log" 2>&1 </dev/null'
"""A shell opens the log, so that what a program prints before it runs a line of its own is kept as well; exec leaves no
shell behind, and the rank under the process id that elastic knows."""


def entrypoint(command: RankCommand, logs: Path) -> tuple[str, tuple[str, ...]]:
    """Program and arguments that elastic starts for each rank, everything it prints in one log."""
    workdir = str(command.workdir or Path.cwd())
    return "/bin/sh", ("-c", START_RANK, "sh", workdir, str(logs), *command.args)


def prepare_environment(node: Node, config: Config, address: str) -> None:
    """Set what all ranks inherit. torchrun's habit of one thread for each rank is kept, and can be overridden."""
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


def describe_run(config: Config, folder: RunFolder, attempt: int, command: RankCommand, heartbeats: Path) -> None:
    """Set what ranks learn of their run, and what their workload wants in their environment."""
    for name, value in command.defaults.items():
        os.environ.setdefault(name, value)
    told = {
        "LAUNCH_RUN_DIR": folder.path,
        "LAUNCH_ATTEMPT": attempt,
        "LAUNCH_CHECKPOINT_DIR": folder.checkpoints,
        "LAUNCH_GRACE_S": config.resilience.grace_period_s,
        "LAUNCH_AGENT_PID": os.getpid(),
        heartbeat.ENVIRONMENT: heartbeats,
    }
    os.environ |= {name: str(value) for name, value in {**told, **command.env}.items()}


def run_ranks(
    folder: RunFolder, node: Node, config: Config, group: AgentGroup, rdzv: RendezvousRound, stop: StopRequest,
    meter: Meter,
) -> str | None:  # fmt: skip
    """Start this node's ranks and watch them to their end.

    Returns:
        None where all left in order, what went wrong elsewhere. Ranks that could not tell the event log themselves
        (killed, stuck, dead before their code ran, or of a workload that does not) are entered here.
    """
    workload = workload_of(config)
    contract = workload.contract(config, config.world_size)
    command = workload.command(config, folder, rdzv.attempt)
    with TemporaryDirectory(prefix="launch-") as scratch:
        prepare_environment(node, config, group.address)
        describe_run(config, folder, rdzv.attempt, command, Path(scratch))
        program, args = entrypoint(command, folder.log(rdzv.attempt, 0).parent)
        spec = WorkerSpec(
            role="rank",
            local_world_size=config.ranks_on_node,
            entrypoint=program,
            args=args,
            rdzv_handler=FixedRendezvous(rdzv, node.index, config.resilience.rendezvous_timeout_s),
            max_restarts=0,
            monitor_interval=POLL_S,
            local_addr=group.address,
        )
        watch = Watch(folder, node, config, group, rdzv, stop, meter, Path(scratch), contract)
        place, each = rdzv.members.index(node.index), config.ranks_on_node
        local_ranks = range(place * each, (place + 1) * each)
        progress = Progress(
            folder, rdzv.attempt, local_ranks, contract.progress, contract.unit, contract.work_per_step,
            contract.writes_curves,
        )  # fmt: skip
        environment = EnvironmentRecord(folder, rdzv.attempt, place, len(rdzv.members))
        if not contract.records_events:
            environment.describe_node(local_ranks)
            if place == 0:
                folder.record_event(
                    "started", attempt=rdzv.attempt, world_size=config.world_size, max_steps=contract.max_steps
                )

        def poll(agent: RankAgent) -> None:
            watch.poll(agent)
            # After a request to stop nobody looks for lost nodes; ranks that outstay the grace period are killed.
            latest = stop.since + config.resilience.grace_period_s + LAST_MESSAGES_S
            agent.is_given_up = watch.kill_reason is not None or (stop.count > 0 and time.monotonic() > latest)
            progress.poll()
            if not contract.records_events:
                environment.poll(workload.name, command, contract, workload.code(config))

        rank_agent = RankAgent(spec, OneLogEach(scratch), poll, contract, config.resilience.grace_period_s)
        try:
            result = rank_agent.run()
        except dist.DistError as error:  # the store is gone, and with it the head node
            rank_agent.send(signal.SIGKILL)
            return f"the head node's store does not answer: {error}"
        finally:
            progress.close()
            if not contract.records_events:  # a program of moments may be over before the first poll
                environment.poll(workload.name, command, contract, workload.code(config))
    if result is None or not result.is_failed():
        if watch.kill_reason is not None:  # nothing went wrong here, but elsewhere
            return watch.kill_reason
        if not contract.records_events:
            record_end(folder, node, rdzv, stop, rank_agent.asks_for_requeue)
        return None
    # First the event log: the head node reads the failure there as soon as it is told.
    enter_silent_failures(folder, rdzv.attempt, result, stop, rank_agent.killed, contract)
    group.tell_failed(rdzv.number)
    return watch.kill_reason or "ranks failed on this node"


def record_end(folder: RunFolder, node: Node, rdzv: RendezvousRound, stop: StopRequest, asks_for_requeue: bool) -> None:
    """Write into the event log how ranks ended that do not tell it themselves, and left in order.

    Every node whose ranks ask for the queue says so; whether all is finished, one node says for all.
    """
    records = recent_records(folder.metrics(0))
    step = records[-1]["step"] if records else None
    if asks_for_requeue:
        folder.record_event("stopped", attempt=rdzv.attempt, step=step, node=node.index, asks_for_requeue=True)
    elif node.index == rdzv.members[0] and not has_told_its_end(folder, rdzv.attempt):
        event = "stopped" if stop.count else "finished"
        asked = {"signal": stop.name or None, "file": STOP_FILE if stop.name == STOP_FILE else None}
        folder.record_event(event, attempt=rdzv.attempt, step=step, **asked)


def has_told_its_end(folder: RunFolder, attempt: int) -> bool:
    """Whether rank 0 has written how an attempt ended, as a script does that uses ``launch.worker``."""
    ends = ("finished", "stopped")
    return any(e["event"] in ends and e.get("attempt") == attempt for e in folder.read_events())


def enter_silent_failures(
    folder: RunFolder, attempt: int, result: RunResult, stop: StopRequest, ended_here: Collection[int],
    contract: RankContract,
) -> None:  # fmt: skip
    """Enter ranks that died silently into the event log, with their traceback or the end of their log."""
    told = {e["rank"] for e in folder.read_events() if e["event"] == "rank_failed" and e.get("attempt") == attempt}
    for rank, failure in sorted(result.failures.items()):
        # A program that is told to stop, and knows nothing of us, may end in any way.
        stopped = stop.count and (failure.exitcode < 0 or not contract.records_events)
        if rank in told or rank in ended_here or stopped or failure.exitcode == contract.requeue_exit:
            continue
        cause, trace = failure_message(failure, folder.log(attempt, rank))
        enter_failure(folder, attempt, rank, cause=cause, trace=trace, step=None)


def failure_message(failure: ProcessFailure, log: Path) -> tuple[str, str]:
    """Cause and traceback of a rank's failure: from the error file that torch's @record writes, or from its log."""
    message = failure.error_file_data.get("message") if failure.error_file_data else None
    if isinstance(message, dict) and message.get("message"):
        return str(message["message"]), str((message.get("extraInfo") or {}).get("py_callstack") or tail(log))
    number = -failure.exitcode
    end = tail(log)
    if number > 0:
        return f"killed by {signal.Signals(number).name}", end
    last = LAST_LINE.findall(end)
    return (f"{last[-1]} (exit status {failure.exitcode})" if last else f"exit status {failure.exitcode}"), end


def tail(log: Path, lines: int = 30) -> str:
    """The last lines of a log; nothing where there is none."""
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return ""
