"""The ranks of one node, through torch elastic: start them, watch them to the end, and say which of them failed.

Owns the environment and the logs of the ranks, and what is recorded of their end. Elastic itself is behind
``launch.agent.elastic``.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch.distributed as dist
from torch.distributed.elastic.agent.server import WorkerSpec
from torch.distributed.elastic.agent.server.api import RunResult
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from launch.agent.elastic import LAST_MESSAGES_S, FixedRendezvous, OneLogEach, RankAgent
from launch.agent.environment import EnvironmentRecord
from launch.agent.fork_server import ForkedProcess, ForkServer
from launch.agent.heartbeat import POLL_S
from launch.agent.meter import Meter
from launch.agent.monitor import Watch
from launch.agent.node import Node, interface_of
from launch.agent.progress import Progress
from launch.agent.rendezvous import AgentGroup, RendezvousRound
from launch.agent.signed_store import derive
from launch.agent.stop import STOP_FILE, StopRequest
from launch.config import Config
from launch.config.compose import workload_of
from launch.process import set_default_threads
from launch.runs import heartbeat
from launch.runs.damage import read_plan
from launch.runs.failures import enter_failure
from launch.runs.folder import RunFolder
from launch.runs.records import recent_records
from launch.worker import STORE_PREFIX
from launch.workload import CodeTree, RankCommand, RankContract

LAST_LINE = re.compile(r"^((?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception|Interrupt|Exit)\b.*)$", re.MULTILINE)
"""The line of a Python traceback that names the exception."""


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
    config: Config, folder: RunFolder, attempt: int, command: RankCommand, heartbeats: Path, prefix: str
) -> None:
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
        STORE_PREFIX: prefix,
    }
    os.environ |= {name: str(value) for name, value in {**told, **command.env}.items()}


def run_ranks(
    folder: RunFolder, node: Node, config: Config, group: AgentGroup, rdzv: RendezvousRound, stop: StopRequest,
    meter: Meter, server: ForkServer | None,
) -> str | None:  # fmt: skip
    """Start this node's ranks and watch them to their end.

    Args:
        folder: of the run.
        node: this one.
        config: of the run.
        group: the agents.
        rdzv: those that take part in this start.
        stop: request that the ranks are told of.
        meter: of the allocation.
        server: forks the ranks; None where there is none. One whose code has changed since is not used.

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
    with TemporaryDirectory(prefix="launch-") as scratch:
        prepare_environment(node, config, group.address)
        prefix = derive(group.token, f"ranks of round {rdzv.number}")
        describe_run(config, folder, rdzv.attempt, command, Path(scratch), prefix)
        program, args = entrypoint(command, folder.log(rdzv.attempt, 0).parent)
        timeout_s = config.resilience.rendezvous_timeout_s
        rendezvous = FixedRendezvous(rdzv, node.index, timeout_s, group.token, lambda: stop.count > 0)
        spec = WorkerSpec(
            role="rank",
            local_world_size=config.ranks_on_node,
            entrypoint=program,
            args=args,
            rdzv_handler=rendezvous,
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
                environment.poll(workload.name, command, contract, tree)

        workdir = str(command.workdir or Path.cwd())
        forks = server if server is not None and server.code == state_of(tree) else None
        if server is not None and forks is None:
            print("launch: ranks are executed, not forked: the code has changed", file=sys.stderr)
        if forks is not None:
            forks.wait_ready(lambda: stop.count > 0)  # the first poll hands a stop on

        def fork(env: Mapping[str, str]) -> ForkedProcess | None:
            log = str(folder.log(rdzv.attempt, int(env["RANK"])))
            return None if forks is None else forks.start(command.args, env, workdir, log)

        grace_s = config.resilience.grace_period_s
        rank_agent = RankAgent(spec, OneLogEach(scratch), poll, contract, grace_s, rendezvous.departures(), fork)
        try:
            result = rank_agent.run()
        except dist.DistError as error:  # the store is gone, and with it the head node
            rank_agent.send(signal.SIGKILL)
            return f"the head node's store does not answer: {error}"
        finally:
            progress.close()
            if not contract.records_events:  # a program of moments may be over before the first poll
                environment.poll(workload.name, command, contract, tree)
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


def code_of_ranks(folder: RunFolder, tree: CodeTree) -> CodeTree:
    """The code that ranks run: the copy taken at submission where the run has one."""
    copied = read_plan(folder).get("code")
    return tree if copied is None or tree.has_launcher else replace(tree, root=Path(copied))


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
    """Tell whether rank 0 has written how an attempt ended, as a script does that uses ``launch.worker``."""
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
