"""The agent: one process on each node, which starts the ranks of a run, watches them, and records how they ended.

python -m launch.agent RUN_DIR             started by srun on every node of a job
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

import gpt_launch.own_names  # noqa: F401
from launch.agent.node import (
    SHARES_JOB,
    AgentContext,
    HeadNodeLostError,
    Node,
    NodeProblem,
    RunContext,
    StopRequest,
    TooFewNodesError,
    is_replaced,
)
from launch.agent.outcome import (
    cancel_next_job,
    close_lost_attempts,
    end_lost_agents,
    handle_attempt_end,
    handle_early_stop,
    handle_too_few_nodes,
    request_spare_jobs,
    submit_next_job,
    take_over,
)
from launch.agent.policy import (
    WANTED,
    Action,
    AlreadyDecidedError,
    Cause,
    Meter,
    RunFailedError,
    has_stopped,
    refuse_replaced,
    unreliable_hosts,
)
from launch.config.compose import read_point
from launch.errors import CommandParser, ConfigError, refusing
from launch.plan.placement import refuse_other_code
from launch.runs.environment import raise_open_files, set_defaults
from launch.runs.events import FEWER_NODES, is_finished
from launch.runs.folder import RunFolder, deny_others_writing, is_event, keep_unwritten, make_folder, parse_json_lines
from launch.runs.process import lasting_imports, set_default_threads
from launch.runs.progress import NewLines
from launch.worker import STORE_PREFIX

if TYPE_CHECKING:
    from launch.agent.exchange import RendezvousEndpoint


def run_agent(run_dir: str, spare: Node | None = None) -> None:
    """Start and watch this node's ranks until the run ends, over as many attempts as ``resilience`` allows.

    Args:
        run_dir: the run folder.
        spare: identity of this node in the run, if this node belongs to a spare job; None for a node of the run's job.

    Raises:
        RunFailedError: the run failed and does not start again.
        ConfigError: the run cannot start here, for example because its folder cannot hold another attempt.
    """
    deny_others_writing()
    refuse_other_code()
    stop = StopRequest()
    if spare is None:
        stop.install()
    folder = RunFolder(run_dir)
    # A batch script can be submitted again, and a spare node can start after the run has finished.
    if is_finished(folder.read_events()):
        print(f"finished already, and not started again: {run_dir} (fresh=true runs it in a new folder)", flush=True)
        return
    keep_unwritten()
    config = read_point(folder)
    node = replace(spare or Node.from_env(), late=config.spare_jobs)
    context, shares_job = RunContext(folder, node, config), SHARES_JOB in os.environ
    if shares_job and node.restarts and has_stopped(context.events()):
        print(f"not started again, as it has stopped before the other points of its job: {run_dir}", flush=True)
        return
    raise_open_files()
    set_default_threads(config.ranks_on_node)  # Set before the fork server loads libraries for the ranks.
    set_defaults()
    with lasting_imports():
        from launch.agent import exchange, ranks, rendezvous  # All agents import torch now, before they meet.

    stop.interruptible = True
    lost: Mapping[int, NodeProblem] = {}
    try:
        with ranks.fork_server(context) as server, closing(ranks.MemoryStore()) as store:
            timeouts = (config.resilience.rendezvous_timeout_s, config.resilience.node_timeout_s)
            endpoint: RendezvousEndpoint | None = exchange.open_endpoint(folder, node, *timeouts)
            while endpoint is not None:  # Each turn is a term of one head node.
                context = replace(context, node=replace(node, head=endpoint.term.head))
                with (
                    on_event(context),  # This starts a thread, so it follows the server's fork.
                    Meter(context) as meter,
                    closing(rendezvous.AgentGroup(context, endpoint)) as group,
                ):
                    lost = group.lost
                    if shares_job and context.events("cancelled", job_id=node.slurm_job):
                        raise InterruptedError("cancelled before the ranks had started")
                    endpoint = work_in_group(
                        AgentContext(**vars(context), group=group, stop=stop, meter=meter, server=server, store=store)
                    )
    except InterruptedError as error:
        with on_event(context):
            handle_early_stop(context, str(error))
    finally:
        end_lost_agents(context, lost.values())
        os.umask(0o077)  # submitit's pickle of the result follows


def run_spare(run_dir: str, identity: str) -> None:
    """Join the agents of a run from a spare job, a Slurm job of one node that the run has requested.

    SIGTERM ends this process, and SIGUSR2 is ignored. So submitit's handlers do not requeue the spare job. The agents
    of the run treat the end of the spare job as the loss of one node.

    Args:
        run_dir: the run folder.
        identity: JSON of the ``Node`` that this process becomes.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    switches = tuple(os.environ.get("SLURM_TOPOLOGY_ADDR", "").split(".")[:-1])
    run_agent(run_dir, replace(msgspec.json.decode(identity, type=Node), switches=switches))


