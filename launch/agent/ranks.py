"""The ranks of one node, started and watched through torch elastic."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from subprocess import Popen
from tempfile import TemporaryDirectory
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.agent.server import WorkerSpec
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs
from torch.distributed.elastic.multiprocessing import api as elastic_processes
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from launch.agent import fork_server as numa
from launch.agent.exchange import POLL_S, SignedStore, derive, quick_s
from launch.agent.fork_server import ForkedProcess, ForkServer
from launch.agent.gpus import gpu_telemetry
from launch.agent.health import RendezvousRound
from launch.agent.node import AgentContext, Node, StopRequest, interface_of
from launch.agent.records import RankRecords
from launch.agent.watch import Watch
from launch.config import Config
from launch.config.compose import workload_of
from launch.process import set_default_threads
from launch.runs import heartbeat
from launch.runs.environment import set_defaults, set_dump_file, visible_gpus
from launch.runs.folder import RunFolder, read_plan
from launch.worker import STORE_PREFIX
from launch.workload import CodeTree, RankCommand, RankContract

# Torch elastic behind one door: the agent that starts and watches the ranks of a node, and all that it is handed.


HERE = "here"
"""Key in the store of a start: how many nodes are about to start their ranks."""
VERDICT = "verdict"
"""Key in it: what holds for all of them, ``GO``, ``LEAVE`` or ``AGAIN``; the first to write it decides."""
GO, LEAVE, AGAIN = "go", "leave", "again"
LAST_MESSAGES_S = 3.0
"""Time that ranks have after the first failure, to tell theirs."""


class FixedRendezvous(RendezvousHandler):
    """Elastic's rendezvous for agents that have agreed already on who takes part and where."""

    def __init__(
        self, rdzv: RendezvousRound, index: int, timeout_s: float, token: str, is_leaving: Callable[[], bool],
        find_lost: Callable[[], str | None],
    ) -> None:  # fmt: skip
        """Take part in a round.

        Args:
            is_leaving: tells whether this node was told to leave.
            find_lost: says which node is lost, None where none is; asked until all have come.
        """
        self._round = rdzv
        self._token = token
        self._timeout_s = timeout_s
        self._is_leaving = is_leaving
        self._find_lost = find_lost
        self._place = rdzv.place(index)
        self._store = dist.TCPStore(
            rdzv.address, rdzv.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
        )

    def next_rendezvous(self) -> RendezvousInfo:
        """Return the place of this node among the members, and the store for the ranks.

        Raises:
            InterruptedError: a node was told to leave before all had come here.
            torch.distributed.DistStoreError: a node did not come, or was lost before it could.
        """
        self._meet()
        where = RendezvousStoreInfo(self._round.address, self._round.port)
        store = dist.PrefixStore(derive(self._token, "elastic"), self._store)
        return RendezvousInfo(store, self._place, len(self._round.members), where)

    def departures(self) -> Departures:
        """Return the count of nodes whose ranks have left this round."""
        return Departures(SignedStore(self._store, self._token, "departures"), self._place, len(self._round.members))

    def _meet(self) -> None:
        """Wait for the other nodes where a signal is heard: elastic's own waits, in C++, last as long as the timeout.

        One verdict for all: a node that left while another went on would leave that one waiting.
        """
        store = dist.PrefixStore(derive(self._token, "rendezvous"), self._store)
        deadline = time.monotonic() + self._timeout_s
        count = store.add(HERE, 1)
        while not store.check([VERDICT]):
            if count >= len(self._round.members):
                store.compare_set(VERDICT, "", GO)
            elif self._is_leaving():
                store.compare_set(VERDICT, "", LEAVE)
            elif self._find_lost() is not None:
                store.compare_set(VERDICT, "", AGAIN)
            elif time.monotonic() > deadline:
                raise dist.DistStoreError(f"{count} of {len(self._round.members)} nodes came in {self._timeout_s:g} s")
            else:
                time.sleep(quick_s(len(self._round.members)))
            count = store.add(HERE, 0)
        verdict = store.get(VERDICT).decode()
        if verdict == LEAVE:
            raise InterruptedError("told to leave before the ranks had started")
        if verdict == AGAIN:
            raise dist.DistStoreError("a node was lost before the ranks had started")

    @property
    def use_agent_store(self) -> bool:
        """Have the ranks meet in the store too: no port is opened that could be taken."""
        return True

    def get_backend(self) -> str:
        """Name this rendezvous in elastic's logs."""
        return "fixed"

    def is_closed(self) -> bool:
        """Return False: it serves one round."""
        return False

    def set_closed(self) -> None:
        """Do nothing: there is nothing to close."""

    def num_nodes_waiting(self) -> int:
        """Return 0: nobody joins later."""
        return 0

    def get_run_id(self) -> str:
        """Name this round."""
        return f"attempt-{self._round.attempt}"

    def shutdown(self) -> bool:
        """Do nothing: the store belongs to the head node's agent group."""
        return True


