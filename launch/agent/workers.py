"""The ranks of one node, through torch elastic: start them, watch them to the end, and say which of them failed.

Owns the environment and the logs of the ranks. Elastic itself is behind ``launch.agent.elastic``; what is recorded of
ranks is ``launch.agent.rank_records``'s.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch.distributed as dist
from torch.distributed.elastic.agent.server import WorkerSpec

from launch.agent import numa
from launch.agent.elastic import LAST_MESSAGES_S, FixedRendezvous, OneLogEach, RankAgent
from launch.agent.fork_server import ForkedProcess, ForkServer
from launch.agent.heartbeat import POLL_S
from launch.agent.members import RendezvousRound
from launch.agent.memory_store import MemoryStore
from launch.agent.meter import Meter
from launch.agent.monitor import Watch
from launch.agent.node import Node, interface_of
from launch.agent.rank_records import RankRecords
from launch.agent.rendezvous import AgentGroup
from launch.agent.signed_store import derive
from launch.agent.stop import StopRequest
from launch.agent.telemetry import gpu_telemetry
from launch.config import Config
from launch.config.compose import workload_of
from launch.process import set_default_threads
from launch.runs import heartbeat
from launch.runs.damage import read_plan
from launch.runs.folder import RunFolder
from launch.runs.hosts import visible_gpus
from launch.runs.rank_environment import set_defaults, set_dump_file
from launch.worker import STORE_PREFIX
from launch.workload import CodeTree, RankCommand

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


def describe_run(
    config: Config, folder: RunFolder, group: AgentGroup, rdzv: RendezvousRound, command: RankCommand,
    heartbeats: Path, store: MemoryStore,
) -> None:  # fmt: skip
    """Set what ranks learn of their run, and what their workload wants in their environment."""
    set_defaults(typed=command.env)
    set_dump_file(folder.path, folder.attempt(rdzv.attempt), typed=command.env)
    for name, value in command.defaults.items():
        os.environ.setdefault(name, value)
    told = {
        "LAUNCH_RUN_DIR": folder.path,
        "LAUNCH_ATTEMPT": rdzv.attempt,
        "LAUNCH_CHECKPOINT_DIR": folder.checkpoints,
        "LAUNCH_GRACE_S": config.resilience.grace_period_s,
        "LAUNCH_AGENT_PID": os.getpid(),
        heartbeat.ENVIRONMENT: heartbeats,
        STORE_PREFIX: derive(group.token, f"ranks of round {rdzv.number}"),
    }
    os.environ |= {name: str(value) for name, value in {**told, **command.env}.items()}
    if command.wants_memory_store:
        os.environ |= store.environment(group.address, derive(group.token, "memory stores"))


def run_ranks(
    folder: RunFolder, node: Node, config: Config, group: AgentGroup, rdzv: RendezvousRound, stop: StopRequest,
    meter: Meter, server: ForkServer | None, store: MemoryStore,
) -> str | None:  # fmt: skip
    """Start this node's ranks and watch them to their end.

    Args:
        config: of the run, with the nodes of this start.
        rdzv: the agents that take part in this start.
        stop: request that the ranks are told of.
        server: forks the ranks; None where there is none. One whose code has changed since is not used.
        store: of this node; started for a workload that wants it.

    Returns:
        None where all left in order, what went wrong elsewhere. Ranks that could not tell the event log themselves
        (killed, stuck, dead before their code ran, or of a workload that does not) are entered here.

    Raises:
        InterruptedError: told to leave before the ranks of all nodes had started.
    """
    workload = workload_of(config)
    contract = workload.contract(config, config.world_size)
    command = workload.command(config, folder, rdzv.attempt)
    tree = code_of_ranks(folder, workload.code(config))
    records = RankRecords(folder, node, config, rdzv, workload.name, command, contract, tree)
    grace_s = config.resilience.grace_period_s
    with TemporaryDirectory(prefix="launch-") as scratch:
        prepare_environment(node, config, group.address)
        describe_run(config, folder, group, rdzv, command, Path(scratch), store)
        watch = Watch(folder, node, config, group, rdzv, stop, meter, Path(scratch), contract)
        timeout_s = config.resilience.rendezvous_timeout_s
        rendezvous = FixedRendezvous(rdzv, node.index, timeout_s, group.token, lambda: stop.count > 0, watch.find_lost)
        cpus = cpus_to_bind(config)
        records.begin(cpus)
        rank_agent = RankAgent(
            worker_spec(folder, config, rdzv, rendezvous, group.address, command),
            OneLogEach(scratch),
            poll_of(watch, records, stop, grace_s),
            contract,
            grace_s,
            rendezvous.departures(),
            fork_of(server_for(server, tree, stop), folder, rdzv.attempt, command),
            cpus,
        )
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