def work_in_group(context: AgentContext) -> RendezvousEndpoint | None:
    """Start this node's ranks, attempt after attempt, until the run ends, too few nodes are left, or the head node is
    lost.

    At the end, the head node sends the other nodes the message that the run is over, with the failure if there is one.

    Returns:
        The connection to the store of the next head node if the head node is lost; None if the run has ended.

    Raises:
        RunFailedError: the run failed and does not start again.
        ConfigError: the ranks cannot start here.
    """
    node, group, stop = context.node, context.group, context.stop
    failure: str | None = None
    try:
        if node.is_head and node.index > 0 and not take_over(context):
            return None
        if node.is_head and node.index == 0:
            why = context.meter.poll()
            if why is not None:  # the ranks would be stopped as soon as they have started
                raise RunFailedError(f"not started: {why}")
            close_lost_attempts(context)
            submit_next_job(context)
        start_repeatedly(context)
    except TooFewNodesError as error:
        handle_too_few_nodes(context, error)
    except HeadNodeLostError as error:
        stop.interruptible = False
        return group.next_endpoint(str(error))
    except (RunFailedError, ConfigError) as error:
        failure = str(error)
        if node.is_head and not isinstance(error, AlreadyDecidedError):
            cancel_next_job(context)
        raise
    finally:
        stop.interruptible = False
        if node.is_head:
            group.end(failure)
    return None


def start_repeatedly(context: AgentContext) -> None:
    """Start this node's ranks for one attempt after another, until the head node decides to stop or to requeue the run.

    A spare node waits until a round, which is one start of the ranks, includes the node.

    Raises:
        TooFewNodesError: on the head node, if too few healthy nodes are left.
        HeadNodeLostError: on the other nodes, if the head node is lost.
        RunFailedError: the run failed and does not start again.
    """
    from launch.agent import ranks

    folder, node, group, stop = context.folder, context.node, context.group, context.stop
    for number in itertools.count():
        stop.interruptible = True
        if node.is_head:
            refuse_replaced(context)
        avoid = unreliable_hosts(folder.read_events()) if node.is_head else {}
        rdzv = group.next_round(number, avoid)
        if rdzv is None:
            return
        if node.is_head:
            request_spare_jobs(context, rdzv)
        if node.index not in rdzv.members:
            continue
        stop.interruptible = False  # From here on all nodes leave together.
        # The number of ranks of this attempt follows from the nodes of this round, not of the job.
        problem = ranks.run_attempt(replace(context, config=replace(context.config, nodes=len(rdzv.members))), rdzv)
        ended = observed_end(folder, rdzv.attempt, problem, stop)
        if node.is_head:
            if handle_attempt_end(context, rdzv, ended).action is not Action.restart:
                return
            stop.withdraw()
            group.heartbeat.publish(again=rdzv.number)
        elif ended not in (Cause.crashed, Cause.requested) and group.await_end(rdzv):
            return


def observed_end(folder: RunFolder, attempt: int, problem: str | None, stop: StopRequest) -> Cause:
    """Return the cause of an attempt's end that every node can see: finished, cancelled, requested or crashed.

    The cause follows from the events of the ranks and from ``problem``. A requested stop gives ``cancelled``, unless
    the training is complete.

    Args:
        folder: the run folder.
        attempt: number of the attempt.
        problem: failure of this node's ranks as text; None if all of them left without a failure.
        stop: the request to stop that this agent has received.
    """
    events = [e for e in folder.read_events() if e.get("attempt") == attempt]
    names = {e["event"] for e in events}
    # Ranks of this node may request a requeue while ranks of other nodes have left with status 0.
    requeue = problem is None and any(e.get("asks_for_requeue") for e in events)
    if requeue and not stop.count:
        return Cause.requested
    if problem is None and "finished" in names and not requeue:
        return Cause.finished
    return Cause.cancelled if stop.count or (problem is None and "stopped" in names) else Cause.crashed


# The user's command at events of a run (``launch.on_event``), which runs in the background, once for each event.


