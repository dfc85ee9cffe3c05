"""The ranks of one node: started by an engine and watched by the agent, from their environment to their end."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from launch.agent.engine import LAST_MESSAGES_S, Engine, NodeRanks, ProcessEngine, engine_class
from launch.agent.exchange import POLL_S, derive
from launch.agent.fork_server import ForkServer
from launch.agent.health import gpu_telemetry
from launch.agent.node import VISIBLE_GPUS, AgentContext, Attempt, Node, RendezvousRound, RunContext
from launch.agent.watch import STACK_SIGNAL, RankRecords, Watch, log_end
from launch.config import Config
from launch.config.compose import workload_of
from launch.runs.environment import Gpu, set_defaults, set_dump_file, visible_gpus
from launch.runs.events import ECHO
from launch.runs.folder import RunFolder, read_plan
from launch.runs.measured import UsageMeter, usage_file
from launch.runs.process import ENVIRONMENT, set_default_threads
from launch.worker import STORE_PREFIX
from launch.worker.memory import SECRET, STORE
from launch.workload import CodeTree, fill

# The program of the ranks: its fork server, its code, and its environment.


@contextmanager
def fork_server(context: RunContext) -> Iterator[ForkServer | None]:
    """Run the fork server of this node during a ``with`` block. Yields None if ranks are executed instead of forked.

    Enter the block before this process has other threads. The server imports libraries while the agents meet, also on a
    spare node.
    """
    folder, config = context.folder, context.config
    workload = workload_of(config)
    preload: Sequence[str] = ()
    if config.resilience.engine.partition(":")[0] == "fork":
        preload = workload.command(config, folder, max(folder.attempts(), default=0) + 1).preload
        preload = (*preload, *config.resilience.preload)
    # A site's additions to Python, such as sitecustomize, have started a thread.
    if preload and threading.active_count() > 1:
        print("launch: ranks are executed, not forked: this agent has threads already", file=sys.stderr)
        preload = ()
    if not preload:
        yield None
        return
    with ForkServer(preload, state_of(code_of_ranks(folder, workload.code(config)))) as server:
        yield server


def code_of_ranks(folder: RunFolder, tree: CodeTree) -> CodeTree:
    """Return the code that ranks run: the copy that was made at submission; without a copy, ``tree`` itself."""
    copied = read_plan(folder).get("code")
    return tree if copied is None or tree.has_launcher else replace(tree, root=Path(copied))


def state_of(tree: CodeTree) -> dict[str, tuple[int, int]]:
    """Return the state of each Python file of the code: name -> (modification time in nanoseconds, size in bytes)."""
    stats = {name: path.stat() for name, path in tree.files(tree.root) if path.suffix == ".py"}
    return {name: (stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}


def prepare_environment(node: Node, config: Config, address: str) -> None:
    """Set the environment variables that ranks inherit in every attempt. ``address`` is the address of this node."""
    set_default_threads(config.ranks_on_node)
    os.environ["PYTHONUNBUFFERED"] = "1"
    os.environ.setdefault("PYTHONFAULTHANDLER", "1")  # a crash in compiled code leaves its stack in the log
    interfaces = psutil.net_if_addrs().items()
    interface = next((name for name, entries in interfaces if any(each.address == address for each in entries)), None)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        if node.count > 1 and interface != "lo":
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # without =, it is a prefix
    gpus = os.environ.setdefault(VISIBLE_GPUS, os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    if not node.is_slurm and gpus:
        each = config.ranks_on_node
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus.split(",")[node.index * each : (node.index + 1) * each])


def set_run_variables(attempt: Attempt) -> None:
    """Set the environment variables that ranks inherit in one attempt, including those of the workload."""
    folder, group, command, number = attempt.folder, attempt.group, attempt.command, attempt.number
    set_defaults(typed=command.env)
    set_dump_file(folder.path, folder.attempt(number), typed=command.env)
    for name, value in command.defaults.items():
        os.environ.setdefault(name, value)
    variables = {
        "LAUNCH_RUN_DIR": folder.path,
        "LAUNCH_ATTEMPT": number,
        "LAUNCH_CHECKPOINT_DIR": folder.checkpoints,
        "LAUNCH_GRACE_S": attempt.config.resilience.grace_period_s,
        "LAUNCH_AGENT_PID": os.getpid(),
        ENVIRONMENT: attempt.heartbeats,
        STORE_PREFIX: derive(group.token, f"ranks of attempt {number}"),
    }
    os.environ |= {name: str(value) for name, value in {**variables, **command.env}.items()}
    if command.wants_memory_store:
        os.environ |= attempt.store.environment(group.address, derive(group.token, "memory stores"))


def tracker_variables(folder: RunFolder, rank: int) -> dict[str, str]:
    """Return the environment variables with which a rank continues its experiment of an earlier attempt in a tracker.

    Weights & Biases, Neptune and Comet read their variables themselves. A program with another tracker reads the id of
    the experiment from LAUNCH_TRACKER_ID.

    The id is also a key that Comet accepts: 32 to 50 letters and digits. ``comet_ml.start`` continues the experiment
    with this key, or creates it (https://comet.com/docs/v2/api-and-sdk/python-sdk/reference/start).
    """
    same = folder.tracker_id(rank)
    ids = dict.fromkeys(("LAUNCH_TRACKER_ID", "WANDB_RUN_ID", "NEPTUNE_CUSTOM_RUN_ID", "COMET_EXPERIMENT_KEY"), same)
    return {**ids, "WANDB_RESUME": "allow"}


def own_words(args: Sequence[str], coordinator: str) -> Sequence[str]:
    """Return the command ``args`` with values in place of ``%{coordinator}``, ``%{rank}`` and ``%{local_rank}``.

    ``coordinator`` (``ADDRESS:PORT``) replaces ``%{coordinator}``. The other two become the numbers of the rank that
    executes the command: the command is then one of a shell, which reads RANK and LOCAL_RANK. So the returned command
    is the same for all ranks.
    """
    args = [fill(word, {"coordinator": coordinator}) for word in args]
    shell = {"rank": "'\"$RANK\"'", "local_rank": "'\"$LOCAL_RANK\"'"}
    line = fill(shlex.join(args), shell)
    return args if line == shlex.join(args) else ("/bin/sh", "-c", f"exec {line}")


class MemoryStore:
    """Process that keeps checkpoints in the memory of this node, from the first ``environment`` call to ``close``."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._place = ""

    def close(self) -> None:
        """End the process of the memory store. The checkpoints in its memory are lost."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def environment(self, address: str, secret: str) -> Mapping[str, str]:
        """Return the environment variables with which ranks find the store. Starts a store if none runs.

        If a store cannot be started, standard error says so, and the ranks run without a store.

        Args:
            address: network address on which the store listens.
            secret: secret that ranks and stores of the job share.
        """
        if self._process is None or self._process.poll() is not None:
            self.close()
            args = [sys.executable, "-m", "gpt_launch", "launch.worker.memory", str(os.getpid())]
            self._process = subprocess.Popen(
                args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
            )
            assert self._process.stdin is not None and self._process.stdout is not None
            port = ""
            with suppress(OSError):
                print(json.dumps([address, secret]), file=self._process.stdin, flush=True)
                port = self._process.stdout.readline().strip()
            self._place = f"{address}:{port}" if port else ""
            if not port:
                print("launch: no checkpoints in memory: the memory store does not start", file=sys.stderr)
        return {STORE: self._place, SECRET: secret}


def run_attempt(context: AgentContext, rdzv: RendezvousRound) -> str | None:
    """Start this node's ranks and watch them until all have ended.

    The function also records the end of each rank that could not record its end itself. Such ranks were killed, hung,
    died before their code ran, or belong to a workload without records.

    Args:
        context: context of the agent; its ``config.nodes`` counts only the nodes of this start.
        rdzv: members of this start and their store.

    Returns:
        The failure as text, of this node or of another node; None without a failure.
    """
    config, group = context.config, context.group
    workload = workload_of(config)
    with TemporaryDirectory(prefix="launch-") as scratch:
        attempt = Attempt(
            **vars(context),
            rdzv=rdzv,
            workload=workload.name,
            command=workload.command(config, context.folder, rdzv.attempt),
            contract=workload.contract(config, config.world_size),
            tree=code_of_ranks(context.folder, workload.code(config)),
            heartbeats=Path(scratch),
        )
        prepare_environment(context.node, config, group.address)
        set_run_variables(attempt)
        watch, records = Watch(attempt), RankRecords(attempt)
        rank_agent = RankAgent(attempt, watch, records)
        try:
            with gpu_telemetry(context, rdzv.attempt):
                failed = rank_agent.run()
        finally:
            records.close()
            rank_agent.usage.write(usage_file(context.folder, rdzv.attempt, context.node.index))
        if failed:
            # First the event log: the head node reads the failure there as soon as it receives the report.
            records.record_silent_failures(failed, rank_agent.killed)
            group.report_failed(rdzv.number)
            return watch.kill_reason or "ranks failed on this node"
    if watch.kill_reason is None:  # Otherwise the failure is on another node.
        records.record_end(rank_agent.asks_for_requeue)
    return watch.kill_reason


# From the start of this node's ranks to their end.


DEVICES = Path("/sys/bus/pci/devices")


def cpus_of_ranks(
    ranks: int, gpus: Sequence[Gpu], allowed: Collection[int], devices: Path = DEVICES
) -> list[frozenset[int]] | None:
    """Return, by local rank, the CPUs on the NUMA node of each rank's GPU; None if no rank should be bound to CPUs.

    Returns None if the NUMA node of a GPU is not known, or if all CPUs are on the NUMA node of every GPU. Returns None
    also if a NUMA node has fewer CPUs than ranks, because a job on a shared node may have CPUs of another socket.

    Args:
        ranks: number of ranks of this node.
        gpus: GPUs of this node, by local rank.
        allowed: CPUs that may be used; other CPUs do not count.
        devices: folder with the PCI devices of the machine.
    """
    near = []
    for gpu in gpus[:ranks]:
        with suppress(OSError):
            parts = (devices / str(gpu.bus) / "local_cpulist").read_text().strip().split(",")  # 0-3,8
            ends = [(part.partition("-")[0], part.partition("-")[2] or part) for part in parts if part]
            near.append(frozenset(n for a, b in ends for n in range(int(a), int(b) + 1) if n in allowed))
    if not near or len(near) < ranks or set(near) == {frozenset(allowed)}:
        return None
    return None if any(len(cpus) < count for cpus, count in Counter(near).items()) else near


def torchrun_variables(attempt: Attempt, local: int) -> dict[str, str]:
    """Return the environment variables that torchrun sets for a rank.

    Their list is at https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables. ``local`` is the rank
    on this node, from 0.
    """
    rank, rdzv, world = attempt.ranks[local], attempt.rdzv, attempt.config.world_size
    ranks = {"RANK": rank, "LOCAL_RANK": local, "GROUP_RANK": attempt.place, "ROLE_RANK": rank, "ROLE_NAME": "rank"}
    sizes = {
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": attempt.config.ranks_on_node,
        "GROUP_WORLD_SIZE": len(rdzv.members),
        "ROLE_WORLD_SIZE": world,
    }
    elastic = {
        "TORCHELASTIC_RUN_ID": f"attempt-{attempt.number}",
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_MAX_RESTARTS": 0,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_ERROR_FILE": attempt.error_file(rank),
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
    }
    store = {"MASTER_ADDR": rdzv.address, "MASTER_PORT": rdzv.port}
    return {name: str(value) for name, value in {**ranks, **sizes, **store, **elastic}.items()}


def bind_ranks(pids: Mapping[int, int]) -> None:
    """Bind each rank to the CPUs near its GPU. ``pids`` is rank -> process id, in the order of the local ranks."""
    near = cpus_of_ranks(len(pids), visible_gpus(), os.sched_getaffinity(0))
    for pid, cpus in zip(pids.values(), near or (), strict=False):
        with suppress(ProcessLookupError):  # The rank has ended.
            os.sched_setaffinity(pid, cpus)


class RankAgent:
    """Agent for the ranks of one node in one attempt. It starts the ranks by an engine, and waits for their end.

    While ranks run, the agent polls ``watch``, which finds hung ranks and lost nodes, and ``records``, which records
    the steps that ranks print into their logs.
    """

    def __init__(self, attempt: Attempt, watch: Watch, records: RankRecords) -> None:
        self._attempt, self._watch, self._records = attempt, watch, records
        records.begin()
        self.usage = UsageMeter()
        self._first_exit: float | None = None
        self._engine = self._make_engine()
        self._pids: dict[int, int] = {}
        """Rank -> process id, of ranks that run or have ended."""
        self.killed: set[int] = set()
        """Ranks that this agent or its engine has killed. Their exit statuses do not show why a run failed."""
        self.is_given_up = False
        """True if waiting for other nodes is useless: a node has failed or is lost, or the grace period is over."""
        self.asks_for_requeue = False
        """True if ranks have left with the exit status that requests a requeue of the job, and none has failed."""

    def _make_engine(self) -> Engine:
        attempt, command, variables = self._attempt, self._attempt.command, {}
        coordinator = f"{attempt.rdzv.address}:{attempt.rdzv.coordinator_port}"
        for local, rank in enumerate(attempt.ranks):
            values = {"rank": rank, "local_rank": local, "coordinator": coordinator}
            own = {name: fill(text, values) for name, text in command.env.items()}
            variables[rank] = {**tracker_variables(attempt.folder, rank), **own, **torchrun_variables(attempt, local)}
        workdir, logs = str(command.workdir or Path.cwd()), attempt.log(0).parent
        (scratch := attempt.heartbeats / "engine").mkdir()
        ranks = NodeRanks(own_words(command.args, coordinator), variables, workdir, logs, scratch)
        kind = engine_class(attempt.config.resilience)
        return ProcessEngine(ranks, self._ready_server()) if kind is ProcessEngine else kind(ranks)

    def _ready_server(self) -> ForkServer | None:
        """Return the server that forks the ranks, if it has imported their code; None if ranks are executed."""
        attempt, server = self._attempt, self._attempt.server
        if server is None:
            return None
        if server.code != state_of(attempt.tree):
            print("launch: ranks are executed, not forked: the code has changed", file=sys.stderr)
            return None
        # If a stop is requested meanwhile, the first poll stops the ranks. If the imports of the server hang, the
        # ranks are executed: the watchdog then finds them if they hang, too.
        deadline = time.monotonic() + attempt.config.resilience.startup_and_save_timeout_s
        server.wait_ready(lambda: attempt.stop.count > 0 or time.monotonic() > deadline)
        return server

    def run(self) -> Mapping[int, int]:
        """Start the ranks, and wait until the ranks of all nodes have left.

        If ranks of this node have failed, the method does not wait for those of other nodes.

        Returns:
            Rank -> exit status, negative for a signal, of this node's ranks that have failed; empty if none has.
        """
        engine = self._engine
        try:
            engine.start()
            bind_ranks(self.ranks())
            while self._have_to_wait(list(engine.statuses().values())):
                time.sleep(POLL_S)
                self._poll()
        finally:
            engine.stop()
        statuses = engine.statuses()
        asking = self._attempt.contract.requeue_exit
        for rank, status in statuses.items():
            if status != 0 and rank in self._pids:  # A worker that waits for ever would keep memory, and a GPU.
                with suppress(ProcessLookupError):
                    os.killpg(self._pids[rank], signal.SIGKILL)
        asked = self._watch.asked_for_stacks
        self.killed |= {rank for rank, status in statuses.items() if status is None}
        self.killed |= {rank for rank, status in statuses.items() if status == -STACK_SIGNAL and rank in asked}
        self.asks_for_requeue = (
            asking is not None and asking in statuses.values() and {*statuses.values()} <= {0, asking}
        )
        failed = {
            rank: -signal.SIGKILL if status is None else status for rank, status in statuses.items() if status != 0
        }
        if failed and not self.asks_for_requeue:
            return failed
        # Ranks of other nodes may still fail or work. The run would otherwise count as finished.
        while not self.is_given_up and not self._attempt.group.have_left(self._attempt.rdzv):
            self._poll()
            time.sleep(POLL_S)
        return {}

    def _poll(self) -> None:
        self._watch.poll(self)
        self.usage.poll(self.ranks().values())
        # After a request to stop, the agent looks for no lost nodes. It kills ranks that outlast the grace period.
        stop, grace_s = self._attempt.stop, self._attempt.config.resilience.grace_period_s
        is_late = stop.count > 0 and time.monotonic() > stop.since + grace_s + LAST_MESSAGES_S
        self.is_given_up = self._watch.kill_reason is not None or is_late
        self._records.poll()

    def _have_to_wait(self, codes: Sequence[int | None]) -> bool:
        """Return whether the agent must wait for ranks of this node. Kills the ranks for which it must not wait.

        After a rank has failed, the other ranks get ``LAST_MESSAGES_S`` seconds to record their own failures: the error
        of a rank that lost another rank often comes first, and would hide the original failure. If ranks have left with
        the exit status for a requeue, and none has failed, the others get the grace period to save.

        ``codes`` are the exit statuses of the ranks; None while a rank runs.
        """
        if None not in codes or not any(codes):
            return None in codes
        if self._first_exit is None:
            self._first_exit = time.monotonic()
        is_requeue = {code for code in codes if code} == {self._attempt.contract.requeue_exit}
        # The rank may still save.
        patience_s = self._attempt.config.resilience.grace_period_s if is_requeue else LAST_MESSAGES_S
        if time.monotonic() - self._first_exit < patience_s:
            return True
        logs = [self._attempt.log(self._attempt.ranks[local]) for local, code in enumerate(codes) if code]
        if all(ECHO.search(log_end(log)) for log in logs):  # a collective timed out: ranks that still run show why
            self._watch.record_stacks(self.ranks())
        self.send(signal.SIGKILL)
        return False

    def send(self, number: signal.Signals) -> None:
        """Send a signal to every rank of this node that still runs."""
        for rank, pid in self.ranks().items():
            with suppress(ProcessLookupError):
                os.kill(pid, number)
                if number is signal.SIGKILL:
                    self.killed.add(rank)

    def ranks(self) -> Mapping[int, int]:
        """Return the process ids of this node's ranks that still run, by rank; empty before the start."""
        running = self._engine.ranks()
        self._pids |= running
        return running