class Departures:
    """The nodes of a round all of whose ranks have left in order, told in the round's store by signed messages."""

    def __init__(self, store: SignedStore, place: int, count: int) -> None:
        self._store = store
        self._place = place
        self._keys = [f"left/{index}" for index in range(count)]

    def leave(self) -> None:
        """Tell that the ranks of this node have left."""
        self._store.set(self._keys[self._place], "left")

    def is_complete(self) -> bool:
        """Tell whether those of all nodes have. One node looks for all, and tells the others."""
        if self._place == 0 and None not in self._store.read(self._keys):
            self._store.set("left/all", "left")
        return self._store.read(["left/all"]) == ["left"]


class OneLogEach(LogsSpecs):
    """The ranks write their logs themselves (see ``worker_command``); elastic only needs a place for error files."""

    def __init__(self, errors: str) -> None:
        super().__init__()
        self._errors = errors

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Redirect nothing, and tell each rank where its failure is looked for (torch's @record, gpt.train)."""
        nowhere = dict.fromkeys(envs, "")
        files = {rank: f"{self._errors}/{rank}.json" for rank in envs}
        for rank, path in files.items():
            envs[rank]["TORCHELASTIC_ERROR_FILE"] = path
        return LogsDest(stdouts=nowhere, stderrs=nowhere, error_files=files)

    @property
    def root_log_dir(self) -> str:
        """Folder that elastic may write into."""
        return self._errors


class RankAgent(LocalElasticAgent):
    """Elastic's agent, with a callback at every poll of the ranks."""

    def __init__(self, spec: WorkerSpec, logs: LogsSpecs, contract: RankContract, grace_s: float) -> None:
        """Start nothing yet; the attributes without a value are set before ``run``.

        Args:
            spec: program of a rank, and how many there are.
            logs: where elastic may write.
            contract: by which exit status ranks request to be requeued.
            grace_s: seconds for which ranks that do so wait for the others.
        """
        super().__init__(spec, logs)
        self._requeue_exit = contract.requeue_exit
        self._grace_s = grace_s
        self._first_exit: float | None = None
        self.on_poll: Callable[[RankAgent], None]
        """Called at every poll."""
        self.departures: Departures
        """Reports whether the ranks of all nodes have left."""
        self.fork: Callable[[Mapping[str, str]], ForkedProcess | None]
        """Gives the process of a rank with this environment; None where the program is to be executed."""
        self.cpus: Sequence[Collection[int]] | None = None
        """CPUs that each rank is bound to, by local rank; None binds none."""
        self.killed: set[int] = set()
        """Ranks that this agent ended: their end explains nothing."""
        self.is_given_up = False
        """True where nothing is to be waited for any more: another node has failed, or is lost."""
        self.asks_for_requeue = False
        """True where ranks have left with the exit status that means: saved, requeue the job."""

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        """Start the ranks, by forks where there are some: elastic makes their handlers by a function of its module."""
        fork, original, cpus = self.fork, elastic_processes.get_subprocess_handler, self.cpus

        class Handler(SubprocessHandler):
            def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> Popen[bytes] | ForkedProcess:  # type: ignore[override]
                if cpus is not None:
                    env[numa.VARIABLE] = ",".join(map(str, sorted(cpus[int(env["LOCAL_RANK"])])))
                forked = fork(env)
                if forked is not None:
                    return forked
                with numa.bound(numa.told_cpus(env)):
                    return super()._popen(args, env)

        elastic_processes.get_subprocess_handler = Handler  # type: ignore[assignment]
        try:
            return super()._start_workers(worker_group)
        finally:
            elastic_processes.get_subprocess_handler = original

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self.on_poll(self)
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
        with contextlib.suppress(dist.DistError):  # the head node knows how it ended, and has closed its store
            self.departures.leave()
            while not self.is_given_up and not self.departures.is_complete():
                self.on_poll(self)
                time.sleep(POLL_S)

    def _exit_codes(self) -> list[int | None]:
        """Exit status of each rank of this node, None of one that runs; nothing before they are started."""
        if not isinstance(self._pcontext, SubprocessContext):
            return []
        return [handler.proc.poll() for handler in self._pcontext.subprocess_handlers.values()]

    def _wait_for_others(self, codes: Sequence[int | None]) -> bool:
        """Tell whether a rank has failed, or left, and the others still have a moment to do what they have to.

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


# The ranks of one node, through torch elastic: start them, watch them to the end, and say which of them failed.


START_RANK = 'cd -- "$1" && log="$2/rank_$(printf %05d "$RANK").log" && shift 2 && exec "$@" >>"$log" 2>&1 </dev/null'
"""A shell opens the log, so that what a program prints before it runs a line of its own is kept as well; exec leaves no
shell behind, and the rank under the process id that elastic knows."""


def entrypoint(command: RankCommand, logs: Path) -> tuple[str, tuple[str, ...]]:
    """Program and arguments that elastic starts for each rank, everything it prints in one log."""
    workdir = str(command.workdir or Path.cwd())
    return "/bin/sh", ("-c", START_RANK, "sh", workdir, str(logs), *command.args)


@contextmanager
def fork_server(folder: RunFolder, config: Config) -> Iterator[ForkServer | None]:
    """Keep the fork server of this node for a ``with`` block; None where ranks are to be executed.

    To be opened before there are threads. It imports while the agents meet, on a spare node as well.
    """
    workload = workload_of(config)
    preload = workload.command(config, folder, max(folder.attempts(), default=0) + 1).preload
    if not (config.resilience.fork_ranks and preload):
        yield None
        return
    if threading.active_count() > 1:  # started by what a site adds to Python, as by sitecustomize
        print("launch: ranks are executed, not forked: this agent has threads already", file=sys.stderr)
        yield None
        return
    with ForkServer(preload, state_of(code_of_ranks(folder, workload.code(config)))) as server:
        yield server


def state_of(tree: CodeTree) -> dict[str, tuple[int, int]]:
    """Time of the last change in ns and size of every file of the code."""
    stats = {name: path.stat() for name, path in tree.files(tree.root)}
    return {name: (stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}


def prepare_environment(node: Node, config: Config, address: str) -> None:
    """Set what all ranks inherit."""
    set_default_threads()
    os.environ["PYTHONUNBUFFERED"] = "1"
    # All nodes have the same ranks: elastic's agents need not write the sizes into a store that others can reach.
    os.environ["TORCH_ELASTIC_WORKER_IDENTICAL"] = "1"
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


@dataclass(frozen=True)
class Round:
    """One start of this node's ranks: who takes part, and the program that they run."""

    rdzv: RendezvousRound
    workload: str
    """Name of the workload."""
    command: RankCommand
    contract: RankContract
    """What the ranks record themselves, and the signals and exit statuses that they understand."""
    tree: CodeTree
    """The code that the ranks run."""
    heartbeats: Path
    """Folder of the ranks' heartbeat files, empty at the start."""


def describe_run(context: AgentContext, start: Round) -> None:
    """Set the variables by which ranks find their run, and those that their workload wants."""
    folder, group, command, attempt = context.folder, context.group, start.command, start.rdzv.attempt
    set_defaults(typed=command.env)
    set_dump_file(folder.path, folder.attempt(attempt), typed=command.env)
    for name, value in command.defaults.items():
        os.environ.setdefault(name, value)
    variables = {
        "LAUNCH_RUN_DIR": folder.path,
        "LAUNCH_ATTEMPT": attempt,
        "LAUNCH_CHECKPOINT_DIR": folder.checkpoints,
        "LAUNCH_GRACE_S": context.config.resilience.grace_period_s,
        "LAUNCH_AGENT_PID": os.getpid(),
        heartbeat.ENVIRONMENT: start.heartbeats,
        STORE_PREFIX: derive(group.token, f"ranks of round {start.rdzv.number}"),
    }
    os.environ |= {name: str(value) for name, value in {**variables, **command.env}.items()}
    if command.wants_memory_store:
        os.environ |= context.store.environment(group.address, derive(group.token, "memory stores"))


def run_ranks(context: AgentContext, rdzv: RendezvousRound) -> str | None:
    """Start this node's ranks and watch them to their end.

    Args:
        context: its config has the nodes of this start. A fork server whose code has changed since is not used.
        rdzv: the agents that take part in this start.

    Returns:
        None where all left in order, what went wrong elsewhere. Ranks that could not write to the event log themselves
        (killed, hung, dead before their code ran, or of a workload that does not) are recorded here.

    Raises:
        InterruptedError: a stop was requested before the ranks of all nodes had started.
    """
    folder, node, config, group, stop = context.folder, context.node, context.config, context.group, context.stop
    workload = workload_of(config)
    contract = workload.contract(config, config.world_size)
    command = workload.command(config, folder, rdzv.attempt)
    tree = code_of_ranks(folder, workload.code(config))
    grace_s = config.resilience.grace_period_s
    with TemporaryDirectory(prefix="launch-") as scratch:
        start = Round(rdzv, workload.name, command, contract, tree, Path(scratch))
        records = RankRecords(context, start)
        prepare_environment(node, config, group.address)
        describe_run(context, start)
        watch = Watch(context, start)
        timeout_s = config.resilience.rendezvous_timeout_s
        rendezvous = FixedRendezvous(rdzv, node.index, timeout_s, group.token, lambda: stop.count > 0, watch.find_lost)
        cpus = cpus_to_bind(config)
        records.begin(cpus)
        spec = worker_spec(folder, config, rdzv, rendezvous, group.address, command)
        rank_agent = RankAgent(spec, OneLogEach(scratch), contract, grace_s)
        rank_agent.on_poll = poll_of(watch, records, stop, grace_s)
        rank_agent.departures = rendezvous.departures()
        rank_agent.fork = fork_of(server_for(context.server, tree, stop), folder, rdzv.attempt, command)
        rank_agent.cpus = cpus
        try:
            with gpu_telemetry(folder, node, config, rdzv.attempt):
                result = rank_agent.run()
        except dist.DistError as error:  # the store is gone, and with it the head node
            rank_agent.send(signal.SIGKILL)
            return f"the nodes did not meet, or the head node's store does not answer: {error}"
        finally:
            records.close()
    if result is not None and result.is_failed():
        # First the event log: the head node reads the failure there as soon as it is told.
        records.enter_silent_failures(result, stop, rank_agent.killed)
        group.tell_failed(rdzv.number)
        return watch.kill_reason or "ranks failed on this node"
    if watch.kill_reason is None:  # else nothing went wrong here, but elsewhere
        records.record_end(stop, rank_agent.asks_for_requeue)
    return watch.kill_reason


def cpus_to_bind(config: Config) -> list[frozenset[int]] | None:
    """Return the CPUs that each rank of this node is bound to; None where ranks are bound to none."""
    if not config.cluster.bind_cpus:
        return None
    return numa.cpus_of_ranks(config.ranks_on_node, visible_gpus(), os.sched_getaffinity(0))


def worker_spec(
    folder: RunFolder, config: Config, rdzv: RendezvousRound, rendezvous: FixedRendezvous, address: str,
    command: RankCommand,
) -> WorkerSpec:  # fmt: skip
    """Describe this node's ranks as elastic wants them: started once, since the agents decide on restarts."""
    program, args = entrypoint(command, folder.log(rdzv.attempt, 0).parent)
    return WorkerSpec(
        role="rank",
        local_world_size=config.ranks_on_node,
        entrypoint=program,
        args=args,
        rdzv_handler=rendezvous,
        max_restarts=0,
        monitor_interval=POLL_S,
        local_addr=address,
    )


def poll_of(watch: Watch, records: RankRecords, stop: StopRequest, grace_s: float) -> Callable[[RankAgent], None]:
    """Return what is done several times a second while the ranks run."""

    def poll(agent: RankAgent) -> None:
        watch.poll(agent)
        # After a request to stop nobody looks for lost nodes; ranks that outstay the grace period are killed.
        latest = stop.since + grace_s + LAST_MESSAGES_S
        agent.is_given_up = watch.kill_reason is not None or (stop.count > 0 and time.monotonic() > latest)
        records.poll()

    return poll


def server_for(server: ForkServer | None, tree: CodeTree, stop: StopRequest) -> ForkServer | None:
    """Return the fork server once it is ready; None where there is none, or it has imported other code."""
    if server is None:
        return None
    if server.code != state_of(tree):
        print("launch: ranks are executed, not forked: the code has changed", file=sys.stderr)
        return None
    server.wait_ready(lambda: stop.count > 0)  # the first poll hands a stop on
    return server


def fork_of(
    server: ForkServer | None, folder: RunFolder, attempt: int, command: RankCommand
) -> Callable[[Mapping[str, str]], ForkedProcess | None]:
    """Return what forks a rank with its environment; it returns None where the rank is to be executed."""
    workdir = str(command.workdir or Path.cwd())

    def fork(env: Mapping[str, str]) -> ForkedProcess | None:
        log = str(folder.log(attempt, int(env["RANK"])))
        return None if server is None else server.start(command.args, env, workdir, log)

    return fork


def code_of_ranks(folder: RunFolder, tree: CodeTree) -> CodeTree:
    """The code that ranks run: the copy taken at submission where the run has one."""
    copied = read_plan(folder).get("code")
    return tree if copied is None or tree.has_launcher else replace(tree, root=Path(copied))