POLL_S = 0.5
LONGEST_LINE = 1 << 20
COMMAND_TIMEOUT_S = 60.0
"""Seconds after which the user's command (``launch.on_event``) is killed."""
OWN_NAME = (
    *("started", "requeued", "requeue_failed", "node_lost", "node_sick", "budget_reached"),
    *("save_failed", "rolled_back", FEWER_NODES),
)
"""Events that the user's command receives under the names that they have in the event log.

``event_name`` selects the other events for the command, and gives them names.
"""


def event_name(event: Mapping[str, Any]) -> str | None:
    """Return the name under which the user's command receives an event; None if the event does not run the command."""
    kind = event["event"]
    # Only the first failed try of a copy runs the command.
    if kind in OWN_NAME or (kind == "copy_failed" and event["failures"] == 1):
        return str(kind)
    if kind != "decided" or event["action"] == Action.requeue:  # "requeued" or "requeue_failed" follows
        return None
    if event["action"] == Action.restart:
        return "restarted"
    if event["cause"] in WANTED:
        return "finished" if event["cause"] == Cause.finished else "stopped"
    return "failed"


def event_variables(folder: RunFolder, name: str, event: Mapping[str, Any]) -> dict[str, str]:
    """Return the environment variables that describe an event to the user's command: name -> value, "" if not known.

    Args:
        folder: the run folder.
        name: name of the event, from ``event_name``.
        event: one event of the event log.
    """
    known = {
        "LAUNCH_EVENT": name,
        **{f"LAUNCH_EVENT_{key.upper()}": event.get(key) for key in ("time", "cause", "reason", "step", "host")},
        "LAUNCH_EVENT_JSON": json.dumps(event),
        "LAUNCH_ATTEMPT": event.get("attempt"),
        "LAUNCH_RUN_DIR": folder.path,
    }
    return {key: "" if value is None else str(value) for key, value in known.items()}


@contextmanager
def on_event(context: RunContext) -> Iterator[None]:
    """Run the user's command for each event that is recorded during a ``with`` block and has an ``event_name``.

    Only the head node runs the command. A thread of this process does so until another node has become the head node.
    The end of the block waits about ``COMMAND_TIMEOUT_S`` seconds at most for the commands of the last events. Does
    nothing if no command is configured.
    """
    command, folder, node = context.config.launch.on_event_command, context.folder, context.node
    if not node.is_head or not command:
        yield
        return
    lines = NewLines(folder.events, re.compile(rb"\n"), LONGEST_LINE, skip=True)
    closing = threading.Event()

    def follow() -> None:
        is_last = False
        while not is_last:
            is_last = closing.wait(POLL_S)  # before the log is read, so that no event is missed
            with suppress(OSError):  # The filesystem does not answer; the next poll finds the same lines.
                while (found := lines.read()) is not None:
                    for event in parse_json_lines(found) if not is_replaced(folder, node) else ():
                        if is_event(event) and (name := event_name(event)) is not None:
                            run_command(folder, command, name, event)

    thread = threading.Thread(target=follow, name="on-event", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closing.set()
        thread.join(COMMAND_TIMEOUT_S + 2 * POLL_S)


def run_command(folder: RunFolder, command: Sequence[str], name: str, event: Mapping[str, Any]) -> None:
    """Run the user's command for one event, and record ``on_event_failed`` if the command fails or takes too long.

    Args:
        folder: the run folder.
        command: program and arguments.
        name: name of the event, from ``event_name``.
        event: the event.
    """
    env = {key: value for key, value in os.environ.items() if key != STORE_PREFIX}
    log = folder.path / ".launch" / "on_event.log"
    try:
        make_folder(log.parent)
        with open(log, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as output:
            status = subprocess.run(
                command, env=env | event_variables(folder, name, event), stdin=subprocess.DEVNULL, stdout=output,
                stderr=output, start_new_session=True, timeout=COMMAND_TIMEOUT_S,
            ).returncode  # fmt: skip
        problem = f"left with {status}, and its output in .launch/on_event.log" if status else None
    except subprocess.TimeoutExpired:
        problem = f"was killed, after {COMMAND_TIMEOUT_S:.0f} s"
    except (OSError, ValueError) as error:
        problem = f"cannot be run: {type(error).__name__}"
    if problem:  # neither the command nor its output: both may hold secrets
        with suppress(OSError):
            folder.record_event("on_event_failed", of=name, cause=f"launch.on_event {problem}")


@refusing
def main() -> int:
    """Run the agent of this node. Returns the exit status: 0, 1 if the run failed, 2 if the run cannot start."""
    parser = CommandParser(prog="python -m launch.agent", description="Run this node's ranks of a run.")
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the folder of the run, on a filesystem all nodes share")
    run_agent(str(Path(parser.parse_args().run_dir).absolute()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
